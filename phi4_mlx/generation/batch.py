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
from collections.abc import Sequence
from operator import attrgetter

from phi4_mlx.generation.drawing import Drawing
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.prefill import ChunkPace, Prefilling, PrefixStore
from phi4_mlx.generation.row_group import RowGroup
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.shared_stream import shared_stream

PREFILL_STEP_SIZE = 512  # prompt tokens a step; running answers wait for them
MAX_PADDING = 4096  # columns that a row may add to rows of another length; one more forward pass costs four times that

_LINE = attrgetter("line")


class Batch:
    """The scheduler of sequences that are answered together; any thread may call it, one at a time.

    Sequences are served by priority, then in the order of arrival. Where rows or memory are short, the running sequence
    that comes last returns to the queue, with its cache in `prefixes`: always if the caches exceed their limit, and for
    a waiting sequence only if that one has a lower priority number.

    Args:
        prefill_step_size: the most prompt tokens that a step prefills.
        pace: the size of prefill chunks while answers run; None for `prefill_step_size`.

    Attributes:
        max_rows: the most active sequences; more wait.
        kv_limit_bytes: the most bytes of all caches.
        prefixes: caches of earlier prompts; None for none.
        prefilling: active sequences whose prompts are being read.
        guessing: the guesses of rows that have a proposer.
        waiting: sequences that have not started, or have returned, in order.
        active: started sequences, the last started last.
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
        self.max_rows, self.kv_limit_bytes, self.prefixes = max_rows, kv_limit_bytes, prefixes
        self.guessing = guessing or Guessing()
        self.waiting: list[BatchSequence] = []
        self.active: list[BatchSequence] = []
        self.prefilling = Prefilling(prefill_step_size, prefixes, pace)
        self._arrivals, self._groups = itertools.count(), list[RowGroup]()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, with room for the next token of each."""
        return self.prefilling.nbytes + sum(group.nbytes for group in self._groups)

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
            self.prefilling.begin()
            self._admit()
            for group in list(self._groups):
                self._decode(group, events)
            self._prefill(events)
        return events

    def _queue(self, sequence: BatchSequence) -> None:
        bisect.insort(self.waiting, sequence, key=_LINE)

    def _admit(self) -> None:
        """Starts sequences while there is room, and sends others back to the queue where there is none."""
        while self.nbytes > self.kv_limit_bytes and len(self.active) > 1:
            self._send_back(max(self.active, key=_LINE))
        while self.waiting and self._make_room(self.waiting[0]):
            self.active.append(self.waiting.pop(0))
            self.prefilling.add(self.active[-1])

    def _make_room(self, first: BatchSequence) -> bool:
        """True if a waiting sequence can start; active ones of a higher priority number make room for it."""
        staying = [each for each in self.active if each.priority <= first.priority]  # do not make room
        least = sum(cache_bytes(each.cost, len(each.ids), snapshots=0) for each in staying)
        if staying and not self._fits(first, staying, least):
            return False
        while self.active and not self._fits(first, self.active, self.nbytes):
            if (last := max(self.active, key=_LINE)).priority <= first.priority:
                return False
            self._send_back(last)
        return True

    def _fits(self, sequence: BatchSequence, active: Sequence[BatchSequence], nbytes: int) -> bool:
        """True if a sequence can start beside active ones, whose caches take so many bytes."""
        growth = sum(KVCache.STEP * each.cost.token_bytes for each in active)
        return len(active) < self.max_rows and nbytes + growth + sequence.nbytes <= self.kv_limit_bytes

    def _send_back(self, sequence: BatchSequence) -> None:
        """Returns an active sequence to its place in the queue; it is prefilled again later."""
        self._take_out(sequence)
        if self.prefixes is not None and sequence.cache is not None:
            self.prefixes.set_aside(sequence)
        sequence.rest()
        self._queue(sequence)

    def _prefill(self, events: list[Token | Fault]) -> None:
        """Runs chunks of prompts, and draws the first token of those that are read."""
        for sequence, result in self.prefilling.run(any(any(group.members) for group in self._groups)):
            try:
                if isinstance(result, Exception):
                    raise result
                self._draw([(sequence, 0)], Drawing(result), events)
                if sequence in self.active:
                    self._place(sequence)
            except Exception as error:
                events.append(self._fail(sequence, error))

    def _place(self, sequence: BatchSequence) -> None:
        """Sends a prefilled sequence to the group that it fits best, within the limit, or back to prefill."""
        cache = sequence.cache
        assert cache is not None
        if not sequence.in_step(cache.offset, cache.regime):
            self.prefilling.add(sequence)
            return
        padding = {group: group.padding_with(sequence, cache) for group in self._groups}
        for group in sorted(padding, key=padding.__getitem__):
            if padding[group] > MAX_PADDING:
                break
            group.arrivals.append((sequence, cache))
            if self.nbytes <= self.kv_limit_bytes:
                return
            group.arrivals.pop()
        rows = sequence.model.make_batch_cache(cache.regime, sequence.kv_bits)
        self._groups.append(RowGroup(sequence.model, sequence.kv_bits, rows, arrivals=[(sequence, cache)]))

    def _decode(self, group: RowGroup, events: list[Token | Fault]) -> None:
        """Draws a token for every row of a group, and further ones where guesses hold; a row out of step leaves it."""
        for member, length in zip(list(group.members), group.cache.lengths, strict=True):
            if member is not None and not member.in_step(length, group.cache.regime):
                self._leave(member)
                self.prefilling.add(member)
        try:
            members = group.settle()
            if not members:
                return
            start = self.guessing.clock()
            forward = group.run(self.guessing.chunks(members, group.cache))
            drawing = Drawing(forward.logits)
            while due := forward.due():
                self._draw([(members[row], row * forward.width + column) for row, column in due], drawing, events)
            forward.finish()
            self.guessing.took(forward, self.guessing.clock() - start)
        except Exception as error:
            self._restart(group, error, events)

    def _draw(self, due: list[tuple[BatchSequence, int]], drawing: Drawing, events: list[Token | Fault]) -> None:
        """Draws a token for each sequence from its row of the logits; a failure is of one sequence alone."""
        for sequence, result in drawing.draw(due):
            events += [self._fail(sequence, result)] if isinstance(result, Exception) else result

    def _fail(self, sequence: BatchSequence, error: Exception) -> Fault:
        """Takes out a sequence that cannot continue."""
        if sequence in self.active:
            self._leave(sequence, keep=False)
            self.active.remove(sequence)
        sequence.rest()
        return Fault(sequence, error)

    def _restart(self, group: RowGroup, error: Exception, events: list[Token | Fault]) -> None:
        """Starts the sequences of a lost group again; one that loses its row twice has failed."""
        if group in self._groups:
            self._groups.remove(group)
        for sequence in group.sequences:
            sequence.cache = None
            sequence.restarts += 1
            if sequence.restarts > 1:
                events.append(self._fail(sequence, error))
            else:
                self.prefilling.add(sequence)

    def _take_out(self, sequence: BatchSequence) -> None:
        """Makes an active sequence inactive."""
        self.active.remove(sequence)
        self._leave(sequence)

    def _leave(self, sequence: BatchSequence, keep: bool = True) -> None:
        """Takes an active sequence out of wherever it is; keeps its row's cache if its regime still fits."""
        if self.prefilling.remove(sequence):
            return
        for group in self._groups:
            group.arrivals = [arrival for arrival in group.arrivals if arrival[0] is not sequence]
            if sequence in group.members:
                number = group.members.index(sequence)
                group.members[number] = None
                if keep and sequence.regime == group.cache.regime:
                    sequence.cache = group.cache.copy_row(number, sequence.ids, sequence.new_cache())
        self._groups = [group for group in self._groups if group.arrivals or any(group.members)]
