"""Constraints compiled in threads, so that running answers do not wait: llguidance releases the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from phi4_mlx.generation.options import LogitsMask
from phi4_mlx.server.engine.protocol import Job

THREADS = 2
IDLE_S = 0.02  # that an engine with nothing else to do waits for a constraint

Compiled = Callable[[], LogitsMask]  # returns the constraint, or raises the error of its compilation


class Compiling:
    """The jobs whose grammars are being compiled.

    Args:
        make: compiles the grammar of a job.
    """

    def __init__(self, make: Callable[[Job], LogitsMask]) -> None:
        self._make = make
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="constraints")
        self._running: dict[int, tuple[Job, Future[LogitsMask]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def add(self, job: Job) -> None:
        """Starts to compile the grammar of a job."""
        self._running[job.id] = job, self._threads.submit(self._make, job)

    def cancel(self, job: int) -> None:
        """Forgets a job, if it is here."""
        if job in self._running:
            self._running.pop(job)[1].cancel()

    def done(self, idle: bool) -> list[tuple[Job, Compiled]]:
        """Removes and returns the jobs that are compiled.

        Args:
            idle: waits a moment for one.
        """
        if idle and self._running:
            wait([future for _, future in self._running.values()], IDLE_S, FIRST_COMPLETED)
        found: list[tuple[Job, Compiled]]
        found = [(job, future.result) for job, future in self._running.values() if future.done()]
        for job, _ in found:
            del self._running[job.id]
        return found
