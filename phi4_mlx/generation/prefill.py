"""The prompts of a batch that are being read: whose turn it is, and the size of a chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import mlx.core as mx

from phi4_mlx.generation.draws import wanted
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.generation.steps import chunk_ends, finish_chunk
from phi4_mlx.models.prompt_cache import PromptCache
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
        took_s = now - self._chunk_began
        if self._token_s is None:
            self._token_s = took_s / tokens
        elif tokens < LEAST_CHUNK:  # the end of a prompt: its time a token says little of a longer chunk
            self._token_s = max(self._token_s, took_s / LEAST_CHUNK)
        else:
            self._token_s = DECAY * self._token_s + (1 - DECAY) * took_s / tokens
        left_s = self.limit_s - (now - self._began)
        return room if left_s >= LEAST_CHUNK * self._token_s else 0


class PrefixStore(Protocol):
    """Caches of earlier prompts."""

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        """A cache of the first ids of a sequence, for it to take over; called when its prefill starts."""

    def keep(self, sequence: BatchSequence) -> None:
        """Called when all ids of a sequence are prefilled; its cache will change afterwards."""

    def set_aside(self, sequence: BatchSequence) -> None:
        """Called with a cache of the first ids: others wait for them, or the sequence returns to the queue."""


class Prefilling:
    """The sequences whose prompts are being read.

    Args:
        step_size: the most tokens that a step reads.
        prefixes: caches of earlier prompts; None for none.
        pace: the size of chunks while answers run; None for `step_size`.
    """

    def __init__(self, step_size: int, prefixes: PrefixStore | None, pace: ChunkPace | None) -> None:
        self.step_size = step_size
        self._prefixes, self._pace = prefixes, pace
        self._sequences: list[BatchSequence] = []

    @property
    def nbytes(self) -> int:
        """Bytes of their caches."""
        return sum(sequence.nbytes for sequence in self._sequences)

    def add(self, sequence: BatchSequence) -> None:
        """Appends a sequence."""
        self._sequences.append(sequence)

    def remove(self, sequence: BatchSequence) -> bool:
        """Removes a sequence; False if it is not here."""
        found = sequence in self._sequences
        if found:
            self._sequences.remove(sequence)
        return found

    def begin(self) -> None:
        """Starts a step."""
        if self._pace is not None:
            self._pace.begin()

    def run(self, running: bool) -> Iterator[tuple[BatchSequence, Logits | Exception]]:
        """Runs chunks in turn, `step_size` tokens in all, or as many as the pace allows where answers run.

        Yields:
            Each sequence that has been read, with the logits [1, V] after it, or that has failed, with the reason.
        """
        room, pace = self.step_size, self._pace if running else None
        while self._sequences and room > 0:
            sequence = self._next()
            self._sequences.remove(sequence)
            chunk = 0
            try:
                chunk, logits = self._read(sequence, room if pace is None else pace.size(room))
            except Exception as error:
                yield sequence, error
            else:
                if logits is not None:
                    yield sequence, logits
            if chunk:
                room -= chunk
                room = room if pace is None else pace.took(chunk, room)

    def _read(self, sequence: BatchSequence, room: int) -> tuple[int, Logits | None]:
        """Runs a chunk; returns its size, and the logits [1, V] after the last id."""
        prefixes = self._prefixes
        if sequence.cache is None and prefixes is not None:
            sequence.cache = prefixes.recall(sequence)
        sharing = [each for each in self._sequences if each.cache is None and each.waits_for(sequence)]
        chunk, logits = run_chunk(sequence, room)
        if logits is None:
            self._sequences.append(sequence)
            if prefixes is not None and not all(each.waits_for(sequence) for each in sharing):
                prefixes.set_aside(sequence)
        elif prefixes is not None:
            prefixes.keep(sequence)
        return chunk, logits

    def _next(self) -> BatchSequence:
        """Next sequence to prefill: by priority, answers that have begun before prompts, then in turn.

        A sequence whose beginning is being prefilled waits, so that it can reuse that cache.
        """
        started = [each for each in self._sequences if each.cache is not None]
        ready = [
            sequence
            for sequence in self._sequences
            if sequence.cache is not None or not any(sequence.waits_for(each) for each in started)
        ]
        return min(ready, key=lambda each: (each.priority, not each.drawn))


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
