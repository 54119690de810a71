"""The engine: jobs in, events out, one step at a time, over one batch, in a process of its own.

An error of one job fails that job alone. Whatever ends the process (Metal out of memory is an abort that Python cannot
catch) is for the supervisor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.cache_store.store import CacheStore
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.options import LogitsMask
from phi4_mlx.generation.prefill import ChunkPace
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.ranks.leader import LedModel
from phi4_mlx.server.engine.answer import Answer, compiled_constraint, failure_of, token_logprob
from phi4_mlx.server.engine.compiling import Compiling
from phi4_mlx.server.engine.job_caches import JobCaches
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import Event, Failure, Finish, Job, Piece
from phi4_mlx.server.engine.recalling import Recalling
from phi4_mlx.server.engine.sequences import JobSequences
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.tokens.tokenizer import Tokenizer

ACTIVATION_BYTES = 2**29  # activation memory of a forward pass
LEAST_TOKENS = 256  # of a prompt and its answer; an engine with room for fewer does not start


class Engine:
    """One model, its adapters, and the running jobs.

    Args:
        base: the model, without the adapters of the settings.
        tokenizer: of the model.
        settings: the settings.
        draft: the model that guesses; None for a lookup.
        warn: called with a line about what the store of caches cannot do.

    Attributes:
        prefixes: caches of earlier prompts.
        guessing: the guesses of all jobs so far.
        sequences: makes them of jobs.
        drawn_tokens: answer tokens so far.
    """

    def __init__(
        self,
        base: LanguageModel,
        tokenizer: Tokenizer,
        settings: Settings,
        draft: LanguageModel | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ):
        self.tokenizer, self.settings = tokenizer, settings
        self.guessing = Guessing(timed=settings.speculate == "auto")
        self.kv_limit_bytes, prefix_limit_bytes = _memory_limits(base, settings)
        self.sequences = JobSequences(base, tokenizer, settings, draft)
        self.drawn_tokens = 0
        self._answers: dict[BatchSequence, Answer] = {}
        self._compiling = Compiling(partial(compiled_constraint, tokenizer, base.config.vocab_size))
        store = _opened_store(settings, self.sequences.model, tokenizer, warn)
        self.prefixes = PrefixCache(prefix_limit_bytes, store)
        self._recalling = Recalling(self.prefixes, self.kv_limit_bytes)
        self._caches = JobCaches(self.prefixes, self._answers)
        self.batch = self._new_batch()

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens computed so far, without those found in the prefix cache."""
        return self._caches.prefilled_tokens

    @property
    def busy(self) -> bool:
        """True if there are jobs to step."""
        return bool(self._answers or self._compiling)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer: the limit of the context, or of memory."""
        fixed, token_bytes = self.sequences.context_bytes
        tokens = (self.kv_limit_bytes - fixed) // max(token_bytes, 1)
        return min(self.sequences.model.config.max_position_embeddings, tokens)

    def submit(self, job: Job) -> list[Event]:
        """Queues a job, once its grammar is compiled; returns its failure if it cannot be served."""
        if job.grammar is not None:
            self._compiling.add(job)
            return []
        return self._queue(job)

    def _queue(self, job: Job, compiled: Callable[[], LogitsMask | None] = lambda: None) -> list[Event]:
        try:
            answer = self._answer(job, compiled())
        except Exception as error:
            return [failure_of(job, error)]
        self._answers[answer.sequence] = answer
        if not self._recalling.add(answer):
            self.batch.add(answer.sequence)
        return []

    def cancel(self, job: int) -> None:
        """Ends a job whose client has left; its cache is kept for prompts with the same prefix."""
        self._compiling.cancel(job)
        for answer in list(self._answers.values()):
            if answer.job.id == job:
                self._end(answer)

    def step(self) -> list[Event]:
        """One step of all running jobs."""
        events: list[Event] = []
        for job, compiled in self._compiling.done(idle=not self._answers):
            events += self._queue(job, compiled)
        for answer in self._recalling.done(idle=not (self.batch.active or self.batch.waiting)):
            if answer.sequence in self._answers:  # else its client has left
                self.batch.add(answer.sequence)
        for event in self.batch.step():
            if (answer_of := self._answers.get(event.sequence)) is not None:  # else it has ended in this step
                events += self._safely(answer_of, partial(self._events_of, answer_of, event))
        now = time.monotonic()
        for answer in [each for each in self._answers.values() if each.ends_at <= now]:
            events += self._safely(answer, partial(self._out_of_time, answer))
        return events

    def fail_all(self, error: Exception) -> list[Event]:
        """Resets after a step that failed as a whole: no running job can be trusted."""
        events: list[Event] = [failure_of(answer.job, error) for answer in self._answers.values()]
        self._answers.clear()
        self.batch = self._new_batch()
        self.prefixes.clear()
        mx.clear_cache()
        return events

    def close(self, timeout_s: float) -> None:
        """Ends all jobs, and stores what is in memory."""
        for answer in list(self._answers.values()):
            self._end(answer)
        self.prefixes.close(timeout_s)

    def gauges(self) -> dict[str, float]:
        """Counts and bytes by metric name."""
        return {
            "answers_under_way": len(self._answers) + len(self._compiling),
            "prefilled_tokens_total": self.prefilled_tokens,
            "drawn_tokens_total": self.drawn_tokens,
            **self.guessing.gauges(),
            "kv_bytes": self.batch.nbytes,
            "kv_limit_bytes": self.kv_limit_bytes,
            "prefix_cache_bytes": self.prefixes.nbytes,
            "prefix_cache_limit_bytes": self.prefixes.limit_bytes,
            "prefix_cache_entries": len(self.prefixes),
            "prefix_cache_failures_total": self._caches.failures,
            **({} if self.prefixes.store is None else self.prefixes.store.gauges()),
            "active_memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def _answer(self, job: Job, constraint: LogitsMask | None) -> Answer:
        sequence = self.sequences.of(job, constraint)
        if len(job.prompt) + job.max_tokens > self.longest:
            raise RequestError(
                f"{len(job.prompt)} prompt tokens and max_tokens {job.max_tokens} come to more than {self.longest}, "
                f"the limit of this server{limit_note(self)}; shorten the prompt or lower max_tokens"
            )
        text = AnswerText(self.tokenizer.streaming_decoder(), list(job.stop))
        return Answer(job, sequence, text, time.monotonic() + job.timeout_s)

    def _events_of(self, answer: Answer, event: Token | Fault) -> list[Event]:
        """The events for the client of a drawn token or a failure."""
        if isinstance(event, Fault):
            self._forget(answer)
            return [failure_of(answer.job, event.error)]
        answer.tokens += 1
        self.drawn_tokens += 1
        job = answer.job
        logprobs = () if job.top_logprobs is None else (token_logprob(self.tokenizer, event, job.top_logprobs),)
        if event.token in self.tokenizer.eos_ids:
            return self._finish(answer, "stop")
        text, stopped = answer.text.add(event.token)
        piece: list[Event] = [Piece(job.id, text, logprobs, answer.forced)] if text or logprobs else []
        if stopped:
            return [*piece, *self._finish(answer, "stop")]
        if answer.tokens == job.max_tokens:
            return [*piece, *self._finish(answer, "length")]
        return piece

    def _finish(self, answer: Answer, reason: Literal["stop", "length", "timeout"]) -> list[Event]:
        job = answer.job
        rest, forced = answer.text.finish(), answer.forced
        if forced and reason == "stop":
            reason = "length"
        self._end(answer)
        cached, stopped_by = answer.cached_tokens or 0, answer.text.stopped_by
        finish = Finish(job.id, reason, stopped_by, len(job.prompt), cached, answer.tokens)
        return [Piece(job.id, rest, (), forced), finish] if rest else [finish]

    def _out_of_time(self, answer: Answer) -> list[Event]:
        """Cuts an answer at its time limit; one without tokens fails, so that it is not taken for an empty answer."""
        if answer.tokens:
            return self._finish(answer, "timeout")
        self._end(answer)
        message = f"no token after {answer.job.timeout_s:g} s; the server is busy, or the prompt is long"
        return [Failure(answer.job.id, 504, message)]

    def _safely(self, answer: Answer, work: Callable[[], list[Event]]) -> list[Event]:
        """The events of `work` for a job; an exception fails that job."""
        try:
            return work()
        except Exception as error:
            self._forget(answer)
            return [failure_of(answer.job, error)]

    def _end(self, answer: Answer) -> None:
        """Ends a job and keeps its cache."""
        del self._answers[answer.sequence]
        self._caches.put(answer, self.batch.end(answer.sequence))

    def _forget(self, answer: Answer) -> None:
        """Ends a job and drops its cache."""
        self._answers.pop(answer.sequence, None)
        self.batch.end(answer.sequence)

    def _new_batch(self) -> Batch:
        rows, limit_ms = self.settings.max_rows, self.settings.max_step_ms
        pace = None if limit_ms is None else ChunkPace(limit_ms / 1000)
        return Batch(rows, self.kv_limit_bytes, prefixes=self._caches, guessing=self.guessing, pace=pace)


def _opened_store(
    settings: Settings, model: LanguageModel, tokenizer: Tokenizer, warn: Callable[[str], None]
) -> CacheStore | None:
    """The store of the settings; the server has checked it, and one that is lost since costs a line."""
    try:
        return None if settings.store is None else settings.store.make_store(model, tokenizer, warn)
    except RequestError as error:
        warn(str(error))
        return None


def check_room(engine: Engine) -> None:
    """Checks that there is memory for at least a short answer.

    Raises:
        RequestError: there is not; states the least number of bytes.
    """
    model = engine.sequences.model
    least = min(LEAST_TOKENS, model.config.max_position_embeddings)
    if engine.longest < least:
        fixed, token_bytes = engine.sequences.context_bytes
        needed = fixed + least * max(token_bytes, 1)
        raise RequestError(
            f"running answers may take {engine.kv_limit_bytes:,} bytes, and one of {least} tokens takes {needed:,}; "
            f"use --kv-cache-bytes {needed} or more, or a smaller model"
        )


def limit_note(engine: Engine) -> str:
    """The text that follows the engine's limit in messages: the note of the context, if that is the limit."""
    config = engine.sequences.model.config
    return config.context_note if engine.longest == config.max_position_embeddings else ""


def _memory_limits(base: LanguageModel, settings: Settings) -> tuple[int, int]:
    """(bytes for keys and values of running jobs, bytes for the prefix cache).

    Running jobs get half of the memory beside the weights (as much again may be in use while rows are moved), the
    prefix cache a quarter.
    """
    total = memory_limit() if mx.metal.is_available() else memory_limit() // 2
    unread = sum(int(array.nbytes) for name, array in tree_flatten(base.parameters()) if base.on_demand(name))
    if base.adapters is not None:
        unread += sum(base.adapters.nbytes.values())
    free = max(0, total - mx.get_active_memory() - unread - ACTIVATION_BYTES)
    kv, prefix = settings.kv_limit_bytes, settings.prefix_limit_bytes
    burden = base.leader.burden if isinstance(base, LedModel) else 1.0
    return free // 2 if kv is None else kv, int(free / burden) // 4 if prefix is None else prefix
