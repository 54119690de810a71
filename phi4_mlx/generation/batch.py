"""Continuous batching: a scheduler of many sequences, which join and leave at every step.

A step draws one token for every prefilled sequence and prefills chunks of the others. While its prompt is prefilled, a
sequence has its own cache; afterwards it is a row of a `BatchCache` of its model and RoPE table, whatever its adapter.
Whatever takes a row out of step (a RoPE crossing, a run of forced tokens, lack of memory, a failure) takes it out of
the batch cache, and it comes back as it first came: by a prefill of the ids that its cache does not hold.
"""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx

from phi4_mlx.generation.row_group import RowGroup
from phi4_mlx.generation.sampling import Draws, apply_processors, draw
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.generation.steps import chunk_ends, finish_chunk
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.tokens.prompt import places_of

PREFILL_STEP_SIZE = 512  # prompt tokens a step; running answers wait for them
MAX_PADDING = 4096  # columns that a row may add to rows of another length; one more forward pass costs four times that
SNAPSHOTS_APART = 32  # tokens; a nearer snapshot saves less time than the additional forward pass takes


class PrefixStore(Protocol):
    """Caches of earlier prompts."""

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        """A cache of the first ids of a sequence, for it to take over; called when its prefill starts."""

    def share(self, sequence: BatchSequence) -> None:
        """Called when the first ids of a sequence are prefilled, and another one that shares them has waited."""

    def keep(self, sequence: BatchSequence) -> None:
        """Called when all ids of a sequence are prefilled; its cache will change afterwards."""


class Batch:
    """The scheduler of sequences that are answered together; any thread may call it, one at a time.

    Attributes:
        max_rows: the most active sequences; more wait.
        kv_limit_bytes: the most bytes of all caches; where they would exceed it, the youngest sequence waits.
        prefill_step_size: prompt tokens that a step prefills.
        prefixes: caches of earlier prompts; None for none.
        waiting: sequences that have not started, in order.
        active: started sequences, the oldest first.
    """

    def __init__(
        self,
        max_rows: int = 32,
        kv_limit_bytes: float = math.inf,
        prefill_step_size: int = PREFILL_STEP_SIZE,
        prefixes: PrefixStore | None = None,
    ):
        self.max_rows, self.kv_limit_bytes, self.prefill_step_size = max_rows, kv_limit_bytes, prefill_step_size
        self.prefixes = prefixes
        self.waiting: list[BatchSequence] = []
        self.active: list[BatchSequence] = []
        self._prefilling: list[BatchSequence] = []
        self._groups: list[RowGroup] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, with room for the next token of each."""
        return sum(sequence.nbytes for sequence in self._prefilling) + sum(group.nbytes for group in self._groups)

    def add(self, sequence: BatchSequence) -> None:
        """Appends a sequence to the queue."""
        self.waiting.append(sequence)

    def end(self, sequence: BatchSequence) -> PromptCache | None:
        """Takes a sequence out, wherever it is; returns the cache of its ids, if there is one."""
        with shared_stream():
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            elif sequence in self.active:
                self.active.remove(sequence)
                self._take_out(sequence)
        return sequence.cache

    def step(self) -> list[Token | Fault]:
        """Draws a token for every prefilled sequence, and prefills chunks of the others.

        Returns:
            The drawn tokens, and the sequences that cannot continue and are already out. A sequence that has reached
            `max_tokens` or an end marker is for the caller to `end`.
        """
        events: list[Token | Fault] = []
        with shared_stream():
            self._admit()
            for group in list(self._groups):
                self._decode(group, events)
            self._prefill(events)
        return events

    def _admit(self) -> None:
        """Starts sequences while there is room; sends the youngest back to the queue where there is none."""
        while self.nbytes > self.kv_limit_bytes and len(self.active) > 1:
            youngest = self.active.pop()
            self._take_out(youngest)
            youngest.cache = None
            self.waiting.insert(0, youngest)
        while self.waiting and len(self.active) < self.max_rows:
            growth = sum(KVCache.STEP * sequence.model.context_cost().token_bytes for sequence in self.active)
            if self.active and self.nbytes + growth + self.waiting[0].nbytes > self.kv_limit_bytes:
                break
            self.active.append(self.waiting.pop(0))
            self._prefilling.append(self.active[-1])

    def _prefill(self, events: list[Token | Fault]) -> None:
        """Runs chunks of prompts in turn, `prefill_step_size` tokens in all."""
        room = self.prefill_step_size
        while self._prefilling and room > 0:
            sequence = self._next_to_prefill()
            self._prefilling.remove(sequence)
            try:
                if sequence.cache is None and self.prefixes is not None:
                    sequence.cache = self.prefixes.recall(sequence)
                sharing = [each for each in self._prefilling if each.cache is None and each.waits_for(sequence)]
                chunk, logits = _run_chunk(sequence, room)
                room -= chunk
                if logits is None:
                    self._prefilling.append(sequence)
                    if self.prefixes is not None and not all(each.waits_for(sequence) for each in sharing):
                        self.prefixes.share(sequence)
                    continue
                if self.prefixes is not None:
                    self.prefixes.keep(sequence)
                self._draw([sequence], logits, events)
                if sequence in self.active:
                    self._place(sequence)
            except Exception as error:
                events.append(self._fail(sequence, error))

    def _next_to_prefill(self) -> BatchSequence:
        """Next sequence to prefill. One whose beginning is being prefilled waits, to reuse that cache."""
        started = [each for each in self._prefilling if each.cache is not None]
        for sequence in self._prefilling:
            if sequence.cache is not None or not any(sequence.waits_for(each) for each in started):
                return sequence
        raise AssertionError("every sequence waits for another one")

    def _place(self, sequence: BatchSequence) -> None:
        """Sends a prefilled sequence to the group that it fits best, or back to prefill."""
        cache = sequence.cache
        assert cache is not None
        if not sequence.in_step(cache.offset, cache.regime):
            self._prefilling.append(sequence)
            return
        fitting = [group for group in self._groups if group.padding_with(sequence, cache) <= MAX_PADDING]
        if not fitting:
            fitting = [RowGroup(sequence.model, sequence.model.make_batch_cache(cache.regime))]
            self._groups += fitting
        min(fitting, key=lambda group: group.padding_with(sequence, cache)).arrivals.append((sequence, cache))

    def _decode(self, group: RowGroup, events: list[Token | Fault]) -> None:
        """Draws a token for every row of a group; a row that is out of step leaves it."""
        for member, length in zip(list(group.members), group.cache.lengths, strict=True):
            if member is not None and not member.in_step(length, group.cache.regime):
                self._take_out(member)
                self._prefilling.append(member)
        try:
            members = group.settle()
            if not members:
                return
            lengths = group.cache.lengths
            ids = mx.array([[member.ids[length]] for member, length in zip(members, lengths, strict=True)])
            logits = group.model(ids, group.cache)[:, -1]  # [B, V]
            # A row that still has a forced token to run draws nothing.
            due = [n for n, member in enumerate(members) if lengths[n] + 1 == len(member.ids)]
            if due:
                chosen = logits if len(due) == len(members) else logits[mx.array(due)]
                self._draw([members[n] for n in due], chosen, events)
        except Exception as error:
            self._restart(group, error, events)

    def _draw(self, sequences: list[BatchSequence], logits: mx.array, events: list[Token | Fault]) -> None:
        """Draws a token for each sequence from its row of the logits [B, V]; a failure is of one sequence alone."""
        mx.async_eval(logits)  # the device computes them while the host computes grammar masks
        greedy = draw(logits, None)
        drawn: list[tuple[int, Draws]] = []
        for n, sequence in enumerate(sequences):
            try:
                if sequence.is_greedy:
                    drawn.append((n, Draws(*(each[n : n + 1] for each in greedy))))
                else:
                    drawn.append((n, _draw_one(sequence, logits, n)))
            except Exception as error:
                events.append(self._fail(sequence, error))
        mx.eval([(draws.tokens, draws.scores) for _, draws in drawn])
        for n, draws in drawn:
            sequence = sequences[n]
            try:
                while (tokens := sequence.take(draws.numbers()[0])) is None:
                    draws = _draw_one(sequence, logits, n)
            except Exception as error:
                events.append(self._fail(sequence, error))
            else:
                events += [Token(sequence, each, None if i else draws.logprobs[0]) for i, each in enumerate(tokens)]

    def _fail(self, sequence: BatchSequence, error: Exception) -> Fault:
        """Takes out a sequence that cannot continue."""
        self.end(sequence)
        sequence.cache = None
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
        """Takes an active sequence out of wherever it is; keeps its row's cache if its regime still fits."""
        if sequence in self._prefilling:
            return self._prefilling.remove(sequence)
        for group in self._groups:
            group.arrivals = [arrival for arrival in group.arrivals if arrival[0] is not sequence]
            if sequence in group.members:
                number = group.members.index(sequence)
                group.members[number] = None
                if sequence.regime == group.cache.regime:
                    sequence.cache = group.cache.copy_row(number, sequence.ids, sequence.model.make_cache())
        self._groups = [group for group in self._groups if group.arrivals or any(group.members)]


def _run_chunk(sequence: BatchSequence, room: int) -> tuple[int, mx.array | None]:
    """Runs up to `room` ids that a sequence's cache lacks; returns their count, and logits [1, V] after the last id."""
    model, cache = sequence.model, sequence.cache
    if cache is None or cache.regime != sequence.regime:  # another RoPE table: nothing cached is of use
        cache = sequence.cache = model.make_cache()
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
    return size, model.logits(hidden)[:, 0]


def _draw_one(sequence: BatchSequence, logits: mx.array, n: int) -> Draws:
    """A token for row n of the logits [B, V], as its sequence wants it drawn."""
    row = logits[n : n + 1]
    if sequence.processors:
        row = apply_processors(sequence.processors, mx.array(sequence.ids), row)
    return draw(row, sequence.sampler, sequence.logits_mask.mask() if sequence.logits_mask is not None else None)
