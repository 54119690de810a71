"""`python -m phi4_mlx generate` as a process: its output, its errors and its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.conftest import ROOT

WEIGHTS = "model.safetensors"
Checkpoint = Callable[..., Path]


def generate(
    *arguments: str, stdin: bytes | None = None, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "generate", *arguments],
        input=b"" if stdin is None else stdin,
        capture_output=True,
        timeout=120,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment,
    )
    assert done.returncode == code, done.stderr.decode()
    if code:
        assert done.stderr.count(b"\n") == 1 and b"Traceback" not in done.stderr
    return done


def reshape(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> str:
    return str(tiny_checkpoint())


def test_the_answer_and_nothing_else_on_standard_output(model: str) -> None:
    options = ["--model", model, "--max-tokens", "12"]
    done = generate(*options, "--prompt", "hello")
    assert done.stderr == b""
    assert done.stdout.strip() and done.stdout.endswith(b"\n")
    assert generate(*options, stdin=b"hello\n").stdout == done.stdout
    assert generate(*options, "--prompt", "-", stdin=b"hello").stdout == done.stdout
    verbose = generate(*options, "--prompt", "hello", "--verbose")
    assert verbose.stdout == done.stdout
    assert b"prompt " in verbose.stderr and b"tokens/s" in verbose.stderr


def test_the_command_says_what_the_library_says(model: str) -> None:
    from phi4_mlx import generate as generate_text
    from phi4_mlx import load

    loaded, tokenizer = load(model)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = generate_text(loaded, tokenizer, tokenizer.apply_chat_template(messages), max_tokens=10)
    common = ["--model", model, "--max-tokens", "10", "--prompt", "hello"]
    assert generate(*common, "--system-prompt", "be brief").stdout.decode().removesuffix("\n") == expected
    expected = generate_text(loaded, tokenizer, "hello", max_tokens=10)
    assert generate(*common, "--ignore-chat-template").stdout.decode().removesuffix("\n") == expected


def test_a_seed_repeats_and_stop_stops(model: str) -> None:
    options = ["--model", model, "--max-tokens", "30", "--prompt", "hello", "--temp", "1"]
    first = generate(*options, "--seed", "1").stdout
    assert generate(*options, "--seed", "1").stdout == first
    assert generate(*options, "--seed", "2").stdout != first
    text = first.decode()
    stop = next(c for c in text[5:] if c.isalpha())
    stopped = generate(*options, "--seed", "1", "--stop", stop).stdout.decode()
    assert stopped.removesuffix("\n") == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--prompt", "x", "--temp", "nan"], "--temp: 'nan' is not a number from 0 to 100"),
        (["--prompt", "x", "--temp", "-1"], "--temp: '-1' is not a number from 0 to 100"),
        (["--prompt", "x", "--temp", "1e9"], "--temp: '1e9' is not a number from 0 to 100"),
        (["--prompt", "x", "--top-p", "1.1"], "--top-p: '1.1' is not a number from 0 to 1"),
        (["--prompt", "x", "--min-p", "inf"], "--min-p: 'inf' is not a number from 0 to 1"),
        (["--prompt", "x", "--top-k", "-1"], "--top-k: '-1' is not a whole number from 0 to"),
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens: '0' is not a whole number from 1 to"),
        (["--prompt", "x", "--max-tokens", "9" * 5000], "is not a whole number from 1 to"),
        (["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty: '0' is not a number from 0.01 to 100"),
        (["--prompt", "x", "--seed", "1.5"], "--seed: '1.5' is not a whole number from 0 to"),
        (["--prompt", "x", "--stop", ""], "--stop: '' is empty"),
        (["--prompt", "x", "--model", ""], "--model: '' is empty"),
        (["--prompt", "x", "--system-prompt", "y", "--ignore-chat-template"], "drop one"),
        (["--prompt", "x", "--chat-format", "nope"], "chat format 'nope' is unknown; known are"),
        (["--prompt", "x" * 5000], "the context holds"),
        (["--prompt", "x", "--max-tokens", "100000"], "the context holds"),
        (["--prompt", "x", "--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], complaint: str, model: str) -> None:
    done = generate("--model", model, *arguments, code=2)
    assert complaint in done.stderr.decode() and done.stdout == b""


def test_input_that_is_not_utf8(model: str) -> None:
    done = generate("--model", model, stdin=b"caf\xe9", code=2)
    assert b"standard input is not UTF-8: byte 0xe9 at offset 3" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "generate", "--model", model, "--prompt", b"caf\xe9"],
        cwd=ROOT, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and b"is not UTF-8" in done.stderr


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("no/such/folder", "no/such/folder"), ("/nowhere", "neither a folder nor a Hub id")],
)
def test_a_model_that_is_not_there(name: str, complaint: str) -> None:
    done = generate("--model", name, "--prompt", "x", code=2)
    assert complaint in done.stderr.decode() and b"--model demo" in done.stderr


def test_no_network_offers_the_embedded_model(tmp_path: Path) -> None:
    done = generate("--prompt", "x", code=2, HF_HOME=str(tmp_path))
    assert b"--model demo" in done.stderr


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert b"config.json" in generate("--model", str(tmp_path), "--prompt", "x", code=2).stderr
    (tmp_path / "config.json").write_text("{")
    assert b"config.json" in generate("--model", str(tmp_path), "--prompt", "x", code=2).stderr
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert b"llama" in generate("--model", str(tmp_path), "--prompt", "x", code=2).stderr


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]), "damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f{}"), "damaged"),  # a header of 8 exabytes
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no model*.safetensors"),
        (lambda folder: reshape(folder, intermediate_size=192), "has shape"),
        (lambda folder: reshape(folder, num_hidden_layers=1), "are unexpected"),
        (lambda folder: reshape(folder, rope_scaling={"type": "llama3", "low_freq_factor": 1}), "rope type 'llama3'"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    ],
)
def test_a_damaged_model_is_one_line(damage: Callable[[Path], object], complaint: str, model: str) -> None:
    damage(Path(model))
    assert complaint in generate("--model", model, "--prompt", "x", code=2).stderr.decode()


def test_a_long_prefill_tells_how_far_it_is_but_not_in_the_middle_of_the_answer(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(original_max_position_embeddings=600, max_position_embeddings=2048)
    encode = load_tokenizer(folder).encode
    prompt = next(text for text in ("z" * n for n in range(598, 3000)) if len(encode(text)) == 598)
    command = ["-m", "phi4_mlx", "generate", "--model", str(folder), "--ignore-chat-template", "--prompt", prompt]
    shown = pexpect.spawn(
        sys.executable, [*command, "--max-tokens", "8"], cwd=str(ROOT), encoding="utf-8", timeout=60
    ).read()
    assert shown.startswith("\rreading 0 of 598 tokens ...\r") and shown.count("reading") == 1  # 600 are run again


def test_penalties_reach_the_model(model: str) -> None:
    options = ["--model", model, "--prompt", "hello", "--max-tokens", "20"]
    plain = generate(*options).stdout
    assert generate(*options, "--frequency-penalty", "50").stdout != plain
    assert generate(*options, "--repetition-penalty", "1").stdout == plain


def test_a_disk_that_is_full(model: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "phi4_mlx", "generate", "--model", model, "--prompt", "x"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == b"python -m phi4_mlx generate: No space left on device\n"


@pytest.mark.parametrize(("closed", "code"), [("<&-", 2), ("<&- --prompt x", 0), (">&- --prompt x", 0)])
def test_standard_streams_that_are_closed(closed: str, code: int, model: str) -> None:
    command = f'"{sys.executable}" -m phi4_mlx generate --model "{model}" --max-tokens 2 {closed}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr == ("" if code == 0 else done.stderr[: done.stderr.index("\n") + 1])
    assert "internal error" not in done.stderr


def test_an_answer_obeys_a_schema(model: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}')
    options = ["--model", model, "--schema", str(path), "--prompt", "hi", "--temp", "1", "--seed", "3"]
    assert json.loads(generate(*options).stdout)["colour"] in ("red", "blue")
    assert b"had not ended after --max-tokens 2" in generate(*options, "--max-tokens", "2", code=2).stderr
    assert b"brought to its end" not in generate(*options).stderr
    path.write_text('{"type": "string", "minLength": 3}')
    forced = generate(*options, "--max-tokens", "12")
    assert json.loads(forced.stdout) and b"brought to its end by --max-tokens 12" in forced.stderr
    assert b"--stop may end an answer" in generate(*options, "--stop", "x", code=2).stderr
    assert b"no.json cannot be read" in generate(*options, "--schema", "no.json", code=2).stderr


def test_debug_shows_where(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "generate", "--model", model, "--prompt", "", "--debug"],
        cwd=ROOT, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and b"Traceback" in done.stderr


def test_the_first_token_imports_nothing_heavy(model: str) -> None:
    code = (
        "import sys; from phi4_mlx.cli import main;"
        f"main(['generate', '--model', {model!r}, '--prompt', 'hi', '--max-tokens', '1', '--temp', '1']);"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "phi4_mlx" in loaded, done.stderr
    unwanted = {
        "mlx_lm", "transformers", "torch", "numpy", "huggingface_hub", "rich", "prompt_toolkit", "jinja2", "requests"
    }  # fmt: skip
    assert not loaded & unwanted
