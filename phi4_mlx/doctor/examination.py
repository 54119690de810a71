"""The whole examination: every step in a process of its own, so that a crash costs one check."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.doctor import report
from phi4_mlx.doctor.child import COMMAND, FULL_PRECISION, ChildDied, answers
from phi4_mlx.doctor.outcome import Outcome, failed
from phi4_mlx.doctor.redaction import redacted
from phi4_mlx.errors import RequestError
from phi4_mlx.models.safe import VARIABLE, switched_off


def examine(
    folder: Path | None, tell: Callable[[str], None], command: Sequence[str] = COMMAND
) -> report.Report:
    """Examines this machine.

    Args:
        folder: of a package of the user's to check too; None for the embedded ones alone.
        tell: called with each line of the report.
        command: of the processes that compute.

    Raises:
        RequestError: MLX does not start, the package cannot be loaded, or `PHI4_MLX_SAFE` has an unknown name.
    """
    switched_off()
    start = time.monotonic()
    order: dict[str, Any] = {"folder": None if folder is None else str(folder.absolute())}
    try:
        found = _joined(answers({**order, "work": "machine"}, {}, command))
    except ChildDied as died:
        raise RequestError(f"MLX does not start: {died}") from None
    machine, fits = found["machine"], found["fits"]
    head = report.check_head(machine["devices"])
    for line in (*report.machine_lines(machine), "", *report.fit_lines(fits), "", head):
        tell(line)
    checks = run_checks(order, found["ways_out"], lambda outcome: tell(report.check_line(outcome)), command)
    speed = _speed(order, tell, command)
    limits = report.not_compared(machine)
    paths, verdict = report.verdict(checks)
    for line in ("", *limits, *report.twin_lines(paths)):
        tell(line)
    return {
        "format": report.FORMAT, "machine": machine, "fits": fits, "checks": checks, "not_compared": limits,
        "speed": speed, "seconds": round(time.monotonic() - start, 1), "passed": all(each["passed"] for each in checks),
        "switch_off": paths, "verdict": verdict,
    }  # fmt: skip


def run_checks(
    order: Mapping[str, Any],
    ways_out: Mapping[str, Sequence[Sequence[str]]],
    tell: Callable[[Outcome], None],
    command: Sequence[str] = COMMAND,
) -> list[Outcome]:
    """Runs checks in one process, and in another one after each that kills it.

    Args:
        order: with the folder of the user's package.
        ways_out: by the name of each check in its order, what to switch off in turn if it fails.
        tell: called with each outcome.
        command: of the processes.
    """
    found: list[Outcome] = []
    left = [*ways_out]

    def add(outcome: Outcome) -> None:
        if outcome["error"] is not None:
            outcome["error"] = redacted(outcome["error"], _folder(order))
        left.remove(outcome["name"])
        found.append(outcome)
        tell(outcome)

    while left:
        try:
            for answer in answers({**order, "work": "checks", "names": left}, FULL_PRECISION, command):
                if "outcome" in answer:
                    add(answer["outcome"])
            if left:
                raise ChildDied("the process ended before this check")
        except ChildDied as died:
            if left:  # else it died after its last check
                begun = left[0]
                add(failed(begun, str(died), _survival(order, begun, ways_out[begun], command)))
    return found


def _folder(order: Mapping[str, Any]) -> Path | None:
    return None if order["folder"] is None else Path(order["folder"])


def _survival(
    order: Mapping[str, Any], name: str, ways_out: Sequence[Sequence[str]], command: Sequence[str]
) -> list[str]:
    """The fast paths without which a check lives and passes; empty if there are none."""
    for paths in ways_out:
        environment = {**FULL_PRECISION, VARIABLE: ",".join([*switched_off(), *paths])}
        try:
            ended = _joined(answers({**order, "work": "checks", "names": [name]}, environment, command))
        except ChildDied:
            continue
        if "outcome" in ended and ended["outcome"]["passed"]:
            return [*paths]
    return []


def _speed(order: Mapping[str, Any], tell: Callable[[str], None], command: Sequence[str]) -> list[Any]:
    """The speeds, up to one that died."""
    rows: list[Any] = []
    try:
        for answer in answers({**order, "work": "speed"}, {}, command):
            rows.append(answer["speed"])
    except ChildDied as died:
        tell(f"no more speeds: {died}")
    for line in ("", *report.speed_lines(rows)):
        tell(line)
    return rows


def _joined(parts: Any) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for part in parts:
        joined |= part
    return joined
