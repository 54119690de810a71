"""Chunks of the prompts of a batch: running one, and the size that a stated latency allows."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from phi4_mlx.generation.draws import wanted
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.generation.steps import chunk_ends, finish_chunk
from phi4_mlx.models.split_logits import Logits
from phi4_mlx.tokens.prompt import places_of

SNAPSHOTS_APART = 32  # tokens; a nearer snapshot saves less time than the additional forward pass takes
LEAST_CHUNK = 16  # tokens; a smaller one takes as long
DECAY = 0.7  # weight of past measurements at the next one


class ChunkPace:
    """The size of prefill chunks with which a step keeps a stated limit.

    A token's time is measured with all that a chunk costs, so that the size settles where a step takes the limit.

    Args:
        limit_s: for a step: the decode passes and the chunks after them.
        clock: seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.perf_counter):
        self.limit_s, self._clock = limit_s, clock
        self._token_s: float | None = None
        self._began = self._chunk_began = 0.0

    def begin(self) -> None:
        """Starts a step."""
        self._began = self._clock()

    def size(self, most: int) -> int:
        """Starts a chunk; returns its size, `LEAST_CHUNK` to `most` tokens. The first one is small."""
        self._chunk_began = self._clock()
        left_s = self.limit_s - (self._chunk_began - self._began)
        fits = LEAST_CHUNK if self._token_s is None else int(left_s / max(self._token_s, 1e-9))
        return max(1, min(most, max(LEAST_CHUNK, fits)))

    def took(self, tokens: int, room: int) -> int:
        """Ends a chunk; returns the tokens that the step may still prefill: those of `room`, or 0 at the limit."""
        now = self._clock()
        token_s = (now - self._chunk_began) / tokens
        self._token_s = token_s if self._token_s is None else DECAY * self._token_s + (1 - DECAY) * token_s
        left_s = self.limit_s - (now - self._began)
        return room if left_s >= LEAST_CHUNK * self._token_s else 0


def run_chunk(sequence: BatchSequence, room: int) -> tuple[int, Logits | None]:
    """Runs up to `room` ids that a sequence's cache lacks; returns their count, and logits [1, V] after the last id."""
    model, cache = sequence.model, sequence.cache
    if cache is None or cache.regime != sequence.regime:  # another RoPE table: nothing cached is of use
        cache = sequence.cache = sequence.new_cache()
        cache.adapter = sequence.adapter
        cache.admit(mx.array([sequence.ids]), places_of(sequence.ids))  # sets the RoPE table of the whole length
    rest, snapshots = len(sequence.ids) - cache.offset, cache.needs_snapshots
    size = chunk_ends(rest, room, 1, snapshots=snapshots)[0]
    if snapshots and SNAPSHOTS_APART <= sequence.last_turn - cache.offset < size:
        size = sequence.last_turn - cache.offset
    chunk = mx.array([sequence.ids[cache.offset : cache.offset + size]])
    hidden = model.hidden(chunk, cache, rows=1)
    if size < rest:
        finish_chunk(cache, snapshots)
        return size, None
    return size, model.candidates(hidden, *wanted([sequence.sampler]))
