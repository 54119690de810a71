"""The pace of a pass over batches: how far it is, and the time that it still takes."""

from __future__ import annotations

Shown = tuple[float, float, float | None, float | None]
"""(batches done, seconds of the batch so far, of the whole batch, of all that is left); None for not known yet."""


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

    def shown(self, now: float) -> Shown:
        """The state of the pass, for a person."""
        part, to_milestone = self.done - int(self.done), self._at - self._batch_begin
        whole = self._batch_s if self._batch_s or not part else to_milestone / part
        done = min(self.done + (now - self._at) / whole, self._following) if whole else self.done
        spent = now - self._batch_begin
        batch_s = max(spent, to_milestone + (1 - part) * whole) if whole else None
        mean = (self._at - self._begin) / (self.done - self._first) if self.done > self._first else whole
        return done, spent, batch_s, None if mean is None else (self.total - done) * mean
