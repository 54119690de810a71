"""`python -m phi4_mlx doctor` on this machine."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, write_tiny_checkpoint

KEYS = ["format", "machine", "fits", "checks", "not_compared", "speed", "seconds", "passed", "switch_off", "verdict"]
CHECK_KEYS = ["name", "passed", "devices", "twins", "tolerance", "why", "error", "switch_off"]
MACHINE_KEYS = ["versions", "chip", "devices", "memory_bytes", "limit_bytes", "wired_limit_mb", "switched_off"]
VERSIONS = ["phi4_mlx", "mlx", "mlx-lm", "python", "system", "architecture"]
FIT_KEYS, SPEED_KEYS = ["model", "weights_bytes", "context", "longest"], ["name", "value", "unit", "share"]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "doctor", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_report_has_a_stable_form_and_names_nobody(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "secret-name")
    done = run("--json", "--model", str(folder), PHI4_MLX_SAFE="wired")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [*report] == KEYS and report["format"] == 1
    assert [*report["machine"]] == MACHINE_KEYS and [*report["machine"]["versions"]] == VERSIONS
    assert all([*each] == CHECK_KEYS for each in report["checks"])
    assert all([*each] == FIT_KEYS for each in report["fits"])
    assert all([*each] == SPEED_KEYS for each in report["speed"]) and len(report["speed"]) == 5
    assert report["passed"] and report["switch_off"] == []
    assert any(each["name"].startswith("--model: ") for each in report["checks"])
    assert report["fits"][-1]["model"] == "--model"
    assert any("wired" in line for line in report["not_compared"])
    for secret in (str(Path.home()), str(ROOT), str(tmp_path), "secret-name", platform.node(), "/"):
        assert secret not in done.stdout.replace("GB/s", "").replace("tokens/s", ""), secret
    assert f'"{getpass.getuser()}"' not in done.stdout


def test_a_line_a_check_and_the_verdict_last() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    checks = [line for line in lines if line.startswith("ok ")]
    assert lines[-1] == f"all {len(checks)} checks passed"
    assert len(checks) > 40 and not done.stderr


def test_a_chat_says_what_is_off_and_answers_the_same() -> None:
    chat = [sys.executable, "-m", "phi4_mlx.chat", "--model", "demo", "--prompt", "hi"]
    plain, safe = (
        subprocess.run(chat, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
        for environment in ({}, {"PHI4_MLX_SAFE": "rope,compiled,chunks,buffers"})
    )
    assert safe.stdout == plain.stdout and plain.returncode == safe.returncode == 0
    notice = "PHI4_MLX_SAFE=buffers,chunks,compiled,rope: slower, with the same results"
    assert notice in safe.stderr and "PHI4_MLX_SAFE" not in plain.stderr


def test_an_unknown_path_is_refused_by_every_command() -> None:
    command = [sys.executable, "-m", "phi4_mlx", "generate", "--model", "demo", "--prompt", "hi"]
    environment = {**os.environ, "PHI4_MLX_SAFE": "ropes"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert "'ropes'" in done.stderr and "did you mean rope?" in done.stderr and done.stderr.count("\n") == 1
