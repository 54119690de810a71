"""Generation in three storeys: `generate_step` (ids), `stream_generate` (events), `generate` (a string).

Each step is queued on the device before the token of the step before is read, so that the host never keeps it waiting.
Prefill runs in chunks and computes logits for the last position alone. Decoding is a prefill of one token: the same
code takes a sequence across the LongRoPE boundary, where the whole of it is run again under the other table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

import mlx.core as mx

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.generation.memory import memory_limit
from phi4_mlx.generation.steps import (
    _cache,
    generate_step,
)
from phi4_mlx.models.cache import PromptCache
from phi4_mlx.models.text import Model

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
    from phi4_mlx.grammar.constraint import Constraint
    from phi4_mlx.grammar.grammars import class_answer, json_schema

    for other in ("stop", "logits_mask"):  # either would leave half an answer
        if options.get(other) is not None:
            raise RequestError(f"schema and {other} cannot be given both; leave one out")
    max_tokens = options.setdefault("max_tokens", 256)
    check_whole("max_tokens", max_tokens, 1)
    grammar, read = (json_schema(schema), None) if isinstance(schema, Mapping) else class_answer(schema)
    options["logits_mask"] = constraint = Constraint(grammar, tokenizer, vocab_size, max_tokens)
    return constraint, read


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
