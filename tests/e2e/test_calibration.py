"""`convert -q --q-calibration` as users run it: mistyped, on a full disk, killed; and for every kind of model."""

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
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import RequestError
from phi4_mlx.files.manifest import REPORT_FILE
from phi4_mlx.files.safetensors import TensorWriter
from tests.conftest import ROOT
from tests.kinds import WRITERS
from tests.packages import left_beside

Checkpoint = Callable[..., Path]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
CONVERT = [sys.executable, "-m", "phi4_mlx.convert"]
WORDS = ["sun", "rises", "over", "a", "small", "town", "where", "people", "bake", "bread", "by", "the", "river"]


def texts(path: Path, lines: int = 60) -> Path:
    rng = random.Random(5)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(WORDS, k=20))}) + "\n" for _ in range(lines)))
    return path


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
BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (Path.unlink, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "data.jsonl"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), "data.jsonl"),
    "another format": (lambda path: path.write_text('{"question": "a", "answer": "b"}\n' * 50), "data.jsonl"),
    "not JSON Lines": (lambda path: path.write_text("some words\n" * 50), "data.jsonl"),
    "one bad line": (lambda path: path.write_text(path.read_text() + "{\n"), "data.jsonl:61"),
    "999 tokens or so": (lambda path: texts(path, 10), "at least 1,000"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "data.jsonl"),
}


def run(source: Path, out: Path, *options: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [*CONVERT, "--hf-path", str(source), "--mlx-path", str(out), *options]
    return subprocess.run(
        command, cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **keywords
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


def test_inputs_that_are_not_finite_name_the_matrix(source: Path, data: Path, tmp_path: Path) -> None:
    weights = dict(mx.load(str(source / "model.safetensors")))
    weights["model.layers.0.mlp.gate_up_proj.weight"] *= 1e20
    mx.eval(weights)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(RequestError, match=r"model\.layers\.0\.mlp\.down_proj.*NaN or infinity"):
        calibrated(source, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_a_quantised_source_is_refused_unless_it_is_dequantised(source: Path, data: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "four", quantize=True, q_group_size=32)
    with pytest.raises(RequestError, match="is quantised already"):
        calibrated(tmp_path / "four", tmp_path / "out", data)
    assert left_beside(tmp_path / "out") == []
    calibrated(tmp_path / "four", tmp_path / "out", data, dequantize=True)
    load(tmp_path / "out", verify=True)


# --- every kind ---


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_is_calibrated_within_the_bytes_of_plain_four_bits(kind: str, data: Path, tmp_path: Path) -> None:
    source = WRITERS[kind](tmp_path / "source")
    convert(source, tmp_path / "plain", quantize=True, q_group_size=32)
    calibrated(source, tmp_path / "out", data)
    load(tmp_path / "out", verify=True)
    sizes = [sum(each.stat().st_size for each in (tmp_path / name).glob("*.safetensors")) for name in ("out", "plain")]
    assert sizes[0] <= sizes[1]
    plain, chosen = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "out"))
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["bits_per_weight"] <= report["budget_bits_per_weight"] == 5
    assert report["kl_nats_per_token"]["measured"] > 0
    assert len({each["bits"] for each in report["matrices"].values()}) > 1
    bits = {path: chosen["quantization"].get(path, chosen["quantization"])["bits"] for path in report["matrices"]}
    assert bits == {path: each["bits"] for path, each in report["matrices"].items()}
    towers = {path for path, each in plain["quantization"].items() if isinstance(each, dict)}
    assert towers - report["matrices"].keys() <= chosen["quantization"].keys()
    assert (tmp_path / "out" / "README.md").read_text().count("## Calibration") == 1
    assert left_beside(tmp_path / "out") == ["out"]


# --- killed, and on a full disk ---

KILL_AT = """
import os, signal, sys
from phi4_mlx.convert.__main__ import main
from phi4_mlx.files.safetensors import TensorWriter
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
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)

    whole = killed(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    steps, expected, out = int(whole.stdout.split()[-1]), hashes(tmp_path / "whole"), tmp_path / "out"
    rng = random.Random(3)
    for at in sorted(rng.sample(range(1, steps), 6)):
        assert killed(at, out).returncode == -signal.SIGKILL
        assert not out.exists()
        done = killed(0, out)
        assert done.returncode == 0, done.stderr
        assert hashes(out) == expected, f"killed at {at} of {steps}"
        assert left_beside(out) == ["out"]
        shutil.rmtree(out)


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
    for full in (1, total // 3, 2 * total // 3, total - 2):
        shutil.rmtree(out, ignore_errors=True)
        writes = 0
        with pytest.raises(RequestError, match="No space left on device") as caught:
            calibrated(source, out, data)
        assert "\n" not in str(caught.value) and not out.exists()
        first, writes = writes, total
        calibrated(source, out, data)
        assert hashes(out) == expected and first + (writes - total) >= total
        assert full < total // 2 or writes - total < total, "the second run began from the start"
        assert left_beside(out) == ["out"]
