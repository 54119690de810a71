"""Mutated files of packages and adapters: each loads or is refused in one line, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import Phi4Error
from phi4_mlx.generation.stream import generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.lora.export import to_peft
from tests.adapters import adapted, save_adapter
from tests.conftest import ROOT, make_tiny_model, write_tiny_checkpoint
from tests.tiny_sambay import write_tiny_sambay

SECONDS = 60  # for one file: guards against a hang only
MEMORY_BYTES = 2**30  # that one file may take

HUGE = "9" * 6000  # Python refuses to convert such a number
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**32, 2**32 + 5, 2**53 + 1, 2**63, 2**64, -(2**63), 10**18, 10**400,
    0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), "", "a", "NaN", "9" * 5000, "é\u2028",
    "\ud800", "\x00", "\x1b[2J", "../../etc/passwd", "/dev/zero", "a" * 100_000, "<|end|>", [], {}, [[]],
    {"": None}, [None], [1, "a"], [0] * 100_000, {"a": {"b": 1}}, "(a|a)*b",
]  # fmt: skip
INSERTED = ['"', "}", "[", "\\", "\x00", ",", HUGE, "[" * 100_000, "1e999", "-"]
LITERALS = [HUGE, f'"{HUGE}"', "1" + "0" * 300, "[" * 900 + "]" * 900, "[" * 90 + "]" * 90, '{"a":1,"a":2}']


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; of long containers only some."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) < 200 else keys[:: len(keys) // 100]:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def mutated(draw: random.Random, text: str) -> str:
    """A JSON text with one or more changes: values, keys, or characters."""
    kind = draw.randrange(10)
    if kind < 7:
        value = json.loads(text)
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            container, key = draw.choice(list(places(value)) or [(value, "new")])
            change = draw.randrange(6)
            if change == 0:
                del container[key]
            elif change == 1 and isinstance(container, dict):
                container[str(draw.choice(VALUES))[:200]] = container.pop(key)
            elif change == 2:
                other = draw.choice(list(container)) if isinstance(container, dict) else draw.randrange(len(container))
                container[key] = copy.deepcopy(container[other])
            else:
                container[key] = draw.choice(VALUES)
            if not value:
                break
        return json.dumps(value)
    at = draw.randrange(len(text))
    if kind == 7:
        return text[:at] + draw.choice(INSERTED) + text[at:]
    if kind == 8:
        return text[:at]
    number = text.find(": ", at)  # a number or a text in place of some value
    end = min([each for each in (text.find(",", number), text.find("}", number)) if each > number], default=len(text))
    return text[: number + 2] + draw.choice(LITERALS) + text[end:]


def sources(root: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """File -> (the folder with it, the function that reads such a folder)."""
    plain = write_tiny_checkpoint(root / "plain", shards=2)
    layers = ["full_attention", "sliding_attention"] * 2 + ["full_attention"] * 4
    flash = write_tiny_sambay(root / "flash", mamba_dt_rank="auto", mamba_d_conv=4, mb_per_layer=2, layer_types=layers)
    convert(write_tiny_checkpoint(root / "dense"), root / "package", quantize=True, q_group_size=32)
    model = adapted(make_tiny_model())
    save_adapter(model, root / "adapter", {"model": "owner/name"})
    to_peft(root / "adapter", root / "peft")
    peft = json.loads((root / "peft" / "adapter_config.json").read_text())
    peft |= {"rank_pattern": {"qkv_proj": 4}, "alpha_pattern": {"o_proj": 3}, "layers_to_transform": [0, 1]}
    (root / "peft" / "adapter_config.json").write_text(json.dumps(peft))

    def use(folder: Path) -> None:
        model, tokenizer = load(folder)
        ids = tokenizer.encode("hello <|end|> there", specials=True)
        tokenizer.decode(ids)
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        mask = Constraint(json_schema({"type": "object"}), tokenizer, model.config.vocab_size)
        for options in ({}, {"logits_mask": mask}):
            generate(model, tokenizer, ids[:8] or [1], max_tokens=3, **options)

    def put_on(folder: Path) -> None:
        mx.eval(load(root / "dense", adapter_path=folder)[0](mx.array([[1, 2, 3]])))

    packages = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    made: dict[str, tuple[Path, Callable[[Path], object]]] = {f"plain/{name}": (plain, use) for name in packages}
    made |= {f"package/{name}": (root / "package", use) for name in ["config.json", "manifest.json"]}
    made |= {"plain/model.safetensors.index.json": (plain, use), "flash/config.json": (flash, use)}
    made |= {f"{kind}/adapter_config.json": (root / kind, put_on) for kind in ("adapter", "peft")}
    return made


def attack(root: Path, seeds: range) -> None:
    """Reads mutated files, and prints a line about each that is neither read nor refused in one line."""
    files = sources(root)
    for seed in seeds:
        draw = random.Random(seed)
        name = sorted(files)[seed % len(files)]
        folder, read = files[name]
        target = root / "target"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        path = target / Path(name).name
        path.write_bytes(mutated(draw, path.read_text()).encode("utf-8", "surrogatepass"))
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = "read"
        try:
            read(target)
        except Phi4Error as error:
            outcome = "refused"
            if "\n" in str(error) or len(str(error)) > 1500:
                print(f"{name} {seed}: a message of {len(str(error))} characters: {str(error)[:200]!r}", flush=True)
        except BaseException as error:  # a panic of Rust's is no Exception
            print(f"{name} {seed}: {type(error).__name__}: {str(error)[:200]!r}", flush=True)
        seconds = time.monotonic() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if seconds > SECONDS or grown > MEMORY_BYTES:
            print(f"{name} {seed}: {outcome} after {seconds:.1f} s, {grown:,} bytes", flush=True)
    print(f"{len(seeds)} files", flush=True)


@pytest.mark.slow
def test_a_mutated_file_is_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own, with a limit on its memory: what a damaged file can do at worst is end that process."""
    code = "import sys; from pathlib import Path; from tests.property.test_package_files import attack;" \
           "attack(Path(sys.argv[1]), range(int(sys.argv[2])))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "396"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (done.stdout, done.returncode) == ("396 files\n", 0), done.stdout + done.stderr[-2000:]
