"""`stream_generate` yields an event a token, `generate` returns a string; both stand on `decode`.

Each step is queued on the device before the token of the previous step is read, so that the host never delays it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.options import DecodeOptions, is_forced
from phi4_mlx.generation.steps import decode, open_cache
from phi4_mlx.generation.stop_strings import StopStrings
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.safe import safe
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.amount import amount, size

if TYPE_CHECKING:
    from phi4_mlx.tokens.tokenizer import Tokenizer as Phi4Tokenizer

Answer = TypeVar("Answer")


class StreamingDecoder(Protocol):
    """Ids in, text out as soon as it is final."""

    def add(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """The part of a tokenizer that generation uses."""

    @property
    def eos_ids(self) -> frozenset[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def streaming_decoder(self) -> StreamingDecoder: ...


@dataclass(frozen=True)
class GenerationResponse:
    """One token of `stream_generate`, in mlx-lm's names.

    Attributes:
        text: text that this token makes final; may be empty.
        token: the id drawn, or forced by a `logits_mask`.
        logprobs: log-probabilities [V], computed only when read; 0 for a forced token.
        prompt_tokens: tokens prefilled for this call.
        prompt_tps: prefilled tokens per second.
        generation_tokens: tokens drawn so far.
        generation_tps: tokens per second since the first.
        peak_memory: peak of MLX's memory in GB (10^9 bytes).
        reprefilled: tokens run again because the sequence has crossed the RoPE boundary; else 0.
        finish_reason: "stop" or "length" at the last token, else None; "length" also for a forced end.
        forced: True from the token on with which a grammar brings the answer to an end within `max_tokens`; the model
            itself would have continued otherwise.
        thought: text of the model's thoughts, where they are separated from the answer; `stream_generate` does not.
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
    forced: bool = False
    thought: str = ""


def stream_generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    cache: PromptCache | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yields a `GenerationResponse` for each token, until the model ends its turn.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: ids, as `tokenizer.apply_chat_template` returns them; or text, which is encoded as plain text: control
            strings in it stay text.
        cache: as for `generate_step`.
        options: those of `generate_step`, and `stop`: a string or strings that end the text before them, also across
            tokens.

    Yields:
        One response a token; the last one has a `finish_reason`.

    Raises:
        RequestError: as for `generate_step`.
    """
    return stream(model, tokenizer, prompt, cache, DecodeOptions(**options))


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    cache: PromptCache | None,
    options: DecodeOptions,
) -> Iterator[GenerationResponse]:
    """`stream_generate` with its options in one value."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    cache = open_cache(model, cache, options)
    text = AnswerText(tokenizer.streaming_decoder(), options.stop)
    start, rerun = time.perf_counter(), cache.rerun_tokens
    with wired_memory():
        for drawn, (token, logprobs) in enumerate(decode(ids, model, cache, options), 1):
            now = time.perf_counter()
            if drawn == 1:
                first, prompt_tps = now, len(ids) / (now - start)
            ended = token in tokenizer.eos_ids
            final, stopped = ("", False) if ended else text.add(token)
            forced = is_forced(options.logits_mask)
            over = ended or stopped
            reason = "stop" if over and not forced else "length" if over or drawn == options.max_tokens else None
            yield GenerationResponse(
                text=final if stopped or reason is None else final + text.finish(),
                token=token,
                logprobs=logprobs,
                prompt_tokens=len(ids),
                prompt_tps=prompt_tps,
                generation_tokens=drawn,
                generation_tps=(drawn - 1) / (now - first) if drawn > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                reprefilled=cache.rerun_tokens - rerun,
                finish_reason=reason,
                forced=forced,
            )
            rerun = cache.rerun_tokens
            if reason:
                break


@overload
def generate(
    model: LanguageModel,
    tokenizer: Phi4Tokenizer,
    prompt: str | Sequence[int],
    *,
    schema: Mapping[str, Any] | None = None,
    verbose: bool = False,
    **options: Any,
) -> str: ...


@overload
def generate(
    model: LanguageModel,
    tokenizer: Phi4Tokenizer,
    prompt: str | Sequence[int],
    *,
    schema: type[Answer],
    verbose: bool = False,
    **options: Any,
) -> Answer: ...


def generate(
    model: LanguageModel,
    tokenizer: Phi4Tokenizer,
    prompt: str | Sequence[int],
    *,
    schema: Mapping[str, Any] | type[Answer] | None = None,
    verbose: bool = False,
    **options: Any,
) -> str | Answer:
    """The whole answer as a string, or as an instance of a class.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: as for `stream_generate`.
        schema: a JSON schema, a dataclass or a pydantic model (a class with `model_json_schema` and
            `model_validate_json`) that the answer obeys. The answer ends within `max_tokens`; a warning says so if
            that was not the end that the model would have written.
        verbose: prints the text as it comes, then counts and speeds.
        options: those of `stream_generate`.

    Returns:
        The text, without the end marker; with a class as the schema, an instance of it.

    Raises:
        RequestError: as for `generate_step`; the schema is not supported, or `max_tokens` is too small for it.
    """
    cache, chosen = options.pop("cache", None), DecodeOptions(**options)
    if schema is None:
        return _text(stream(model, tokenizer, prompt, cache, chosen), verbose)
    for other in ("stop", "logits_mask"):  # either would leave half an answer
        if options.get(other) is not None:
            raise RequestError(f"schema and {other} exclude each other; leave one out")
    from phi4_mlx.grammar.constraint import Constraint
    from phi4_mlx.grammar.grammars import class_answer, json_schema

    grammar, read = (json_schema(schema), str) if isinstance(schema, Mapping) else class_answer(schema)
    constraint = Constraint(grammar, tokenizer, model.config.vocab_size, chosen.max_tokens)
    text = _text(stream(model, tokenizer, prompt, cache, replace(chosen, logits_mask=constraint)), verbose)
    if not constraint.complete:
        raise RequestError(f"the answer had not ended after max_tokens {chosen.max_tokens}; raise max_tokens")
    if constraint.forced:
        message = f"the answer was brought to its end by max_tokens {chosen.max_tokens}; raise it for a whole answer"
        warnings.warn(message, stacklevel=2)
    answer: str | Answer = read(text)
    return answer


def _text(responses: Iterator[GenerationResponse], verbose: bool) -> str:
    """The text of all responses; with `verbose` it is printed too, with counts and speeds."""
    pieces = []
    for response in responses:
        pieces.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(
            f"\nprompt: {amount(response.prompt_tokens, 'token')}, {response.prompt_tps:.1f} tokens/s\n"
            f"generation: {amount(response.generation_tokens, 'token')}, {response.generation_tps:.1f} tokens/s\n"
            f"peak memory: {size(1e9 * response.peak_memory)}"
        )
    return "".join(pieces)


class AnswerText:
    """The text of an answer as it becomes final: whole characters, and nothing that may begin a stop string.

    Attributes:
        stopped_by: the stop string that ended the answer; None if none has.
    """

    stopped_by: str | None = None

    def __init__(self, decoder: StreamingDecoder, stop: str | Sequence[str] | None):
        self._decoder = decoder
        stops = [stop] if isinstance(stop, str) else () if stop is None else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(each, str) and each for each in stops):
            raise RequestError(f"stop must be a list of non-empty strings, not {stop!r}")
        self._stops = StopStrings(stops)
        self._held: deque[str] = deque()  # text that may begin a stop string

    def add(self, token: int) -> tuple[str, bool]:
        """(text that `token` makes final, True if a stop string has ended it)."""
        return self._release(self._decoder.add(token))

    def finish(self) -> str:
        """The rest of the text; empty after a stop string."""
        if self.stopped_by:
            return ""
        final, stopped = self._release(self._decoder.finish())
        return final if stopped else final + "".join(self._held)

    def _release(self, new: str) -> tuple[str, bool]:
        if not new:
            return "", False
        begun = self._stops.begun
        self._held.append(new)
        if found := self._stops.read(new):
            end, self.stopped_by = found
            return self._take(begun + end - len(self.stopped_by)), True
        return self._take(begun + len(new) - self._stops.begun), False

    def _take(self, count: int) -> str:
        """Removes the first characters of the text that is held, and returns them."""
        taken = []
        while count:
            piece = self._held.popleft()
            if count < len(piece):
                self._held.appendleft(piece[count:])
            taken.append(piece[:count])
            count -= len(taken[-1])
        return "".join(taken)


@contextlib.contextmanager
def wired_memory() -> Iterator[None]:
    """Lets Metal keep the weights wired while tokens are drawn; otherwise large models page on macOS 15."""
    if safe("wired") or not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(memory_limit())
    try:
        yield
    finally:
        with shared_stream():
            mx.synchronize()
            mx.set_wired_limit(before)
