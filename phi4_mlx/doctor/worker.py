"""The child process that computes, `python -m phi4_mlx.doctor.worker`: an order comes in, a line a result goes out.

A crash of native code ends this process alone. The check that died is the first one without an outcome.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from phi4_mlx.errors import Phi4Error


def main() -> int:
    """Reads the order, a JSON object, and writes the results; returns the exit code."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print, native ones too, is no result
        order = json.loads(sys.stdin.readline())
        work = {"machine": machine, "checks": checks, "speed": speed}[order["work"]]
        try:
            for answer in work(order):
                write(answers, answer)
        except Phi4Error as mistake:
            write(answers, {"mistake": str(mistake)})
    return 0


def write(answers: TextIO, answer: dict[str, Any]) -> None:
    """Writes a result at once."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def checks(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs the checks of these names, in the order of all checks."""
    from phi4_mlx.doctor.check import run_check
    from phi4_mlx.doctor.checks import all_checks
    from phi4_mlx.doctor.devices import devices

    wanted, found = {*order["names"]}, devices()
    for check in all_checks(_folder(order)):
        if check.name in wanted:
            yield {"outcome": run_check(check, found)}


def machine(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The facts of this machine, the models that fit, and for each check what to switch off in turn if it fails."""
    from phi4_mlx.doctor.check import ways_out
    from phi4_mlx.doctor.checks import all_checks
    from phi4_mlx.doctor.machine import about, fits

    yield {"machine": about()}
    yield {"fits": fits(_folder(order))}
    yield {"ways_out": {check.name: [*ways_out(check)] for check in all_checks(_folder(order))}}


def speed(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The speed of this machine."""
    from phi4_mlx.doctor.speed import speeds

    for row in speeds():
        yield {"speed": row}


def _folder(order: dict[str, Any]) -> Path | None:
    return None if order["folder"] is None else Path(order["folder"])


if __name__ == "__main__":
    sys.exit(main())
