"""Continuous batching: a scheduler of many sequences, which join and leave at every step.

A step draws one token for every prefilled sequence and prefills chunks of the others. While its prompt is prefilled, a
sequence has its own cache; afterwards it is a row of a `BatchCache` of its model and RoPE table, whatever its adapter.
Whatever takes a row out of step (a RoPE crossing, a run of forced tokens, lack of memory, a failure) takes it out of
the batch cache, and it comes back as it first came: by a prefill of the ids that its cache does not hold.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import Protocol

import mlx.core as mx

from phi4_mlx.generation.draws import Draws, Logits, apply_processors, arrays_of, draw
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.prefill import ChunkPace, run_chunk
from phi4_mlx.generation.row_group import RowGroup
from phi4_mlx.generation.sampling import Draw
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.queued import queue
from phi4_mlx.models.shared_stream import shared_stream

PREFILL_STEP_SIZE = 512  # prompt tokens a step; running answers wait for them
MAX_PADDING = 4096  # columns that a row may add to rows of another length; one more forward pass costs four times that

Greedy = dict[Draw | None, Draws]  # by the sampler: the likeliest token of each row of the logits


class PrefixStore(Protocol):
    """Caches of earlier prompts."""

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        """A cache of the first ids of a sequence, for it to take over; called when its prefill starts."""

    def keep(self, sequence: BatchSequence) -> None:
        """Called when all ids of a sequence are prefilled; its cache will change afterwards."""

    def set_aside(self, sequence: BatchSequence) -> None:
        """Called with a cache of the first ids: others wait for them, or the sequence returns to the queue."""


class Batch:
    """The scheduler of sequences that are answered together; any thread may call it, one at a time.

    Sequences are served by priority, then in the order of arrival. Where rows or memory are short, the running sequence
    that comes last returns to the queue, with its cache in `prefixes`: always if the caches exceed their limit, and for
    a waiting sequence only if that one has a lower priority number.

    Attributes:
        max_rows: the most active sequences; more wait.
        kv_limit_bytes: the most bytes of all caches.
        prefill_step_size: the most prompt tokens that a step prefills.
        prefixes: caches of earlier prompts; None for none.
        guessing: the guesses of rows that have a proposer.
        pace: the size of prefill chunks; None for `prefill_step_size`.
        waiting: sequences that have not started, or have returned, in order.
        active: started sequences, the oldest first.
    """

    def __init__(
        self,
        max_rows: int = 32,
        kv_limit_bytes: float = math.inf,
        prefill_step_size: int = PREFILL_STEP_SIZE,
        prefixes: PrefixStore | None = None,
        guessing: Guessing | None = None,
        pace: ChunkPace | None = None,
    ):
        self.max_rows, self.kv_limit_bytes, self.prefill_step_size = max_rows, kv_limit_bytes, prefill_step_size
        self.prefixes = prefixes
        self.guessing = guessing or Guessing()
        self.pace = pace
        self.waiting: list[BatchSequence] = []
        self.active: list[BatchSequence] = []
        self._arrivals = itertools.count()
        self._prefilling: list[BatchSequence] = []
        self._groups: list[RowGroup] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, with room for the next token of each."""
        return sum(sequence.nbytes for sequence in self._prefilling) + sum(group.nbytes for group in self._groups)

    def add(self, sequence: BatchSequence) -> None:
        """Queues a sequence: before those of a higher priority number, behind all others."""
        sequence.arrival = next(self._arrivals)
        self._queue(sequence)

    def end(self, sequence: BatchSequence) -> PromptCache | None:
        """Takes a sequence out, wherever it is; returns the cache of its ids, if there is one."""
        with shared_stream():
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            elif sequence in self.active:
                self._take_out(sequence)
        return sequence.cache

    def step(self) -> list[Token | Fault]:
        """Draws a token or more for every prefilled sequence, and prefills chunks of the others.

        Returns:
            The drawn tokens, and the sequences that cannot continue and are already out. A sequence that has reached
            `max_tokens` or an end marker is for the caller to `end`.
        """
        events: list[Token | Fault] = []
        with shared_stream():
            if self.pace is not None:
                self.pace.begin()
            self._admit()
            for group in list(self._groups):
                self._decode(group, events)
            self._prefill(events)
        return events

    def _queue(self, sequence: BatchSequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda each: each.line)

    def _admit(self) -> None:
        """Starts sequences while there is room, and sends others back to the queue where there is none."""
        while self.nbytes > self.kv_limit_bytes and len(self.active) > 1:
            self._send_back(self._last)
        while self.waiting and self._make_room(self.waiting[0]):
            self.active.append(self.waiting.pop(0))
            self._prefilling.append(self.active[-1])

    @property
    def _last(self) -> BatchSequence:
        """The active sequence that is served last."""
        return max(self.active, key=lambda each: each.line)

    def _make_room(self, first: BatchSequence) -> bool:
        """True if a waiting sequence can start; active ones of a higher priority number make room for it."""
        while self.active and not self._has_room(first):
            if (last := self._last).priority <= first.priority:
                return False
            self._send_back(last)
        return True

    def _has_room(self, sequence: BatchSequence) -> bool:
        growth = sum(KVCache.STEP * each.cost.token_bytes for each in self.active)
        return len(self.active) < self.max_rows and self.nbytes + growth + sequence.nbytes <= self.kv_limit_bytes

    def _send_back(self, sequence: BatchSequence) -> None:
        """Returns an active sequence to its place in the queue; it is prefilled again later."""
        self._take_out(sequence)
        if self.prefixes is not None and sequence.cache is not None:
            self.prefixes.set_aside(sequence)
        sequence.rest()
        self._queue(sequence)

    def _prefill(self, events: list[Token | Fault]) -> None:
        """Runs chunks of prompts in turn, `prefill_step_size` tokens in all, or as many as `pace` allows."""
        room, running = self.prefill_step_size, any(any(group.members) for group in self._groups)
        while self._prefilling and room > 0:
            sequence = self._next_to_prefill()
            self._prefilling.remove(sequence)
            try:
                if sequence.cache is None and self.prefixes is not None:
                    sequence.cache = self.prefixes.recall(sequence)
                sharing = [each for each in self._prefilling if each.cache is None and each.waits_for(sequence)]
                chunk, logits = run_chunk(sequence, self.pace.size(room) if self.pace is not None and running else room)
                room -= chunk
                if logits is None:
                    self._prefilling.append(sequence)
                    if self.prefixes is not None and not all(each.waits_for(sequence) for each in sharing):
                        self.prefixes.set_aside(sequence)
                else:
                    if self.prefixes is not None:
                        self.prefixes.keep(sequence)
                    self._draw([(sequence, 0)], logits, events)
                    if sequence in self.active:
                        self._place(sequence)
            except Exception as error:
                events.append(self._fail(sequence, error))
            else:
                if self.pace is not None:
                    room = self.pace.took(chunk, room) if running else room

    def _next_to_prefill(self) -> BatchSequence:
        """Next sequence to prefill: by priority, answers that have begun before prompts, then in turn.

        A sequence whose beginning is being prefilled waits, so that it can reuse that cache.
        """
        started = [each for each in self._prefilling if each.cache is not None]
        ready = [
            sequence
            for sequence in self._prefilling
            if sequence.cache is not None or not any(sequence.waits_for(each) for each in started)
        ]
        return min(ready, key=lambda each: (each.priority, not each.drawn))

    def _place(self, sequence: BatchSequence) -> None:
        """Sends a prefilled sequence to the group that it fits best, or back to prefill."""
        cache = sequence.cache
        assert cache is not None
        if not sequence.in_step(cache.offset, cache.regime):
            self._prefilling.append(sequence)
            return
        fitting = [group for group in self._groups if group.padding_with(sequence, cache) <= MAX_PADDING]
        if not fitting:
            rows = sequence.model.make_batch_cache(cache.regime, sequence.kv_bits)
            fitting = [RowGroup(sequence.model, sequence.kv_bits, rows)]
            self._groups += fitting
        min(fitting, key=lambda group: group.padding_with(sequence, cache)).arrivals.append((sequence, cache))

    def _decode(self, group: RowGroup, events: list[Token | Fault]) -> None:
        """Draws a token for every row of a group, and further ones where guesses hold; a row out of step leaves it."""
        for member, length in zip(list(group.members), group.cache.lengths, strict=True):
            if member is not None and not member.in_step(length, group.cache.regime):
                self._leave(member)
                self._prefilling.append(member)
        try:
            members = group.settle()
            if not members:
                return
            start = self.guessing.clock()
            forward = group.run(self.guessing.chunks(members, group.cache))
            greedy: Greedy = {}
            while due := forward.due():
                rows = [(members[row], row * forward.width + column) for row, column in due]
                self._draw(rows, forward.logits, events, greedy)
            forward.finish()
            self.guessing.took(forward, self.guessing.clock() - start)
        except Exception as error:
            self._restart(group, error, events)

    def _draw(
        self,
        due: list[tuple[BatchSequence, int]],
        logits: Logits,
        events: list[Token | Fault],
        greedy: Greedy | None = None,
    ) -> None:
        """Draws a token for each sequence from its row of the logits [n, V]; a failure is of one sequence alone."""
        queue(arrays_of(logits))  # the device computes them while the host computes grammar masks
        greedy = {} if greedy is None else greedy
        drawn: list[tuple[BatchSequence, int, Draws]] = []
        for sequence, n in due:
            try:
                drawn.append((sequence, n, _draw_one(sequence, logits, n, greedy)))
            except Exception as error:
                events.append(self._fail(sequence, error))
        mx.eval([(draws.tokens, draws.scores) for *_, draws in drawn])
        for sequence, n, draws in drawn:
            try:
                while (tokens := sequence.take(draws.numbers()[0])) is None:
                    draws = _draw_one(sequence, logits, n, greedy)
            except Exception as error:
                events.append(self._fail(sequence, error))
            else:
                events += [Token(sequence, each, None if i else draws.logprobs[0]) for i, each in enumerate(tokens)]

    def _fail(self, sequence: BatchSequence, error: Exception) -> Fault:
        """Takes out a sequence that cannot continue."""
        if sequence in self.active:
            self._leave(sequence, keep=False)
            self.active.remove(sequence)
        sequence.rest()
        return Fault(sequence, error)

    def _restart(self, group: RowGroup, error: Exception, events: list[Token | Fault]) -> None:
        """Starts the sequences of a lost group again; one that loses its row twice has failed."""
        arrived = [sequence for sequence, _ in group.arrivals]
        lost = [member for member in [*group.members, *arrived] if member is not None]
        if group in self._groups:
            self._groups.remove(group)
        for sequence in lost:
            sequence.cache = None
            sequence.restarts += 1
            if sequence.restarts > 1:
                events.append(self._fail(sequence, error))
            else:
                self._prefilling.append(sequence)

    def _take_out(self, sequence: BatchSequence) -> None:
        """Makes an active sequence inactive."""
        self.active.remove(sequence)
        self._leave(sequence)

    def _leave(self, sequence: BatchSequence, keep: bool = True) -> None:
        """Takes an active sequence out of wherever it is; keeps its row's cache if its regime still fits."""
        if sequence in self._prefilling:
            return self._prefilling.remove(sequence)
        for group in self._groups:
            group.arrivals = [arrival for arrival in group.arrivals if arrival[0] is not sequence]
            if sequence in group.members:
                number = group.members.index(sequence)
                group.members[number] = None
                if keep and sequence.regime == group.cache.regime:
                    sequence.cache = group.cache.copy_row(number, sequence.ids, sequence.new_cache())
        self._groups = [group for group in self._groups if group.arrivals or any(group.members)]


def _draw_one(sequence: BatchSequence, logits: Logits, n: int, greedy: Greedy) -> Draws:
    """A token for row n of the logits [n, V], as its sequence wants it drawn.

    Args:
        greedy: the likeliest token of every row, once a sequence has wanted one.
    """
    if sequence.is_greedy:
        if sequence.sampler not in greedy:
            greedy[sequence.sampler] = draw(logits, sequence.sampler)
        return Draws(*(each[n : n + 1] for each in greedy[sequence.sampler]))
    row: Logits = logits[n : n + 1]
    if sequence.processors:
        row = apply_processors(sequence.processors, mx.array(sequence.ids), row)
    return draw(row, sequence.sampler, sequence.logits_mask.mask() if sequence.logits_mask is not None else None)
