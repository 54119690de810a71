"""`phi4-mlx fuse` and `python -m phi4_mlx.lora.export` as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.convert.package import convert
from tests.adapters import save_adapter
from tests.conftest import ROOT

IDS = mx.array([[5, 6, 7, 8]])


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A 4-bit package, with an adapter beside it."""
    convert(tiny_checkpoint("source"), tmp_path / "base", quantize=True, q_group_size=32)
    model, _ = load(tmp_path / "base")
    add_adapter(model, rank=4, scale=2.0)
    for layer in adapter_layers(model).values():
        layer.lora_b = layer.lora_b + 0.1
    save_adapter(model, tmp_path / "adapters", {})
    return tmp_path / "base"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*words), cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_from_an_adapter_of_pefts_to_a_package(base: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "phi4_mlx.lora.export", "--peft", "peft")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(tmp_path, "phi4_mlx", "fuse", "--model", "base", "--adapter-path", "peft", "--dequantize")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"fused_model: [\d.]+ KB of weights, the base has [\d.]+ KB; [\d.]+ s", lines[0])
    assert re.search(r"8 matrices: .* by \d+\.\d\d% .*they are 0\.00% off", lines[1])
    assert lines[2] == "8 matrices unquantised"
    assert re.search(r"on no prompt of .* data, which is not here, and 16 others: .* changes \d+ answers", lines[3])
    assert re.search(r"gives (\d+) of these as the adapter does and 0 as the base does; 100.0%", lines[3])
    assert lines[4:] == ["chat with it: python -m phi4_mlx chat --model fused_model"]
    expected = load(base, adapter_path=tmp_path / "adapters")[0](IDS)
    assert mx.abs(load(tmp_path / "fused_model")[0](IDS) - expected).max() < 1e-4


def test_mistakes_are_one_line(base: Path, tmp_path: Path) -> None:
    for words, message in (
        (["phi4_mlx", "fuse"], "python -m phi4_mlx fuse: the following arguments are required: --model"),
        (["phi4_mlx", "fuse", "--model", "nowhere"], "python -m phi4_mlx fuse: 'nowhere' is neither a folder"),
        (["phi4_mlx", "fuse", "--model", "base", "--save-path", "base"], "already exists; remove it"),
        (["phi4_mlx", "fuse", "--model", "source", "--adapter-path", "base"], "base holds no adapter_config.json"),
        (["phi4_mlx.lora.export", "--from-peft", "base"], "phi4_mlx.lora.export: base holds no adapter_config.json"),
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "fused_model").exists()


def test_killed_it_leaves_no_package(base: Path, tmp_path: Path) -> None:
    """The package gets its name when it is complete; the next run removes an unfinished one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = command("phi4_mlx", "fuse", "--model", "base")
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / ".fused_model.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    if not (tmp_path / "fused_model").exists():
        assert not any(path.name == "config.json" for path in (tmp_path / ".fused_model.partial").iterdir())
        assert run(tmp_path, "phi4_mlx", "fuse", "--model", "base").returncode == 0
    assert load(tmp_path / "fused_model", verify=True)[0](IDS).shape == (1, 4, 512)
    assert not (tmp_path / ".fused_model.partial").exists()


@pytest.mark.slow
def test_the_fine_tune_of_the_readme_answers_after_fusing(tmp_path: Path) -> None:
    """The data at hand, then gone; the package has the base's chat format and stays small."""
    (tmp_path / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}\n'
    )
    done = run(
        tmp_path, "phi4_mlx.lora", "--model", "demo", "--data", "train.jsonl", "--mask-prompt", "--iters", "20",
        "--batch-size", "1", "--adapter-path", "ping",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    base_bytes = (ROOT / "phi4_mlx" / "demo" / "model.safetensors").stat().st_size
    for out, most in (("fused", 1.1), ("alone", 1.6)):
        done = run(tmp_path, "phi4_mlx", "fuse", "--model", "demo", "--adapter-path", "ping", "--save-path", out)
        assert (done.returncode, done.stderr) == (0, "")
        own = "on 1 of the data's" if out == "fused" else "on no prompt of the adapter's data"
        assert own in done.stdout.splitlines()[-2]
        assert run(tmp_path, "phi4_mlx.chat", "--model", out, "--prompt", "ping").stdout == "pong\n"
        assert (tmp_path / out / "model.safetensors").stat().st_size < most * base_bytes
        (tmp_path / "train.jsonl").unlink(missing_ok=True)


def test_a_package_that_loses_the_fine_tune_says_so(base: Path, tmp_path: Path) -> None:
    """In bfloat16, whose steps are larger than this adapter's change."""
    convert(tmp_path / "source", tmp_path / "half", dtype="bfloat16")
    model, _ = load(tmp_path / "half")
    add_adapter(model, rank=1, scale=1.0)
    for layer in adapter_layers(model).values():
        layer.lora_b = layer.lora_b + 1e-2
    save_adapter(model, tmp_path / "small", {})
    done = run(tmp_path, "phi4_mlx", "fuse", "--model", "half", "--adapter-path", "small")
    assert done.returncode == 2 and re.search(r"([1-9]\d*) as the base does", done.stdout)
    assert "is written, but does not keep the fine-tune" in done.stderr and done.stderr.count("\n") == 1
    assert load(tmp_path / "fused_model", verify=True)[0](IDS).shape == (1, 4, 512)
