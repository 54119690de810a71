"""Continuous batching: many sequences over one model, which join and leave at every step.

A step draws a token for every sequence whose prompt has been read, and reads chunks of others. Until then a
sequence has a cache of its own; afterwards its keys and values are a row among `Rows` of the same model and RoPE table.
Whatever takes a row out of step (a crossing of the RoPE boundary, a run of forced tokens, want of memory, a failure)
takes it out of the rows, and it comes back as it came first: by a prefill of what its cache does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from phi4_mlx.generation.memory import kv_bytes
from phi4_mlx.generation.sampling import LogitsProcessor
from phi4_mlx.models.batch_cache import Rows
from phi4_mlx.models.cache import PromptCache, buffer_length
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.text import Model

PREFILL_STEP_SIZE = 512  # tokens a step: what the answers of others wait for
PADDING = 4096  # columns that a row may cost beside others of another length; a forward pass more costs four times that
FORCED_RUN = 8  # forced tokens that are worth a prefill of their own, rather than a step each beside the others


def _buffer_bytes(model: Model, length: int) -> int:
    """Bytes of the buffers that hold so many tokens and the next one."""
    return buffer_length(length) * kv_bytes(model)


@dataclass(eq=False)
class Sequence:
    """A prompt, and the answer to it as far as it has come.

    Attributes:
        model: which model answers; sequences of several models may share a `Batch`.
        ids: the prompt, and every token drawn since.
        max_tokens: how many tokens to draw at most.
        sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
        processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        logits_mask: what the answer must obey, as `generate_step` takes it.
        cache: what of `ids` is known already; None for nothing. Taken over, and changed.
    """

    model: Model
    ids: list[int]
    max_tokens: int
    sampler: Callable[[mx.array], mx.array] | None = None
    processors: Iterable[LogitsProcessor] = ()
    logits_mask: Any | None = None
    cache: PromptCache | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self.restarts = 0

    @property
    def drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - self.prompt_tokens

    @property
    def regime(self) -> Regime:
        """The RoPE table that all of its ids ask for."""
        return self.model.model.rope.regime(len(self.ids))

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values of all of its ids take, in whole buffers."""
        return _buffer_bytes(self.model, len(self.ids))

    def take(self, token: int) -> list[int] | None:
        """Appends a token that was drawn; returns it, with those that a grammar forces to follow.

        None if the grammar would rather have another in its place.
        """
        forced = self.logits_mask.accept(token) if self.logits_mask is not None else []
        if forced is None:
            return None
        tokens = [token, *forced][: self.max_tokens - self.drawn]
        self.ids += tokens
        return tokens

    def in_step(self, length: int, regime: Regime) -> bool:
        """Whether a cache of that length and regime goes on by a token at a time."""
        return self.regime == regime and len(self.ids) - length < FORCED_RUN


@dataclass(frozen=True)
class Token:
    """A token drawn, and the log-probabilities [V] that it was drawn from, computed only if they are looked at.

    None for a token that a grammar forced.
    """

    sequence: Sequence
    token: int
    logprobs: mx.array | None


@dataclass(frozen=True)
class Fault:
    """A sequence that cannot go on, and why."""

    sequence: Sequence
    error: Exception


class Memory(Protocol):
    """What is known of prompts that others have brought before."""

    def recall(self, sequence: Sequence) -> PromptCache | None:
        """A cache of how a sequence's ids begin, for it to take over; asked for when it begins to be read."""

    def keep(self, sequence: Sequence) -> None:
        """Told when all of a sequence's ids have been read; its cache will change."""


class _Forgetful:
    """Knows nothing."""

    def recall(self, sequence: Sequence) -> PromptCache | None:
        return None

    def keep(self, sequence: Sequence) -> None:
        pass


@dataclass(eq=False)
class _Group:
    """Rows of one model and one RoPE table, and whose they are.

    Attributes:
        model: the model of all.
        rows: their keys and values.
        members: whose row it is; nobody's where its sequence has left.
        arrivals: sequences that become rows at the next step, with their caches.
    """

    model: Model
    rows: Rows
    members: list[Sequence | None] = field(default_factory=list)
    arrivals: list[tuple[Sequence, PromptCache]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return max([self.rows.columns, *(cache.offset for _, cache in self.arrivals)])

    @property
    def nbytes(self) -> int:
        return (len(self.members) + len(self.arrivals)) * _buffer_bytes(self.model, self.columns)

    def padding_with(self, sequence: Sequence, cache: PromptCache) -> float:
        """Columns that the sequence would cost beyond its own tokens; no number of them if it belongs elsewhere."""
        if sequence.model is not self.model or cache.regime != self.rows.regime:
            return math.inf
        longer = cache.offset - self.columns
        return longer * (len(self.members) + len(self.arrivals)) if longer > 0 else -longer

    def settle(self) -> list[Sequence]:
        """Gives up the rows of those that have left, takes in the arrivals; returns the members."""
        kept = [number for number, member in enumerate(self.members) if member is not None]
        if len(kept) < len(self.members):
            self.rows.keep(kept)
        members = [member for member in self.members if member is not None]
        if self.arrivals:
            self.rows.join([cache for _, cache in self.arrivals])
            for sequence, _ in self.arrivals:
                sequence.cache = None
                members.append(sequence)
        self.members, self.arrivals = [*members], []
        return members


class Batch:
    """Sequences that are answered together.

    Attributes:
        max_rows: sequences under way at a time; more wait.
        kv_limit_bytes: what all keys and values may take; where they would outgrow it, the youngest sequence waits.
        prefill_step_size: tokens of prompts that a step reads.
        memory: what is known of earlier prompts.
        waiting: sequences that have not begun, in order.
        active: those that have, the oldest first.
    """

    def __init__(
        self,
        max_rows: int = 32,
        kv_limit_bytes: float = math.inf,
        prefill_step_size: int = PREFILL_STEP_SIZE,
        memory: Memory | None = None,
    ):
        self.max_rows, self.kv_limit_bytes, self.prefill_step_size = max_rows, kv_limit_bytes, prefill_step_size
        self.memory: Memory = memory or _Forgetful()
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []
        self._reading: list[Sequence] = []
        self._groups: list[_Group] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, with room for the next token of each."""
        return sum(sequence.nbytes for sequence in self._reading) + sum(group.nbytes for group in self._groups)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in, at the end of the line."""
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> PromptCache | None:
        """Takes a sequence out, wherever it is; returns the cache of what is known of its ids, if anything is."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.active:
            self.active.remove(sequence)
            self._take_out(sequence)
        return sequence.cache

    def step(self) -> list[Token | Fault]:
        """Draws a token for every sequence that has been read, and reads chunks of others.

        Returns:
            What was drawn, and who cannot go on and is out already. Whoever has reached `max_tokens`, or an end marker,
            is for the caller to `end`.
        """
        self._admit()
        events: list[Token | Fault] = []
        for group in list(self._groups):
            self._decode(group, events)
        self._read(events)
        return events

    def _admit(self) -> None:
        """Lets sequences begin as far as there is room, or sends the youngest back where there is none."""
        while self.nbytes > self.kv_limit_bytes and len(self.active) > 1:
            youngest = self.active.pop()
            self._take_out(youngest)
            youngest.cache = None
            self.waiting.insert(0, youngest)
        while self.waiting and len(self.active) < self.max_rows:
            growth = sum(_buffer_bytes(sequence.model, 0) for sequence in self.active)
            if self.active and self.nbytes + growth + self.waiting[0].nbytes > self.kv_limit_bytes:
                break
            self.active.append(self.waiting.pop(0))
            self._reading.append(self.active[-1])

    def _read(self, events: list[Token | Fault]) -> None:
        """Runs chunks of prompts, each in its turn, as many as come to `prefill_step_size` tokens."""
        room = self.prefill_step_size
        while self._reading and room > 0:
            sequence = self._next_to_read()
            self._reading.remove(sequence)
            try:
                sequence.cache = sequence.cache or self.memory.recall(sequence)
                chunk, logits = _run_chunk(sequence, room)
                room -= chunk
                if logits is None:
                    self._reading.append(sequence)
                    continue
                self.memory.keep(sequence)
                self._draw([sequence], logits, events)
                if sequence in self.active:
                    self._place(sequence)
            except Exception as error:
                events.append(self._fail(sequence, error))

    def _next_to_read(self) -> Sequence:
        """The first in line, but one whose very prompt is being read already had better wait for what is found."""
        begun = [each for each in self._reading if each.cache is not None]
        for sequence in self._reading:
            if sequence.cache is not None or not any(
                each.model is sequence.model and each.ids == sequence.ids for each in begun
            ):
                return sequence
        raise AssertionError("one that waits for another, and none that it waits for")

    def _place(self, sequence: Sequence) -> None:
        """Sends a sequence that has been read to the group that it fits best, or to read on."""
        cache = sequence.cache
        assert cache is not None
        if not sequence.in_step(cache.offset, cache.regime):
            self._reading.append(sequence)
            return
        fitting = [group for group in self._groups if group.padding_with(sequence, cache) <= PADDING]
        if not fitting:
            fitting = [_Group(sequence.model, Rows(sequence.model, cache.regime))]
            self._groups += fitting
        min(fitting, key=lambda group: group.padding_with(sequence, cache)).arrivals.append((sequence, cache))

    def _decode(self, group: _Group, events: list[Token | Fault]) -> None:
        """A token for every row of a group; one that has fallen out of step leaves it."""
        for member, length in zip(list(group.members), group.rows.lengths, strict=True):
            if member is not None and not member.in_step(length, group.rows.regime):
                self._take_out(member)
                self._reading.append(member)
        try:
            members = group.settle()
            if not members:
                return
            lengths = group.rows.lengths
            ids = mx.array([[member.ids[length]] for member, length in zip(members, lengths, strict=True)])
            logits = group.model(ids, group.rows)[:, -1]  # [B, V]
            # A row that has a forced token to take in has nothing to draw.
            due = [n for n, member in enumerate(members) if lengths[n] + 1 == len(member.ids)]
            if due:
                chosen = logits if len(due) == len(members) else logits[mx.array(due)]
                self._draw([members[n] for n in due], chosen, events)
        except Exception as error:
            self._restart(group, error, events)

    def _draw(self, sequences: list[Sequence], logits: mx.array, events: list[Token | Fault]) -> None:
        """Draws a token for each sequence from its row of the logits [B, V]; the mistake of one is not the others'."""
        mx.async_eval(logits)  # the device computes them while the host works out what a grammar allows
        drawn: list[tuple[int, mx.array, mx.array]] = []
        likeliest = mx.argmax(logits, axis=-1)  # [B]
        for n, sequence in enumerate(sequences):
            try:
                drawn.append((n, *_draw_one(sequence, logits[n : n + 1], likeliest[n : n + 1])))
            except Exception as error:
                events.append(self._fail(sequence, error))
        mx.eval([token for _, token, _ in drawn])
        for n, token, logprobs in drawn:
            sequence = sequences[n]
            try:
                while (tokens := sequence.take(int(token.item()))) is None:
                    token, logprobs = _draw_one(sequence, logits[n : n + 1], likeliest[n : n + 1])
            except Exception as error:
                events.append(self._fail(sequence, error))
            else:
                events += [Token(sequence, each, None if i else logprobs) for i, each in enumerate(tokens)]

    def _fail(self, sequence: Sequence, error: Exception) -> Fault:
        """Takes out a sequence that cannot go on."""
        self.end(sequence)
        sequence.cache = None
        return Fault(sequence, error)

    def _restart(self, group: _Group, error: Exception, events: list[Token | Fault]) -> None:
        """Begins anew with what was lost with a group's rows; a sequence to which it happens again has failed."""
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
                self._reading.append(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        """Takes an active sequence out of wherever it stands; of a row it keeps what its own regime can use."""
        if sequence in self._reading:
            return self._reading.remove(sequence)
        for group in self._groups:
            group.arrivals = [arrival for arrival in group.arrivals if arrival[0] is not sequence]
            if sequence in group.members:
                number = group.members.index(sequence)
                group.members[number] = None
                if sequence.regime == group.rows.regime:
                    sequence.cache = group.rows.copy_row(number, sequence.ids, sequence.model.make_cache())
        self._groups = [group for group in self._groups if group.arrivals or any(group.members)]


def _run_chunk(sequence: Sequence, room: int) -> tuple[int, mx.array | None]:
    """Runs what is not in a sequence's cache yet, at most `room` tokens; after its last one the logits [1, V]."""
    model = sequence.model
    cache = sequence.cache = sequence.cache or model.make_cache()
    cache.admit(mx.array([sequence.ids[cache.offset :]]), reach=len(sequence.ids))  # empties it, if need be
    chunk = sequence.ids[cache.offset : cache.offset + room]
    hidden = model.model(mx.array([chunk]), cache, rows=1)
    if cache.offset < len(sequence.ids):
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        return len(chunk), None
    cache.forget_reach()
    return len(chunk), model.logits(hidden)[:, 0]


def _draw_one(sequence: Sequence, logits: mx.array, likeliest: mx.array) -> tuple[mx.array, mx.array]:
    """A token [1] from logits [1, V], whose likeliest [1] is known, and the log-probabilities [V]."""
    plain = not sequence.processors and sequence.logits_mask is None
    ids = mx.array(sequence.ids) if sequence.processors else None
    for process in sequence.processors:
        logits = process(ids, logits)
    if sequence.logits_mask is not None:
        allowed = sequence.logits_mask.mask()
        logits = logits if allowed is None else mx.where(allowed, logits, -math.inf)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sequence.sampler is not None:
        return sequence.sampler(logprobs), logprobs[0]
    return likeliest if plain else mx.argmax(logits, axis=-1), logprobs[0]
