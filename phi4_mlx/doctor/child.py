"""The process that computes, seen from the one that reports: its answers, and the reason for its end if it dies."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError

SILENT_S = 600.0  # after which a process counts as hung
EXIT_S = 30.0  # after the last result

COMMAND = (sys.executable, "-m", "phi4_mlx.doctor.worker")

# Products in full precision, so that rounding is as small as the tolerances assume; MLX's default rounds the operands
# of float32 products to TF32 on GPUs that have it. Source: "Environment variables" in MLX's documentation.
FULL_PRECISION = {"MLX_ENABLE_TF32": "0"}


class ChildDied(Exception):
    """The process ended before its work was done, or hung; the text is the reason."""


def answers(
    order: Mapping[str, Any], environment: Mapping[str, str], command: Sequence[str] = COMMAND
) -> Iterator[dict[str, Any]]:
    """Gives an order to a new process and yields its answers.

    Args:
        order: as `phi4_mlx.doctor.worker` reads it.
        environment: variables that the process has beside those of this one.
        command: of the process.

    Raises:
        RequestError: the process says that the user has made a mistake.
        ChildDied: it ended by a signal or with an error, or was silent for `SILENT_S` or did not end, and is killed.
    """
    # The package's own folder comes first, so that a file in the current one cannot stand in for a module.
    path = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": path, **environment},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin as orders:
                orders.write((json.dumps(order) + "\n").encode())
            for line in _lines(process.stdout.fileno()):
                answer = json.loads(line)
                if "mistake" in answer:
                    raise RequestError(answer["mistake"])
                yield answer
            if code := _exit_code(process):
                errors.seek(0)
                raise ChildDied(f"{_ending(code)}{_last_line(errors.read())}")
        except BrokenPipeError:
            raise ChildDied(_ending(_exit_code(process))) from None
        finally:
            process.kill()  # without effect if it has ended by itself
            process.stdout.close()
            process.wait()


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has closed its pipe; raises ChildDied if it does not end."""
    try:
        return process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        raise ChildDied(f"the process did not end within {EXIT_S:g} s of its last result") from None


def _lines(descriptor: int) -> Iterator[bytes]:
    """The lines of a pipe; raises ChildDied if none comes for too long."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        heard = time.monotonic()
        while True:
            if not selector.select(max(0.0, heard + SILENT_S - time.monotonic())):
                raise ChildDied(f"no result for {SILENT_S:.0f} s")
            data = os.read(descriptor, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            heard = time.monotonic()
            yield from lines


def _ending(code: int) -> str:
    if code < 0:
        try:
            return f"the process died by {signal.Signals(-code).name}"
        except ValueError:
            return f"the process died by signal {-code}"
    return f"the process ended with {code}"


def _last_line(text: bytes) -> str:
    """The last line that a process wrote to standard error, behind a colon."""
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""
