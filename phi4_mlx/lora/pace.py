"""The pace of a pass over batches: how far it is, and the time that it still takes."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """The state of a pass; None for a time that is not known yet.

    Attributes:
        done: batches, with the part of the one under way.
        spent_s: seconds that the batch under way has taken.
        batch_s: seconds that it will have taken.
        left_s: seconds to the end of the pass.
    """

    done: float
    spent_s: float
    batch_s: float | None
    left_s: float | None


class Pace:
    """Estimates from the milestones of a pass; between two of them, progress moves at the estimated speed.

    Args:
        done: batches that were done before.
        total: batches in all, with those.
        batch_s: seconds that a batch is expected to take; None for not known.
        now: seconds on a monotonic clock.
    """

    def __init__(self, done: float, total: int, batch_s: float | None, now: float) -> None:
        self.done, self.total = done, total
        self._first, self._begin = done, now
        self._batch_begin = self._at = now
        self._batch_s = batch_s  # of the batch before, once there is one
        self._following = done

    def reach(self, done: float, following: float, now: float) -> None:
        """Notes a milestone; see `Tick`."""
        if int(done) > int(self.done):
            self._batch_s = now - self._batch_begin
        if done == int(done):
            self._batch_begin = now
        self.done, self._following, self._at = done, following, now

    def estimate(self, now: float) -> Estimate:
        """The state of the pass at a time between two milestones."""
        part, to_milestone = self.done - int(self.done), self._at - self._batch_begin
        whole = self._batch_s if self._batch_s or not part else to_milestone / part
        done = min(self.done + (now - self._at) / whole, self._following) if whole else self.done
        spent = now - self._batch_begin
        batch_s = max(spent, to_milestone + (1 - part) * whole) if whole else None
        mean = (self._at - self._begin) / (self.done - self._first) if self.done > self._first else whole
        return Estimate(done, spent, batch_s, None if mean is None else (self.total - done) * mean)
