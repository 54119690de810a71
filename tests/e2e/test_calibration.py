"""`convert -q --q-calibration` as users run it: mistyped, on a full disk, killed; and what it writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import RequestError
from phi4_mlx.files.manifest import REPORT_FILE
from phi4_mlx.files.safetensors import TensorWriter, read_header
from tests.conftest import ROOT
from tests.kinds import WRITERS
from tests.packages import left_beside

Checkpoint = Callable[..., Path]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
CONVERT = [sys.executable, "-m", "phi4_mlx.convert"]
WORDS = ["sun", "rises", "over", "a", "small", "town", "where", "people", "bake", "bread", "by", "the", "river"]


def texts(path: Path, lines: int = 16) -> Path:
    rng = random.Random(5)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=20))}) + "\n" for _ in range(lines)))
    return path


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the measurement of KL cheap; commands in processes of their own are not affected."""
    monkeypatch.setattr("phi4_mlx.convert.calibrate.VARIANT_TOKENS", 256)


@pytest.fixture
def source(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("source", num_hidden_layers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return texts(tmp_path / "data.jsonl")


def calibrated(source: Path, out: Path, data: Path, **options: Any) -> None:
    convert(source, out, quantize=True, q_group_size=32, q_calibration=data, **options)


def hashes(out: Path) -> dict[str, str]:
    """The content of a package, apart from the times in its report."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == REPORT_FILE:
                report = json.loads(content)
                assert report.pop("seconds") >= 0 and report.pop("peak_bytes") > 0
                content = json.dumps(report).encode()
            found[path.relative_to(out).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


# --- bad input ---

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "budget too small": (["--q-bpw", "1.9"], "from 2 to 16"),
    "budget too large": (["--q-bpw", "16.5"], "from 2 to 16"),
    "budget is no number": (["--q-bpw", "nan"], "from 2 to 16"),
    "budget below 3 bits": (["--q-bpw", "2.5"], "--q-bpw 4 or more"),
    "both budgets": (["--q-bpw", "4.5", "--q-bits", "4"], "leave one of them out"),
    "another mode": (["--q-mode", "mxfp4"], "affine"),
}


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (Path.unlink, "is neither a folder, nor a file"),
    "empty": (lambda path: path.write_bytes(b""), "data.jsonl"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), "data.jsonl"),
    "another format": (lambda path: path.write_text('{"question": "a", "answer": "b"}\n' * 50), "data.jsonl"),
    "not JSON Lines": (lambda path: path.write_text("some words\n" * 50), "data.jsonl"),
    "one bad line": (lambda path: path.write_text(path.read_text() + "{\n"), "data.jsonl:17"),
    "999 tokens or so": (lambda path: texts(path, 10), "at least 1,000"),
    "a pipe": (_pipe, "data.jsonl"),
}


def run(source: Path, out: Path, *options: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [*CONVERT, "--hf-path", str(source), "--mlx-path", str(out), *options]
    return subprocess.run(
        command, cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, **keywords
    )


def test_a_mistake_on_the_command_line_is_one_line(source: Path, data: Path, tmp_path: Path) -> None:
    quantised = ["-q", "--q-group-size", "32", "--q-calibration", str(data)]
    cases = {name: ([*quantised, *options], reason) for name, (options, reason) in BAD_OPTIONS.items()}
    cases["another mode"] = (["-q", "--q-calibration", str(data), "--q-mode", "mxfp4"], "affine")
    cases["no -q"] = (["--q-calibration", str(data)], "does nothing without -q")
    cases["no data"] = (["-q", "--q-bpw", "4.5"], "--q-calibration")
    for name, (options, reason) in cases.items():
        done = run(source, tmp_path / "out", *options)
        assert done.returncode == 2, (name, done.stderr)
        assert done.stderr.count("\n") == 1 and reason in done.stderr, (name, done.stderr)
        assert done.stdout == "" and left_beside(tmp_path / "out") == [], name


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_in_one_line(case: str, source: Path, data: Path, tmp_path: Path) -> None:
    damage, reason = BAD_DATA[case]
    damage(data)
    with pytest.raises(RequestError, match=reason) as caught:
        calibrated(source, tmp_path / "out", data)
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path / "out") == []


def test_a_quantised_source_is_refused_unless_it_is_dequantised(source: Path, data: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "four", quantize=True, q_group_size=32)
    with pytest.raises(RequestError, match="is quantised already"):
        calibrated(tmp_path / "four", tmp_path / "out", data)
    assert left_beside(tmp_path / "out") == []
    calibrated(tmp_path / "four", tmp_path / "out", data, dequantize=True)
    load(tmp_path / "out", verify=True)


# --- other kinds ---


def test_a_hybrid_stays_within_the_bytes_of_plain_four_bits_and_keeps_the_same_tensors(
    data: Path, tmp_path: Path
) -> None:
    source = WRITERS["phi4flash"](tmp_path / "source")
    convert(source, tmp_path / "plain", quantize=True, q_group_size=32)
    calibrated(source, tmp_path / "out", data)
    load(tmp_path / "out", verify=True)
    sizes = [sum(each.stat().st_size for each in (tmp_path / name).glob("*.safetensors")) for name in ("out", "plain")]
    assert sizes[0] <= sizes[1]
    headers = [read_header(tmp_path / name / "model.safetensors") for name in ("out", "plain")]
    assert headers[0].keys() == headers[1].keys()  # x_proj and the like stay dense
    chosen = json.loads((tmp_path / "out" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["bits_per_weight"] <= report["budget_bits_per_weight"] == 5
    assert report["kl_nats_per_token"]["measured"] > 0
    assert len({each["bits"] for each in report["matrices"].values()}) > 1
    bits = {path: chosen["quantization"].get(path, chosen["quantization"])["bits"] for path in report["matrices"]}
    assert bits == {path: each["bits"] for path, each in report["matrices"].items()}
    assert (tmp_path / "out" / "README.md").read_text().count("## Calibration") == 1
    assert left_beside(tmp_path / "out") == ["out"]


def divergence(folder: Path, base: Path, ids: mx.array, adapter: str | None) -> float:
    """KL of a package from its base, in nats per token."""
    logs = []
    for each in (base, folder):
        model, _ = load(each)
        cache = model.make_cache()
        cache.adapter = adapter
        logits = model(ids, cache=cache)
        logs.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean().item())


def test_a_multimodal_model_is_closer_with_its_adapters_off_and_on(data: Path, tmp_path: Path) -> None:
    source = WRITERS["phi4mm"](tmp_path / "source")
    convert(source, tmp_path / "plain", quantize=True, q_group_size=32, adapter_bits=16)
    calibrated(source, tmp_path / "out", data, adapter_bits=16)
    _, tokenizer = load(source)
    ids = mx.array([tokenizer.encode("a town where bread rises over the small river by people bake sun " * 6)])
    for adapter in (None, "vision", "speech"):
        plain, ours = (divergence(tmp_path / name, source, ids, adapter) for name in ("plain", "out"))
        assert 0 < ours < plain, (adapter, ours, plain)


# --- killed, and on a full disk ---

KILL_AT = """
import os, signal, sys
from phi4_mlx.convert.__main__ import main
from phi4_mlx.files.safetensors import TensorWriter, read_header
from pathlib import Path
steps = 0
def counted(function):
    def call(*args, **options):
        global steps
        steps += 1
        if steps == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
TensorWriter.append, TensorWriter.close = counted(TensorWriter.append), counted(TensorWriter.close)
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
assert main(sys.argv[2:]) == 0
print(steps)
"""


@pytest.mark.slow
def test_killed_at_any_step_the_rerun_goes_on_and_writes_the_same_bytes(
    source: Path, data: Path, tmp_path: Path
) -> None:
    options = ["-q", "--q-group-size", "32", "--q-calibration", str(data), "--hf-path", str(source), "--mlx-path"]

    def killed(at: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILL_AT, str(at), *options, str(out)]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)

    whole = killed(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "bits per weight, KL 0.0" in whole.stdout and "quantization.png\n" in whole.stdout
    steps, expected, out = int(whole.stdout.split()[-1]), hashes(tmp_path / "whole"), tmp_path / "out"
    rng = random.Random(3)
    for at in sorted(rng.sample(range(1, steps), 3)):
        assert killed(at, out).returncode == -signal.SIGKILL
        assert not out.exists()
        done = killed(0, out)
        assert done.returncode == 0, done.stderr
        assert hashes(out) == expected, f"killed at {at} of {steps}"
        assert left_beside(out) == ["out"]
        shutil.rmtree(out)


def test_too_little_room_is_reported_before_any_work(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match=r"1\.00 KB free and the calibration needs \d+ KB for a while"):
        calibrated(source, tmp_path / "out", data)
    assert left_beside(tmp_path / "out") == []


def test_a_disk_that_fills_up_leaves_the_work_to_go_on_from(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(source, tmp_path / "whole", data)
    expected, out, writes, full = hashes(tmp_path / "whole"), tmp_path / "out", 0, 0
    original = TensorWriter.append

    def append(self: TensorWriter, *args: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args)

    monkeypatch.setattr(TensorWriter, "append", append)
    calibrated(source, out, data)
    total = writes
    for full in (total // 3, total - 2):
        shutil.rmtree(out, ignore_errors=True)
        writes = 0
        with pytest.raises(RequestError, match="No space left on device") as caught:
            calibrated(source, out, data)
        assert "\n" not in str(caught.value) and not out.exists()
        if full < total // 2:
            assert str(caught.value).endswith("it is kept, and the same command goes on from there")
        first, writes = writes, total
        calibrated(source, out, data)
        assert hashes(out) == expected and first + (writes - total) >= total
        assert full < total // 2 or writes - total < total, "the second run began from the start"
        assert left_beside(out) == ["out"]
