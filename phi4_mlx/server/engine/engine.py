"""The engine: jobs in, events out, a step at a time, over one batch. It runs in a process of its own.

What goes wrong for one job is told to that job alone. What takes the whole process down (Metal, out of memory, ends in
an abort that Python cannot catch) is for the supervisor.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.checkpoint import load, share_weights
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.generation.batch import Batch, Fault, Sequence, Token
from phi4_mlx.generation.memory import kv_bytes, memory_limit
from phi4_mlx.generation.sampling import make_logits_processors, make_sampler
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.models.cache import KVCache, PromptCache
from phi4_mlx.models.text import Model
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import (
    Broken,
    Cancel,
    Event,
    Failure,
    Finish,
    Job,
    Piece,
    Ping,
    Pong,
    Ready,
    TokenLogprob,
)
from phi4_mlx.tokens.tokenizer import Tokenizer

ACTIVATION_BYTES = 2**29  # what a forward pass needs besides weights, keys and values


@dataclass(frozen=True)
class Settings:
    """What an engine is started with; crosses to its process.

    Attributes:
        model: a folder, a Hub id or "demo".
        adapter_path: an adapter that is always on.
        adapters: folders of the adapters that a job may name.
        max_rows: answers under way at a time.
        kv_limit_bytes: what keys and values may take; None for a share of what the machine has.
        prefix_limit_bytes: the same, for what is kept of earlier prompts.
        chat_format: overrides the recognised one.
    """

    model: str
    adapter_path: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    max_rows: int = 32
    kv_limit_bytes: int | None = None
    prefix_limit_bytes: int | None = None
    chat_format: str | None = None


@dataclass(eq=False)
class _Answer:
    """A job under way."""

    job: Job
    sequence: Sequence
    text: AnswerText
    ends_at: float  # on the monotonic clock
    cached_tokens: int = 0
    tokens: int = 0  # told so far


class Engine:
    """One model, its adapters, and the jobs under way.

    Attributes:
        prefixes: what is kept of earlier prompts.
        prefilled_tokens: tokens of prompts that were computed so far, not counting those known from earlier ones.
        drawn_tokens: tokens of answers so far.
    """

    def __init__(self, base: Model, tokenizer: Tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings
        self.kv_limit_bytes, prefix_limit_bytes = _memory_limits(settings)
        self.prefixes = PrefixCache(prefix_limit_bytes)
        self.prefilled_tokens = self.drawn_tokens = 0
        self._base = base
        adapted = self._adapted(settings.adapter_path) if settings.adapter_path else base
        self._models: dict[str | None, Model] = {None: adapted}
        self._answers: dict[Sequence, _Answer] = {}
        self._unkept = 0
        self._batch = self._new_batch()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._answers)

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may come to: what the context holds, or the memory."""
        model = self._models[None]
        return min(model.config.max_position_embeddings, self.kv_limit_bytes // kv_bytes(model) - KVCache.STEP)

    def submit(self, job: Job) -> list[Event]:
        """Takes a job in; a failure is all that it can say at once."""
        try:
            answer = self._answer(job)
        except Exception as error:
            return [_failure(job, error)]
        self._answers[answer.sequence] = answer
        self._batch.add(answer.sequence)
        return []

    def cancel(self, job: int) -> None:
        """Forgets a job whose client has left; what was computed for it is kept for prompts that begin alike."""
        for answer in list(self._answers.values()):
            if answer.job.id == job:
                self._end(answer)

    def step(self) -> list[Event]:
        """One step of all jobs under way."""
        events: list[Event] = []
        for event in self._batch.step():
            answer = self._answers.get(event.sequence)
            if answer is None:  # ended earlier in this step
                continue
            events += self._safely(answer, partial(self._told, answer, event))
        now = time.monotonic()
        for answer in [each for each in self._answers.values() if each.ends_at <= now]:
            events += self._safely(answer, partial(self._out_of_time, answer))
        return events

    def fail_all(self, error: Exception) -> list[Event]:
        """Begins anew after a step that came to nothing: no job under way can be trusted."""
        events: list[Event] = [_failure(answer.job, error) for answer in self._answers.values()]
        self._answers.clear()
        self._batch = self._new_batch()
        self.prefixes.clear()
        mx.clear_cache()
        return events

    def recall(self, sequence: Sequence) -> PromptCache | None:
        """What is known of a prompt that is about to be read; for the batch."""
        answer = self._answers[sequence]
        cache = self.prefixes.find(sequence.model, answer.job.adapter, sequence.ids)
        if not answer.tokens:
            answer.cached_tokens = cache.offset if cache else 0
        return cache

    def keep(self, sequence: Sequence) -> None:
        """A prompt has been read: others that begin alike need not wait for the answer's end; for the batch."""
        answer = self._answers[sequence]
        if not answer.tokens:
            self.prefilled_tokens += len(answer.job.prompt) - answer.cached_tokens
        self._put(answer, sequence.cache)

    def gauges(self) -> dict[str, float]:
        """Counts and bytes, by the name under which they are told."""
        return {
            "answers_under_way": len(self._answers),
            "prefilled_tokens_total": self.prefilled_tokens,
            "drawn_tokens_total": self.drawn_tokens,
            "kv_bytes": self._batch.nbytes,
            "kv_limit_bytes": self.kv_limit_bytes,
            "prefix_cache_bytes": self.prefixes.nbytes,
            "prefix_cache_limit_bytes": self.prefixes.limit_bytes,
            "prefix_cache_entries": len(self.prefixes),
            "prefix_cache_failures_total": self._unkept,
            "active_memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def _answer(self, job: Job) -> _Answer:
        model = self._model(job.adapter)
        V = model.config.vocab_size
        if not job.prompt or min(job.prompt) < 0 or max(job.prompt) >= V:  # MLX would read beyond the embedding
            raise RequestError(f"a prompt must be token ids from 0 to {V - 1:,}, and at least one")
        if len(job.prompt) + job.max_tokens > self.longest:
            raise RequestError(
                f"{len(job.prompt)} prompt tokens and max_tokens {job.max_tokens} come to more than {self.longest}, "
                "what this server can hold; shorten the prompt or lower max_tokens"
            )
        drawing = job.sampling
        sequence = Sequence(
            model,
            list(job.prompt),
            job.max_tokens,
            make_sampler(drawing.temp, drawing.top_p, drawing.min_p, drawing.top_k, drawing.seed),
            make_logits_processors(
                drawing.logit_bias or None,
                drawing.repetition_penalty,
                presence_penalty=drawing.presence_penalty,
                frequency_penalty=drawing.frequency_penalty,
            ),
            self._constraint(job),
        )
        text = AnswerText(self.tokenizer.streaming_decoder(), list(job.stop))
        return _Answer(job, sequence, text, time.monotonic() + job.timeout_s)

    def _constraint(self, job: Job) -> Any:
        if job.grammar is None:
            return None
        from phi4_mlx.grammar.constraint import Constraint
        from phi4_mlx.grammar.grammars import Grammar

        return Constraint(Grammar(job.grammar), self.tokenizer, self._base.config.vocab_size, job.max_tokens)

    def _model(self, adapter: str | None) -> Model:
        """The model that answers under an adapter's name, loaded when it is first asked for."""
        if adapter not in self._models:
            folder = self.settings.adapters.get(str(adapter))
            if folder is None:
                raise RequestError(f"there is no adapter {adapter!r}; there are {', '.join(self.settings.adapters)}")
            self._models[adapter] = self._adapted(folder)
        return self._models[adapter]

    def _adapted(self, folder: str) -> Model:
        """A model of its own with an adapter on it, over the weights of the base."""
        twin = share_weights(self._base)
        load_adapter(twin, Path(folder))
        mx.eval(twin.parameters())
        return twin

    def _told(self, answer: _Answer, event: Token | Fault) -> list[Event]:
        """What a token or a failure of a job's sequence means to its client."""
        if isinstance(event, Fault):
            self._forget(answer)
            return [_failure(answer.job, event.error)]
        answer.tokens += 1
        self.drawn_tokens += 1
        job = answer.job
        logprobs = () if job.top_logprobs is None else (self._logprob(event, job.top_logprobs),)
        if event.token in self.tokenizer.eos_ids:
            return self._finish(answer, "stop")
        text, stopped = answer.text.add(event.token)
        piece: list[Event] = [Piece(job.id, text, logprobs)] if text or logprobs else []
        if stopped:
            return [*piece, *self._finish(answer, "stop")]
        if answer.tokens == job.max_tokens:
            return [*piece, *self._finish(answer, "length")]
        return piece

    def _finish(self, answer: _Answer, reason: Literal["stop", "length", "timeout"]) -> list[Event]:
        job = answer.job
        rest = answer.text.finish()
        self._end(answer)
        finish = Finish(job.id, reason, answer.text.stopped_by, len(job.prompt), answer.cached_tokens, answer.tokens)
        return [Piece(job.id, rest), finish] if rest else [finish]

    def _out_of_time(self, answer: _Answer) -> list[Event]:
        """Ends an answer where it stands; one that has not begun is a failure, lest it be taken for an empty one."""
        if answer.tokens:
            return self._finish(answer, "timeout")
        self._end(answer)
        message = f"the answer had not begun after {answer.job.timeout_s:g} s; the server is busy, or the prompt long"
        return [Failure(answer.job.id, 504, message)]

    def _safely(self, answer: _Answer, work: Callable[[], list[Event]]) -> list[Event]:
        """What `work` for a job says; its mistake is that job's failure."""
        try:
            return work()
        except Exception as error:
            self._forget(answer)
            return [_failure(answer.job, error)]

    def _end(self, answer: _Answer) -> None:
        """Takes a job out, and keeps what was computed for it."""
        del self._answers[answer.sequence]
        self._put(answer, self._batch.end(answer.sequence))

    def _forget(self, answer: _Answer) -> None:
        """Takes a job out, and keeps nothing of it."""
        self._answers.pop(answer.sequence, None)
        self._batch.end(answer.sequence)

    def _put(self, answer: _Answer, cache: PromptCache | None) -> None:
        """Keeps what a cache holds for prompts that begin alike. If that fails, they are computed anew, no more."""
        try:
            if cache is not None and cache.offset:
                self.prefixes.put(answer.job.adapter, cache)
        except Exception:
            self._unkept += 1

    def _new_batch(self) -> Batch:
        return Batch(self.settings.max_rows, self.kv_limit_bytes, memory=self)

    def _logprob(self, event: Token, count: int) -> TokenLogprob:
        text = self.tokenizer.token_bytes(event.token)
        if event.logprobs is None:  # a grammar leaves nothing else
            return TokenLogprob(text, 0.0, ((text, 0.0),) if count else ())
        likeliest = mx.argpartition(-event.logprobs, max(count - 1, 0))[:count]
        top = [(self.tokenizer.token_bytes(token), event.logprobs[token].item()) for token in likeliest.tolist()]
        top.sort(key=lambda each: -each[1])
        return TokenLogprob(text, event.logprobs[event.token].item(), tuple(top))


def run(connection: Connection, settings: Settings) -> None:
    """The engine's process: reads jobs from a connection and writes events to it, until the other end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may go to both processes; the server says when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            engine = Engine(*load(settings.model, chat_format=settings.chat_format), settings)
        except Phi4Error as error:
            connection.send(Broken(str(error)))
            return
        connection.send(Ready(engine.longest))
        while True:
            messages: list[Job | Cancel | Ping] = []
            while connection.poll(0 if engine.busy or messages else None):
                messages.append(connection.recv())
            for message in messages:
                if isinstance(message, Ping):
                    connection.send(Pong(message.number, engine.gauges()))
            if events := _turn(engine, messages):
                connection.send(events)


def _turn(engine: Engine, messages: Iterable[Job | Cancel | Ping]) -> list[Event]:
    """Obeys what the server says, and takes a step."""
    events: list[Event] = []
    works: list[Callable[[], list[Event]]] = [partial(_obey, engine, message) for message in messages]
    for work in [*works, engine.step]:
        try:
            events += work()
        except Exception as error:
            events += engine.fail_all(error)
    return events


def _obey(engine: Engine, message: Job | Cancel | Ping) -> list[Event]:
    if isinstance(message, Job):
        return engine.submit(message)
    if isinstance(message, Cancel):
        engine.cancel(message.job)
    return []


def _failure(job: Job, error: Exception) -> Failure:
    if isinstance(error, Phi4Error):
        return Failure(job.id, 400, str(error))
    return Failure(job.id, 500, f"the engine could not answer: {type(error).__name__}: {error}")


def _memory_limits(settings: Settings) -> tuple[int, int]:
    """Bytes for keys and values under way, and for those of earlier prompts.

    Half of what the weights leave is for answers (as much again may be in use while rows are moved), a quarter for
    earlier prompts.
    """
    total = memory_limit() if mx.metal.is_available() else memory_limit() // 2
    free = max(0, total - mx.get_active_memory() - ACTIVATION_BYTES)
    kv, prefix = settings.kv_limit_bytes, settings.prefix_limit_bytes
    return free // 2 if kv is None else kv, free // 4 if prefix is None else prefix
