"""The examination in child processes: crashes, hangs, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.commands import doctor
from phi4_mlx.doctor import child, report
from phi4_mlx.doctor.child import ChildDied, answers
from phi4_mlx.doctor.examination import run_checks
from phi4_mlx.doctor.outcome import Outcome
from phi4_mlx.doctor.redaction import MAX_CHARACTERS, redacted
from phi4_mlx.errors import RequestError

ORDER = {"folder": None}
ABORTING = "import os; os.abort()"


def worker(fault: str) -> list[str]:
    """The command of a worker with a fault in it."""
    return [
        sys.executable, "-c", f"import os, sys, mlx.core as mx\n{fault}\n"
        "from phi4_mlx.doctor.worker import main\nsys.exit(main())",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_crash_costs_one_check_and_names_the_way_out() -> None:
    told: list[Outcome] = []
    ways_out = {"norms, float32": [["norms"]], "rope, float32": [["norms"], ["rope"]], "attention, float32": []}
    command = worker("mx.fast.rope = lambda *a, **k: os.abort()")
    found = run_checks(ORDER, ways_out, told.append, command)
    assert found == told
    passed = {each["name"]: each["passed"] for each in found}
    assert passed == {"norms, float32": True, "rope, float32": False, "attention, float32": True}
    dead = next(each for each in found if not each["passed"])
    assert dead["switch_off"] == ["rope"]
    assert dead["error"] is not None and "died by SIGABRT" in dead["error"]
    assert "PHI4_MLX_SAFE=rope helps" in report.check_line(dead)


def test_a_crash_that_no_switch_helps_is_named() -> None:
    found = run_checks(ORDER, {"matrix product, float32": []}, lambda outcome: None, worker("os.abort()"))
    assert [each["name"] for each in found] == ["matrix product, float32"]
    assert report.verdict(found) == (
        [], "1 of 1 check failed; no switch helps matrix product, float32: report it with --json"
    )  # fmt: skip


def test_a_hanging_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "SILENT_S", 0.2)
    command = [sys.executable, "-c", "import time; print('{\"a\": 1}', flush=True); time.sleep(60)"]
    found = answers({}, {}, command)
    assert next(found) == {"a": 1}
    with pytest.raises(ChildDied, match="no result for 0 s"):
        next(found)


def test_a_process_that_hangs_at_its_exit_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "EXIT_S", 0.2)
    command = [sys.executable, "-c", "import os, time; os.write(1, b'{}\\n'); os.close(1); time.sleep(20)"]
    with pytest.raises(ChildDied, match=r"did not end within 0\.2 s"):
        list(answers({}, {}, command))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "died by SIGABRT"),
        ("import sys; sys.exit(3)", "ended with 3"),
        ("raise ValueError('no kernel')", "ended with 1: ValueError: no kernel"),
    ],
)
def test_the_end_of_a_process_is_explained(code: str, reason: str) -> None:
    with pytest.raises(ChildDied, match=reason):
        list(answers({}, {}, [sys.executable, "-c", code]))


def test_the_environment_reaches_the_process_and_stays_there() -> None:
    code = "import json, os; print(json.dumps(os.environ['MLX_ENABLE_TF32']))"
    assert list(answers({}, child.FULL_PRECISION, [sys.executable, "-c", code])) == ["0"]


OUTCOME: Outcome = {
    "name": "rope, float32", "passed": True, "devices": 1e-7, "twins": 2e-7, "tolerance": 1e-6, "why": "8 u",
    "error": None, "switch_off": [],
}  # fmt: skip


def test_the_verdict_unites_the_switches() -> None:
    wrong: list[Outcome] = [
        {**OUTCOME, "passed": False, "switch_off": ["rope"]},
        {**OUTCOME, "passed": False, "switch_off": ["blocks", "rope"]},
    ]
    assert report.verdict([OUTCOME, *wrong]) == (
        ["blocks", "rope"], "2 of 3 checks failed; switch off with PHI4_MLX_SAFE=blocks,rope"
    )  # fmt: skip
    assert report.verdict([OUTCOME]) == ([], "all 1 check passed")


def test_a_check_with_nothing_to_compare_is_not_called_passed() -> None:
    alone: Outcome = {**OUTCOME, "devices": None, "twins": None}
    assert report.check_line(alone).split()[0] == "-"
    assert report.verdict([OUTCOME, alone]) == ([], "all 1 check passed")


def test_lines_have_the_figures() -> None:
    assert report.check_line(OUTCOME).split() == ["ok", "rope,", "float32", "1.0e-07", "2.0e-07", "1.0e-06"]
    line = report.check_line({**OUTCOME, "passed": False, "error": "RuntimeError: no kernel"})
    assert line.endswith("no switch helps; RuntimeError: no kernel")


def test_one_device_is_said() -> None:
    machine: Any = {"devices": ["cpu"], "switched_off": ["rope"], "versions": {"system": "Linux 6.1"}}
    one, wired, off = report.not_compared(machine)
    assert "no GPU was compared" in one and "wired on macOS alone" in wired and "rope" in off
    mac = {"devices": ["cpu", "gpu"], "switched_off": [], "versions": {"system": "macOS 26.1"}}
    assert report.not_compared({**machine, **mac}) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open '/Users/ada/x.metallib' or ~/y or C:\\Users\\ada", "cannot open '(path)' or (path) or (path)"),
        ("/Users/ada lovelace/models/a b/config.json is damaged", "(path) is damaged"),
        ("/own models/the best/config.json is damaged", "(path) is damaged"),
        ("/own models/the best has no tokenizer", "(path) has no tokenizer"),
        ("~ada/x, /a: 3 GB/s", "(path), (path): 3 GB/s"),
        (f"{Path.home()}/x: no", "(path): no"),
        ("a" * 1000, "a" * MAX_CHARACTERS),
    ],
)
def test_errors_name_no_paths(text: str, shown: str) -> None:
    assert redacted(text, Path("/own models/the best")) == shown


@pytest.mark.parametrize("home", ["/", "/nonexistent", ""])
def test_any_home_is_redacted(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    assert redacted("/nonexistent/x: 3 GB/s") == "(path): 3 GB/s"


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("tell(0); tell(1)\nos.abort()", [True, True]),  # at its exit
        ("if len(names) == 2: tell(0)\nos.abort()", [True, False]),  # between two checks
        ("if len(names) == 2: tell(0)", [True, False]),
    ],
)
def test_no_check_is_lost_or_told_twice(code: str, passed: list[bool]) -> None:
    answers = [json.dumps({"outcome": {**OUTCOME, "name": name}}) for name in ("a", "b")]
    program = (
        "import json, os, sys\nnames = json.loads(sys.stdin.readline())['names']\n"
        f"def tell(n): print({answers!r}[n], flush=True)\n{code}"
    )
    found = run_checks(ORDER, {"a": [], "b": []}, lambda outcome: None, [sys.executable, "-c", program])
    assert [(each["name"], each["passed"]) for each in found] == [*zip(("a", "b"), passed, strict=True)]


def test_the_end_of_a_process_names_no_paths() -> None:
    command = [sys.executable, "-c", "raise OSError('/Users/ada/x.metallib: no such file')"]
    (found,) = run_checks(ORDER, {"a": []}, lambda outcome: None, command)
    assert found["error"] == "the process ended with 1: OSError: (path): no such file"


def test_what_native_code_prints_is_no_outcome() -> None:
    noise = "from phi4_mlx.doctor import check\nright = check.run_check\n"
    noise += "check.run_check = lambda *a: (os.write(1, b'noise\\n'), right(*a))[1]"
    (found,) = run_checks(ORDER, {"matrix product, float32": []}, lambda outcome: None, worker(noise))
    assert found["passed"]


def test_a_relative_folder_is_found_from_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi4_mlx.doctor.examination import examine

    monkeypatch.chdir(tmp_path)
    code = "import json, sys; raise ValueError(json.loads(sys.stdin.readline())['folder'])"
    with pytest.raises(RequestError, match=str(tmp_path / "mine")):
        examine(Path("mine"), lambda line: None, [sys.executable, "-c", code])


def test_an_unknown_switch_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phi4_mlx.models import safe

    monkeypatch.setattr(safe, "_off", None)
    monkeypatch.setenv("PHI4_MLX_SAFE", "compield")
    assert doctor.main([]) == 2
    message = capsys.readouterr().err
    assert "'compield'" in message and "did you mean compiled?" in message and message.count("\n") == 1


def test_a_package_that_cannot_be_loaded_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--model", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "config.json does not exist" in message and "MLX does not start" not in message


def test_a_machine_without_mlx_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from phi4_mlx.doctor.examination import examine

    command = [sys.executable, "-c", "raise ImportError('libmlx.so: no such file')"]
    with pytest.raises(RequestError, match=r"MLX does not start: .*libmlx\.so"):
        examine(None, lambda line: None, command)


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from phi4_mlx.doctor import examination

    def examine(folder: object, tell: object) -> dict[str, Any]:
        return {"passed": False, "verdict": "1 of 1 check failed"}

    monkeypatch.setattr(examination, "examine", examine)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out == "1 of 1 check failed\n"
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


TWO_DEVICES = """
import contextlib
from phi4_mlx.doctor import checks, devices, operations, speed
from phi4_mlx.doctor.devices import Device

@contextlib.contextmanager
def wrong_rope():
    right = mx.fast.rope
    mx.fast.rope = lambda *a, **k: 2 * right(*a, **k)
    try:
        yield
    finally:
        mx.fast.rope = right

both = [devices.devices()[0], Device("gpu", wrong_rope)]
devices.devices = lambda: both
few = [each for each in operations.operation_checks() if each.name in ("norms, float32", "rope, float32")]
checks.all_checks = lambda folder: few
speed.speeds = lambda: iter([{"name": "memory, read", "value": 2.0, "unit": "GB/s", "share": None}])
"""


@pytest.mark.slow
def test_a_gpu_that_is_wrong_is_reported_with_the_switch() -> None:
    from phi4_mlx.doctor.examination import examine

    lines: list[str] = []
    found = examine(None, lines.append, worker(TWO_DEVICES))
    assert [each["passed"] for each in found["checks"]] == [True, False]
    across, twins = found["checks"][1]["devices"], found["checks"][1]["twins"]
    assert across == pytest.approx(1.0, abs=0.01) and twins == pytest.approx(1.0, abs=0.01)
    assert found["verdict"] == "1 of 2 checks failed; switch off with PHI4_MLX_SAFE=rope"
    assert found["switch_off"] == ["rope"] and not found["passed"]
    assert not any("no GPU" in line for line in found["not_compared"])
    head = next(line for line in lines if line.endswith("allowed"))
    assert "gpu to cpu" in head
    assert next(line for line in lines if line.startswith("FAIL")).endswith("PHI4_MLX_SAFE=rope helps")
    assert any(line.startswith("rope: rotations as sines") for line in lines)
    assert any(line.startswith("memory, read") for line in lines)
