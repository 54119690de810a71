"""Generation in three storeys: `generate_step` (ids), `stream_generate` (events), `generate` (a string).

Each step is queued on the device before the token of the step before is read, so that the host never keeps it waiting.
Prefill runs in chunks and computes logits for the last position alone. Decoding is a prefill of one token: the same
code takes a sequence across the LongRoPE boundary, where the whole of it is run again under the other table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any, Protocol, TypeVar, overload

import mlx.core as mx

from phi4_mlx.cache import PromptCache
from phi4_mlx.decoding import LogitsMask, Proposer, guessed_steps, masked_steps, plain_steps
from phi4_mlx.errors import RequestError
from phi4_mlx.memory import PREFILL_STEP_SIZE, memory_limit
from phi4_mlx.models.text import Model
from phi4_mlx.sampling import LogitsProcessor, check_whole

Progress = Callable[[int, int], None]
Answer = TypeVar("Answer")


class StreamingDecoder(Protocol):
    """Ids in, text out as soon as it is certain."""

    def add(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def streaming_decoder(self) -> StreamingDecoder: ...


@dataclass(frozen=True)
class GenerationResponse:
    """One step of `stream_generate`, in mlx-lm's names.

    Attributes:
        text: text that has become certain with this token; may be empty.
        token: the id drawn, or forced by a `logits_mask`.
        logprobs: log-probabilities [V], computed only if they are looked at; 0 for a token that was forced.
        prompt_tokens: tokens prefilled for this call.
        prompt_tps: tokens a second in prefill.
        generation_tokens: tokens drawn so far.
        generation_tps: tokens a second since the first.
        peak_memory: peak of MLX's memory in GB (10^9 bytes).
        reprefilled: tokens run again because the sequence has outgrown its RoPE table; else 0.
        finish_reason: "stop" or "length" at the last step, else None.
    """

    text: str
    token: int
    logprobs: mx.array
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    reprefilled: int = 0
    finish_reason: str | None = None


def generate_step(
    prompt_ids: Sequence[int] | mx.array,
    model: Model,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Iterable[LogitsProcessor] | None = None,
    logits_mask: LogitsMask | None = None,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
    max_kv_size: int | None = None,
    proposer: Proposer | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Progress | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Prefills a prompt and yields tokens; it knows no text and no end marker, so the caller stops it.

    Args:
        prompt_ids: the prompt [S], a list or an array of MLX or NumPy; with a filled cache, what comes after it.
        model: what `load` returned.
        max_tokens: how many tokens to draw at most.
        sampler: log-probabilities [n, V] -> tokens [n]; the default takes the likeliest. n is 1, and more only where a
            `proposer` has guessed.
        logits_processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        logits_mask: the tokens that may come next, looked at after the processors and before the sampler; for one
            answer only. What it forces is yielded too, and costs no step of its own.
        cache: from `model.make_cache()`; appended to. It may hold a step more than was yielded: one token, or one and
            those that a `logits_mask` forced or a `proposer` guessed.
        kv_bits: 4 or 8 quantises the keys and values of a cache that is made here.
        max_kv_size: how many tokens that cache may hold; see `phi4_mlx.cache.KVCache`.
        proposer: who guesses tokens ahead, such as `phi4_mlx.speculate.PromptLookup`; for one answer at a time.
        prefill_step_size: tokens a chunk.
        prompt_progress_callback: called with (tokens done, tokens in all) before, during and after a prefill, also one
            that a RoPE crossing makes necessary.

    Yields:
        (token, log-probabilities [V]); the latter are computed only if they are looked at.

    Raises:
        RequestError: no tokens, what are no tokens or outside the vocabulary, or more than the context holds.
    """
    prompt = _whole_numbers(prompt_ids)
    cache = _cache(model, cache, kv_bits, max_kv_size)
    check_whole("max_tokens", max_tokens, 1)
    check_whole("prefill_step_size", prefill_step_size, 1)
    _check_prompt(prompt, model, cache.offset, max_tokens)
    if proposer is not None and cache.bounded:
        raise RequestError("a proposer takes wrong guesses back, which a cache with a max_kv_size cannot; drop one")
    passes = _Passes(model, cache, sampler, list(logits_processors or ()), prefill_step_size, prompt_progress_callback)
    ids = mx.array([prompt], mx.int32)  # [1, T]
    if logits_mask is not None:
        return masked_steps(ids, max_tokens, passes, logits_mask, proposer)
    if proposer is not None:
        return guessed_steps(ids, max_tokens, passes, proposer)
    return plain_steps(ids, max_tokens, passes)


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    stop: str | Sequence[str] | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yields a `GenerationResponse` for each token, until the model ends its turn.

    Args:
        model: what `load` returned.
        tokenizer: what `load` returned.
        prompt: ids, as `tokenizer.apply_chat_template` makes them; or text, which is encoded as plain text: control
            strings in it stay text.
        stop: strings that end the text before them, also where they stretch over several tokens.
        cache: as in `generate_step`.
        options: those of `generate_step`.

    Yields:
        A response a token; the last one has a `finish_reason`.

    Raises:
        RequestError: as `generate_step`.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    cache = _cache(model, cache, options.pop("kv_bits", None), options.pop("max_kv_size", None))
    max_tokens = options.setdefault("max_tokens", 256)
    text = AnswerText(tokenizer.streaming_decoder(), stop)
    start, rerun = time.perf_counter(), cache.rerun_tokens
    with wired_memory():
        for drawn, (token, logprobs) in enumerate(generate_step(ids, model, cache=cache, **options), 1):
            now = time.perf_counter()
            if drawn == 1:
                first, prompt_tps = now, len(ids) / (now - start)
            ended = token in tokenizer.eos_ids
            certain, stopped = ("", False) if ended else text.add(token)
            reason = "stop" if ended or stopped else "length" if drawn == max_tokens else None
            yield GenerationResponse(
                text=certain if stopped or reason is None else certain + text.finish(),
                token=token,
                logprobs=logprobs,
                prompt_tokens=len(ids),
                prompt_tps=prompt_tps,
                generation_tokens=drawn,
                generation_tps=(drawn - 1) / (now - first) if drawn > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                reprefilled=cache.rerun_tokens - rerun,
                finish_reason=reason,
            )
            rerun = cache.rerun_tokens
            if reason:
                break


@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    schema: Mapping[str, Any] | None = None,
    verbose: bool = False,
    **options: Any,
) -> str: ...


@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    schema: type[Answer],
    verbose: bool = False,
    **options: Any,
) -> Answer: ...


def generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    schema: Any = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """The whole answer as a string, or as an instance of a class.

    Args:
        model: what `load` returned.
        tokenizer: what `load` returned.
        prompt: as in `stream_generate`.
        schema: what the answer must obey: a JSON schema, a dataclass, or a pydantic model (a class with
            `model_json_schema` and `model_validate_json`). It ends within `max_tokens`.
        verbose: prints the text as it comes, then counts and speeds.
        options: those of `stream_generate`.

    Returns:
        The text, without the end marker; with a class as the schema, an instance of it.

    Raises:
        RequestError: as `generate_step`; the schema cannot be kept, or `max_tokens` are too few for it.
    """
    constraint = read = None
    if schema is not None:
        constraint, read = _schema_mask(schema, tokenizer, model.config.vocab_size, options)
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, **options):
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(
            f"\nprompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
            f"generation: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s\n"
            f"peak memory: {response.peak_memory:.3f} GB"
        )
    text = "".join(pieces)
    if constraint is not None and not constraint.complete:
        raise RequestError(f"the answer had not ended after max_tokens {options['max_tokens']}; raise max_tokens")
    return text if read is None else read(text)


def _schema_mask(schema: Any, tokenizer: Any, vocab_size: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """The constraint of a schema, put into `options`, and what makes an instance of the answer, if it is to be one."""
    from phi4_mlx.constrain import Constraint, class_answer, json_schema

    for other in ("stop", "logits_mask"):  # either would leave half an answer
        if options.get(other) is not None:
            raise RequestError(f"schema and {other} cannot be given both; leave one out")
    max_tokens = options.setdefault("max_tokens", 256)
    check_whole("max_tokens", max_tokens, 1)
    grammar, read = (json_schema(schema), None) if isinstance(schema, Mapping) else class_answer(schema)
    options["logits_mask"] = constraint = Constraint(grammar, tokenizer, vocab_size, max_tokens)
    return constraint, read


def _whole_numbers(ids: Sequence[int] | mx.array) -> list[int]:
    """Ids from a list, or from an array of MLX or NumPy."""
    try:
        return [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise RequestError(
            f"the prompt must be token ids, whole numbers in one dimension, not {ids!r:.60}; tokenizer.encode makes "
            "them of a text"
        ) from None


def _cache(model: Model, cache: PromptCache | None, kv_bits: int | None, max_kv_size: int | None) -> PromptCache:
    """The cache given, or a new one of the kind that is asked for."""
    if cache is None:
        return model.make_cache(kv_bits=kv_bits, max_kv_size=max_kv_size)
    if kv_bits is not None or max_kv_size is not None:
        raise RequestError("a cache that is given has its kind already; give kv_bits and max_kv_size to make_cache")
    return cache


def _check_prompt(prompt: list[int], model: Model, cached: int, max_tokens: int) -> None:
    context, V = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise RequestError(f"the prompt has 0 tokens; it needs at least 1, and the context holds {context}")
    if not (min(prompt) >= 0 and max(prompt) < V):
        outside = next(token for token in prompt if not 0 <= token < V)
        raise RequestError(f"token {outside} of the prompt is outside the model's vocabulary of {V}")
    total = cached + len(prompt) + max_tokens
    if total > context:
        before = f"{cached} cached tokens, " if cached else ""
        raise RequestError(
            f"{before}{len(prompt)} prompt tokens and max_tokens {max_tokens} come to {total}, and the context holds "
            f"{context}; shorten the prompt or lower max_tokens"
        )


@dataclass
class _Passes:
    """The forward passes of one answer, and how tokens are drawn from them; see `phi4_mlx.decoding.Passes`."""

    model: Model
    cache: PromptCache
    sampler: Callable[[mx.array], mx.array] | None
    processors: list[LogitsProcessor]
    step_size: int
    progress: Progress | None

    def advance(self, ids: mx.array, rows: int, decoding: bool) -> mx.array:
        """Runs ids [1, T] in chunks, and all of the sequence at a RoPE crossing; the last chunk has all the rows."""
        T, cache, progress = ids.shape[1], self.cache, self.progress
        decoding = decoding or (T == 1 and cache.offset > 0)
        ids = cache.admit(ids, reach=cache.offset + T)
        total = ids.shape[1]
        stops = [*range(self.step_size, total - rows + 1, self.step_size), total]
        if progress and decoding and total == T:
            progress = None
        try:
            if progress:
                progress(0, total)
            for start, stop in pairwise([0, *stops]):
                hidden = self.model.model(ids[:, start:stop], cache, rows=rows)
                if stop < total:
                    mx.eval([layer.state for layer in cache])
                    mx.clear_cache()
                    if progress:
                        progress(stop, total)
        finally:
            cache.forget_reach()
        logits = self.model.logits(hidden)[0]
        if progress:
            mx.eval(logits)
            progress(total, total)
        return logits

    def draw(
        self, logits: mx.array, row: int | None = None, mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Tokens, as processors, mask and sampler have it in turn."""
        rows = range(logits.shape[0]) if row is None else [row]
        if self.processors:
            logits = mx.concatenate([self._processed(logits, each) for each in rows])
        elif row is not None:
            logits = logits[row : row + 1]
        if mask is not None:
            logits = mx.where(mask, logits, -mx.inf)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return (mx.argmax(logits, axis=-1) if self.sampler is None else self.sampler(logprobs)), logprobs

    def _processed(self, logits: mx.array, row: int) -> mx.array:
        """A row of the logits, bent by what the tokens before it are."""
        ids, bent = self.cache.ids[0], logits[row : row + 1]
        for process in self.processors:
            bent = process(ids[: ids.shape[0] - (logits.shape[0] - 1 - row)], bent)
        return bent


class AnswerText:
    """The text of an answer as it becomes certain: whole characters, and nothing that may begin a stop string.

    Attributes:
        stopped_by: the stop string that has ended it, if one has.
    """

    stopped_by: str | None = None

    def __init__(self, decoder: StreamingDecoder, stop: str | Sequence[str] | None):
        self._decoder = decoder
        stops = [stop] if isinstance(stop, str) else () if stop is None else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(each, str) and each for each in stops):
            raise RequestError(f"stop must be a list of strings that are not empty, not {stop!r}")
        self._stops = stops
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that `token` makes certain, and whether a stop string has ended it."""
        self._held += self._decoder.add(token)
        return self._release()

    def finish(self) -> str:
        """What was still held back; nothing after a stop string."""
        if self.stopped_by:
            return ""
        self._held += self._decoder.finish()
        certain, stopped = self._release()
        return certain if stopped else certain + self._held

    def _release(self) -> tuple[str, bool]:
        held = self._held
        found = [(at, each) for each in self._stops if (at := held.find(each)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda place: place[0])
            return held[:at], True
        keep = max((n for each in self._stops for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        certain, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return certain, False


@contextlib.contextmanager
def wired_memory() -> Iterator[None]:
    """Lets Metal keep the weights resident while tokens are drawn; without it, large models page on macOS 15."""
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(memory_limit())
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
