"""`python -m phi4_mlx.convert` as users run it: killed, on a full disk, mistyped; and compared with mlx-lm."""

from __future__ import annotations

import json
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.errors import Phi4Error
from phi4_mlx.terminal.amount import size
from tests.conftest import ROOT
from tests.packages import left_beside

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
CONVERT = [sys.executable, "-m", "phi4_mlx.convert"]
FOUR_BITS = ["-q", "--q-group-size", "32"]
Checkpoint = Callable[..., Path]


def run(*command: str, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def arguments(source: Path, out: Path, *options: str) -> list[str]:
    return [*CONVERT, "--hf-path", str(source), "--mlx-path", str(out), *options]


def whole(out: Path) -> bool:
    """True if the target exists; it must be complete then."""
    if out.exists():
        load(out, verify=True)
    return out.exists()


def test_the_command_converts_and_reports_the_size(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("source", dtype=mx.bfloat16)
    done = run(*arguments(source, tmp_path / "out", *FOUR_BITS), cwd=tmp_path)
    weights = size((tmp_path / "out" / "model.safetensors").stat().st_size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: {weights} of weights, ")
    advice = f"chat with it: python -m phi4_mlx chat --model {tmp_path / 'out'}"
    assert done.stdout.splitlines()[1:] == [advice] and done.stderr == ""
    model, tokenizer = load(tmp_path / "out", verify=True)
    assert model(mx.array([tokenizer.encode("hello")])).shape[-1] == 512


BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "no source": (["--mlx-path", "out"], "--hf-path"),
    "source not there": (["--hf-path", "nowhere"], "'nowhere' is neither a folder nor a Hub id"),
    "no network": (["--hf-path", "owner/name"], "HF_HUB_OFFLINE is set; --model demo"),
    "negative bits": (["--hf-path", "x", "-q", "--q-bits", "-4"], "from 2 to 8"),
    "absurd bits": (["--hf-path", "x", "-q", "--q-bits", "9" * 400], "from 2 to 8"),
    "no number": (["--hf-path", "x", "-q", "--q-bits", "nan"], "from 2 to 8"),
    "absurd group": (["--hf-path", "x", "-q", "--q-group-size", "1000000"], "from 16 to 128"),
    "group of zero": (["--hf-path", "x", "-q", "--q-group-size", "0"], "from 16 to 128"),
    "unknown mode": (["--hf-path", "x", "-q", "--q-mode", "gguf"], "affine"),
    "unknown dtype": (["--hf-path", "x", "--dtype", "int8"], "bfloat16"),
    "bits without -q": (["--hf-path", "x", "--embed-bits", "6"], "does nothing without -q"),
    "unknown option": (["--hf-path", "x", "--trust-remote-code"], "--trust-remote-code"),
    "target is there": (["--hf-path", "x", "--mlx-path", "."], "already exists"),
    "empty target": (["--hf-path", "x", "--mlx-path", ""], "already exists"),
    "target in a file": (["--hf-path", "x", "--mlx-path", "/dev/null/out"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_mistake_is_one_line_and_exit_code_two(case: str, tmp_path: Path) -> None:
    options, reason = BAD_COMMANDS[case]
    done = run(*CONVERT, *options, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("python -m phi4_mlx.convert: "), done.stderr
    assert reason in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_the_common_command_shows_its_help_without_loading_mlx(tmp_path: Path) -> None:
    code = "import sys; from phi4_mlx.cli import main; main(['convert', '--help']); sys.exit('mlx.core' in sys.modules)"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0 and "--embed-bits" in done.stdout, done.stderr


# Dies at the n-th step: before each fsync, the rename, and each write of a tensor.
KILL_AT = """
import os, signal, sys
from pathlib import Path
from phi4_mlx.convert.__main__ import main
from phi4_mlx.files.safetensors import TensorWriter
steps = 0
def counted(function):
    def call(*args):
        global steps
        steps += 1
        if steps == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.fsync, Path.rename = counted(os.fsync), counted(Path.rename)
TensorWriter.append = counted(TensorWriter.append)
assert main(sys.argv[2:]) == 0
print(steps)
"""


@pytest.mark.slow
def test_killed_at_any_step_the_target_is_absent_or_whole_and_the_rerun_works(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("source", num_hidden_layers=1), tmp_path / "out"
    command = [sys.executable, "-c", KILL_AT]
    rest = arguments(source, out, *FOUR_BITS)[3:]
    steps = int(run(*command, "0", *rest).stdout.splitlines()[-1])
    assert steps > 25
    for step in [1, 2, 9, *range(steps - 9, steps + 1)]:
        shutil.rmtree(out)
        assert run(*command, str(step), *rest).returncode == -signal.SIGKILL
        assert whole(out) == (step == steps), step  # after the rename there is only the fsync of the parent folder
        if not out.exists():
            partial = tmp_path / ".out.partial"
            assert left_beside(out) == [partial.name]
            if not (partial / "config.json").exists():  # it is written last, so with it the package is complete
                with pytest.raises(Phi4Error):
                    load(partial)
            assert run(*arguments(source, out, *FOUR_BITS)).returncode == 0
            assert whole(out)
        assert left_beside(out) == ["out"]


@pytest.mark.slow
def test_killed_at_random_moments(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("source", hidden_size=768, intermediate_size=4096, num_hidden_layers=3)
    out, rng, outcomes = tmp_path / "out", random.Random(1), []
    begin = time.perf_counter()
    assert run(*arguments(source, out, *FOUR_BITS)).returncode == 0
    usual_s = time.perf_counter() - begin
    for n in range(12):
        target = tmp_path / f"out{n:02}"
        process = subprocess.Popen(arguments(source, target, *FOUR_BITS), cwd=ROOT, env=ENVIRONMENT)
        time.sleep(rng.uniform(0.3, 1.05) * usual_s)
        process.kill()
        process.wait()
        outcomes.append(whole(target))
        if not outcomes[-1]:
            assert run(*arguments(source, target, *FOUR_BITS)).returncode == 0
            assert whole(target)
        assert left_beside(target) == [target.name]
    assert not all(outcomes), "every run ended before it was killed"


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A limit on the size of files replaces the full disk: the system refuses the write in the same way."""
    source, out = tiny_checkpoint("source"), tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(*arguments(source, out), preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m phi4_mlx.convert: ")
    assert done.stderr.endswith(f": {out} cannot be written: File too large; nothing was left there\n")
    assert left_beside(out) == []
    assert run(*arguments(source, out)).returncode == 0 and whole(out)


def test_a_bar_on_a_terminal_and_none_in_a_pipe(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("source")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        arguments(source, tmp_path / "out"), cwd=ROOT, env=ENVIRONMENT | {"TERM": "xterm"}, stderr=theirs
    )
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert "━".encode() in shown and b"kB" in shown


# --- compared with mlx-lm ---

# One process, because mlx-lm takes seconds to import. It compares logits past the RoPE boundary, where both use the
# same table, for each package, and tensors with those of mlx_lm.convert for each recipe.
COMPARED_WITH_MLX_LM = """
import json, sys
import mlx.core as mx
import mlx_lm
from pathlib import Path
from phi4_mlx import load
source, packages, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
ids = mx.random.randint(0, 480, (1, 90), key=mx.random.key(3))
report = {}
for name, options in packages.items():
    ours, tokenizer = load(folder / name)
    theirs, their_tokenizer = mlx_lm.load(str(folder / name))
    apart = mx.abs(ours(ids) - theirs(ids)).astype(mx.float32)
    entry = {"max": apart.max().item(), "mean": apart.mean().item(), "scale": theirs(ids).std().item()}
    entry["eos"] = sorted(tokenizer.eos_ids) == sorted(their_tokenizer.eos_token_ids)
    if options is not None:
        mlx_lm.convert(source, str(folder / (name + "-lm")), **options)
        a, b = (mx.load(str(folder / n / "model.safetensors")) for n in (name, name + "-lm"))
        entry["same"] = a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)
        a, b = (json.loads((folder / n / "config.json").read_text()) for n in (name, name + "-lm"))
        entry["settings"] = a.get("quantization") == b.get("quantization")
    report[name] = entry
print(json.dumps(report))
"""


@pytest.mark.slow
def test_mlx_lm_loads_the_packages_with_the_same_logits_and_makes_the_same_tensors(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("source")
    recipes: dict[str, tuple[list[str], dict[str, Any] | None]] = {
        "plain": ([], {}),
        "four": (FOUR_BITS, {"quantize": True, "q_bits": 4, "q_group_size": 32}),
        "six": ([*FOUR_BITS, "--q-bits", "6"], {"quantize": True, "q_bits": 6, "q_group_size": 32}),
        "mxfp4": (["-q", "--q-mode", "mxfp4"], {"quantize": True, "q_mode": "mxfp4"}),
        "nvfp4": (["-q", "--q-mode", "nvfp4"], {"quantize": True, "q_mode": "nvfp4"}),
        "mxfp8": (["-q", "--q-mode", "mxfp8"], {"quantize": True, "q_mode": "mxfp8"}),
        "half": (
            [*FOUR_BITS, "--dtype", "float16"],
            {"quantize": True, "q_group_size": 32, "q_bits": 4, "dtype": "float16"},
        ),
        "embedding": ([*FOUR_BITS, "--embed-bits", "8"], None),
    }
    for name, (options, _) in recipes.items():
        done = run(*arguments(source, tmp_path / name, *options))
        assert done.returncode == 0, done.stderr
    options_json = json.dumps({name: theirs for name, (_, theirs) in recipes.items()})
    done = run(sys.executable, "-c", COMPARED_WITH_MLX_LM, str(source), options_json, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, entry in json.loads(done.stdout.splitlines()[-1]).items():
        assert entry["scale"] > 0.5, name
        if name in ("plain", "four", "six", "embedding"):
            assert entry["max"] <= 2e-4, (name, entry)
        else:  # half precision: mlx unpacks embeddings in mxfp4, nvfp4 and mxfp8 to bfloat16
            assert entry["mean"] <= 2e-2, (name, entry)
        assert entry["eos"], name
        assert entry.get("same", True) and entry.get("settings", True), (name, entry)
