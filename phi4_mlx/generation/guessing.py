"""Guesses of rows that share a forward pass: the number of columns follows from their chances and the pass's time.

A pass is a rectangle: it computes as many columns for a row without a guess as for the row with the most. So rows
choose a width together, by the tokens a second that all of them can expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from phi4_mlx.generation.row_group import RowPass
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.generation.speculate import MAX_GUESSES, Pace
from phi4_mlx.models.batch_cache import BatchCache

MAX_CELLS = 256  # rows times columns of a pass with guesses: logits of a few hundred MB at most
READ_AHEAD = 512  # tokens that one draft model reads between two passes


class Guessing:
    """The guesses of a batch, what they cost and what came of them.

    Args:
        timed: measure how long passes take, and guess where it pays; see `Pace`.
        clock: seconds.

    Attributes:
        passes: decode passes so far.
        guessed: tokens guessed in them.
        held: guessed tokens that were drawn.
        failures: proposers given up for an exception.
    """

    def __init__(self, timed: bool = True, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.passes = self.guessed = self.held = self.failures = 0
        self._timed = timed
        self._paces: dict[int, Pace] = {}  # by the magnitude of the number of rows

    def chunks(self, members: Sequence[BatchSequence], cache: BatchCache) -> list[list[int]]:
        """The ids that each row runs next: what its cache lacks, then guesses, and one alone where guesses do not pay.

        Args:
            members: the sequence of each row.
            cache: their rows.
        """
        unread = [member.ids[length:] for member, length in zip(members, cache.lengths, strict=True)]
        chances = self._chances(members, cache)
        width = 1
        if any(chances):
            gains = [[1.0] * (len(ids) - 1) + chance for ids, chance in zip(unread, chances, strict=True)]
            width += self._further(gains, min(MAX_GUESSES, MAX_CELLS // len(members) - 1))
        return [
            [*ids, *self._guesses(member, min(len(chance), width - len(ids)))][:width]
            for member, ids, chance in zip(members, unread, chances, strict=True)
        ]

    def took(self, forward: RowPass, seconds: float) -> None:
        """Records a pass and the time of it, guessing and drawing included."""
        self.passes += 1
        self.guessed += forward.guessed
        self.held += forward.held
        self._pace(len(forward.chunks)).took(forward.width, seconds)

    def gauges(self) -> dict[str, float]:
        """Its counts by metric name."""
        return {
            "passes_total": self.passes,
            "guessed_tokens_total": self.guessed,
            "held_tokens_total": self.held,
            "guess_failures_total": self.failures,
        }

    def _further(self, gains: list[list[float]], most: int) -> int:
        """Columns beside the first: the best for all rows by measured times, else for the row that wants the most."""
        pace = self._pace(len(gains))
        if self._timed:
            return pace.further(gains, most) if pace.known else 0
        return max(pace.further([gain], most) for gain in gains)

    def _pace(self, rows: int) -> Pace:
        return self._paces.setdefault(rows.bit_length(), Pace(self._timed))

    def _chances(self, members: Sequence[BatchSequence], cache: BatchCache) -> list[list[float]]:
        """For each row, the chance of its first guess to hold, of its first two, and so on; empty if it guesses none.

        Of the draft models that have a prompt to read, one reads a part of it.
        """
        found, reading = [], False
        for member in members:
            chance, room = 0.0, _room(member, cache)
            if room > 0 and member.proposer is not None:
                try:
                    member.inform()
                    if member.proposer.read(0 if reading else READ_AHEAD):
                        chance = member.proposer.chance
                    else:
                        reading = True
                except Exception:
                    self._give_up(member)
            found.append([chance**n for n in range(1, room + 1)] if chance else [])
        return found

    def _guesses(self, member: BatchSequence, most: int) -> list[int]:
        if member.proposer is None or most <= 0:
            return []
        try:
            return member.guesses(most)
        except Exception:
            self._give_up(member)
            return []

    def _give_up(self, member: BatchSequence) -> None:
        """Continues a row without its proposer: an answer does not depend on guesses."""
        member.proposer = None
        self.failures += 1


def _room(member: BatchSequence, cache: BatchCache) -> int:
    """The most guesses for a row: none past its last token or past the RoPE boundary."""
    if not cache.rewindable:
        return 0
    room = min(MAX_GUESSES, member.max_tokens - member.drawn - 1)
    boundary = member.model.boundary
    return room if boundary is None or cache.regime == "long" else min(room, boundary - len(member.ids))
