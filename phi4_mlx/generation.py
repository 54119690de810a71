"""Generation in three storeys: `generate_step` (ids), `stream_generate` (events), `generate` (a string).

Each step is queued on the device before the token of the step before is read, so that the host never keeps it waiting.
Prefill runs in chunks and computes logits for the last position alone. Decoding is a prefill of one token: the same
code takes a sequence across the LongRoPE boundary, where the whole of it is run again under the other table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol

import mlx.core as mx

from phi4_mlx.cache import PromptCache
from phi4_mlx.errors import RequestError
from phi4_mlx.models.text import Model
from phi4_mlx.sampling import LogitsProcessor, check_whole

PREFILL_STEP_SIZE = 2048  # tokens a chunk; hidden states of one chunk take about 100 MB in Phi-4-mini

Progress = Callable[[int, int], None]


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
        token: the id drawn.
        logprobs: log-probabilities [V], computed only if they are looked at.
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
    cache: PromptCache | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Progress | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Prefills a prompt and yields tokens; it knows no text and no end marker, so the caller stops it.

    Args:
        prompt_ids: the prompt [S], a list or an array of MLX or NumPy; with a filled cache, what comes after it.
        model: what `load` returned.
        max_tokens: how many tokens to draw at most.
        sampler: log-probabilities [1, V] -> token [1]; the default takes the likeliest.
        logits_processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        cache: from `model.make_cache()`; appended to. It may hold one token more than was yielded.
        prefill_step_size: tokens a chunk.
        prompt_progress_callback: called with (tokens done, tokens in all) before, during and after a prefill, also one
            that a RoPE crossing makes necessary.

    Yields:
        (token, log-probabilities [V]); the latter are computed only if they are looked at.

    Raises:
        RequestError: no tokens, what are no tokens or outside the vocabulary, or more than the context holds.
    """
    prompt = _whole_numbers(prompt_ids)
    cache = model.make_cache() if cache is None else cache
    check_whole("max_tokens", max_tokens, 1)
    check_whole("prefill_step_size", prefill_step_size, 1)
    _check_prompt(prompt, model, cache.offset, max_tokens)
    processors = list(logits_processors or ())

    def draw(logits: mx.array) -> tuple[mx.array, mx.array]:  # [1, V] -> [1], [V]
        for process in processors:
            logits = process(cache.ids[0], logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = mx.argmax(logits, axis=-1) if sampler is None else sampler(logprobs)
        return token, logprobs[0]

    def steps() -> Iterator[tuple[int, mx.array]]:
        ids = mx.array([prompt], mx.int32)  # [1, T]
        waiting: tuple[mx.array, mx.array] | None = None
        for drawn in range(max_tokens):
            logits = _advance(model, ids, cache, prefill_step_size, prompt_progress_callback)
            token, logprobs = draw(logits)
            mx.async_eval(token)
            if waiting is not None:
                yield int(waiting[0].item()), waiting[1]
            waiting, ids = (token, logprobs), token[:, None]
            if drawn % 256 == 255:
                mx.clear_cache()  # buffers of outgrown caches
        if waiting is not None:
            yield int(waiting[0].item()), waiting[1]

    return steps()


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
    cache = model.make_cache() if cache is None else cache
    max_tokens = options.setdefault("max_tokens", 256)
    text = _Text(tokenizer.streaming_decoder(), stop)
    start, rerun = time.perf_counter(), cache.rerun_tokens
    with _wired_memory():
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


def generate(
    model: Model, tokenizer: Tokenizer, prompt: str | Sequence[int], *, verbose: bool = False, **options: Any
) -> str:
    """The whole answer as a string.

    Args:
        model: what `load` returned.
        tokenizer: what `load` returned.
        prompt: as in `stream_generate`.
        verbose: prints the text as it comes, then counts and speeds.
        options: those of `stream_generate`.

    Returns:
        The text, without the end marker.

    Raises:
        RequestError: as `generate_step`.
    """
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
    return "".join(pieces)


def _whole_numbers(ids: Sequence[int] | mx.array) -> list[int]:
    """Ids from a list, or from an array of MLX or NumPy."""
    try:
        return [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise RequestError(
            f"the prompt must be token ids, whole numbers in one dimension, not {ids!r:.60}; tokenizer.encode makes "
            "them of a text"
        ) from None


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


def _advance(model: Model, ids: mx.array, cache: PromptCache, step_size: int, progress: Progress | None) -> mx.array:
    """Runs ids [1, T] in chunks, and all of the sequence at a RoPE crossing; the last position's logits [1, V]."""
    decoding = ids.shape[1] == 1 and cache.offset > 0
    ids = cache.admit(ids, reach=cache.offset + ids.shape[1])
    total = ids.shape[1]
    if progress and decoding and total == 1:
        progress = None
    try:
        if progress:
            progress(0, total)
        for start in range(0, total, step_size):
            hidden = model.model(ids[:, start : start + step_size], cache)
            if start + step_size < total:
                mx.eval([layer.state for layer in cache])
                mx.clear_cache()
                if progress:
                    progress(start + step_size, total)
    finally:
        cache.forget_reach()
    logits = model.logits(hidden[:, -1:])[:, 0]
    if progress:
        mx.eval(logits)
        progress(total, total)
    return logits


class _Text:
    """The text of an answer as it becomes certain: whole characters, and nothing that may begin a stop string."""

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
        """What was still held back."""
        self._held += self._decoder.finish()
        certain, stopped = self._release()
        return certain if stopped else certain + self._held

    def _release(self) -> tuple[str, bool]:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        held = self._held
        keep = max((n for each in self._stops for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        certain, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return certain, False


@contextlib.contextmanager
def _wired_memory() -> Iterator[None]:
    """Lets Metal keep the weights resident while tokens are drawn; without it, large models page on macOS 15."""
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
