"""One answer with tools, a deadline and a parser of calls, assembled from pieces of text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse, stream
from phi4_mlx.generation.thoughts import Part, ThoughtSplitter
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.parser import ToolCallParser

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.models.prompt_cache import PromptCache
    from phi4_mlx.tokens.tokenizer import Tokenizer


class AnswerAssembler:
    """Assembles one answer from pieces of text, and separates its thoughts, text and tool calls.

    The pieces may come from a model in this process (see `stream_answer`) or from another process.

    Attributes:
        reason: "" while the answer is under way; then the finish reason of its source, "cancelled" or "timeout".
        prompt_tokens: tokens in the whole prompt; this count and the next two are set by `stream_answer`.
        cached_tokens: prompt tokens that were in the cache.
        answer_tokens: tokens drawn.
    """

    def __init__(
        self,
        tools: Iterable[Any],
        *,
        marked: bool = False,
        ends_at: float = float("inf"),
        cancelled: Callable[[], bool] | None = None,
        thinks: bool = False,
    ) -> None:
        """Starts an empty answer.

        Args:
            tools: the declared tools, as for `ToolCallParser`; without any, the whole answer is text.
            marked: reads JSON without a tool call marker as text.
            ends_at: the deadline, on the clock of `time.monotonic`, in seconds.
            cancelled: polled between pieces and between prefill chunks, True stops the answer; None for nobody.
            thinks: True separates the thoughts at the start; text in them is never a call.
        """
        self._parser = ToolCallParser(tools, marked)
        self._ends_at, self._cancelled = ends_at, cancelled
        self._finished = False
        self._splitter = ThoughtSplitter() if thinks else None
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._returned = 0  # pieces of thoughts that `new_thought` has returned
        self._whole = False  # ended by the model itself
        self.reason = ""
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0

    @property
    def text(self) -> str:
        """The answer so far, without thoughts and tool calls; each reading takes time in proportion to it."""
        return "".join(self._pieces)

    @property
    def thought(self) -> str:
        """The thoughts so far."""
        return "".join(self._thoughts)

    @property
    def reply(self) -> str:
        """The text as the model wrote it so far: thoughts with their tags, and the answer without tool calls."""
        return self.text if self._splitter is None else self._splitter.head + self.text

    def new_thought(self) -> str:
        """The thoughts that have come since the last call."""
        start, self._returned = self._returned, len(self._thoughts)
        return "".join(self._thoughts[start:])

    @property
    def may_stop(self) -> bool:
        """True if there is a deadline, or somebody who may cancel."""
        return self._cancelled is not None or self._ends_at < float("inf")

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The tool calls so far."""
        return self._parser.calls

    @property
    def complaint(self) -> str | None:
        """The reason why a tool call was left as text, in one line; None if none was."""
        return self._parser.error

    def add(
        self, text: str, finish_reason: str | None = None, *, forced: bool = False, by_stop_string: bool = False
    ) -> str:
        """Takes the next piece, the last one with its finish reason; once `reason` is set, the answer is over.

        Args:
            text: the piece.
            finish_reason: the reason of its source for the end; None if more pieces follow.
            forced: True if `max_tokens` has forced the piece: it completes no call.
            by_stop_string: True if a stop string ended the answer, which may be inside a call.

        Returns:
            The text that is now known not to belong to a call.
        """
        if forced:
            self._parser.cut()
        final = self._parser.add(text if self._splitter is None else self._without_thought(self._splitter.add(text)))
        self._pieces.append(final)
        self.reason = finish_reason or ""
        self._whole = self.reason == "stop" and not by_stop_string
        ended = self.reason or self.stopped()
        return final + self.finish() if ended else final

    def finish(self) -> str:
        """Ends the answer, also early; returns the text that was kept back as a possible start of a call."""
        if self._finished:
            return ""
        self._finished = True
        last = "" if self._splitter is None else self._parser.add(self._without_thought(self._splitter.finish()))
        if not self._whole:
            self._parser.cut()
        rest = last + self._parser.finish()
        self._pieces.append(rest)
        return rest

    def _without_thought(self, part: Part) -> str:
        """Stores the thoughts of a part; returns its text of the answer."""
        if part.thought:
            self._thoughts.append(part.thought)
        return part.answer

    def stopped(self) -> bool:
        """True if the answer is cancelled or out of time; `reason` then says which."""
        if self._cancelled is not None and self._cancelled():
            self.reason = "cancelled"
        elif time.monotonic() >= self._ends_at:
            self.reason = "timeout"
        return bool(self.reason)


class _Stopped(Exception):
    """Interrupts a prefill: the answer is cancelled or out of time."""


def stream_answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    cache: PromptCache,
    options: DecodeOptions,
    answer: AnswerAssembler,
    grammar: Grammar | None,
    must_end: bool,
) -> Iterator[GenerationResponse]:
    """Generates an answer; if `answer` is stopped, also during a prefill, it ends early without an error.

    Args:
        model, tokenizer, options: as for `stream`; a `grammar` takes the place of `logits_mask`.
        prompt: the whole prompt, as ids.
        cache: the prefix that it shares with the prompt is not prefilled again.
        answer: a new one; takes the pieces, the counts and the finish reason.
        grammar: restricts the answer; None allows any.
        must_end: brings the answer to its end within `max_tokens`, as a schema needs; the finish reason is then
            "length", and a call that is brought to its end is text.

    Yields:
        One response a token, with thoughts and tool calls removed from its text.

    Raises:
        RequestError: as for `generate_step`; or the grammar cannot be compiled.
    """
    if grammar is not None:
        from phi4_mlx.grammar.constraint import Constraint

        mask = Constraint(grammar, tokenizer, model.config.vocab_size, options.max_tokens if must_end else None)
        options = replace(options, logits_mask=mask)
    show_progress = options.prompt_progress_callback

    def check(done: int, total: int) -> None:
        if show_progress is not None:
            show_progress(done, total)
        if answer.stopped():
            raise _Stopped

    if show_progress is not None or answer.may_stop:  # a callback costs a wait for the last chunk
        options = replace(options, prompt_progress_callback=check)
    with shared_stream():
        new = cache.reuse(prompt)
    answer.prompt_tokens, answer.cached_tokens = len(prompt), len(prompt) - len(new)
    if answer.stopped():
        return
    with contextlib.suppress(_Stopped):
        for response in stream(model, tokenizer, new, cache, options):
            answer.answer_tokens = response.generation_tokens
            by_stop_string = response.finish_reason == "stop" and response.token not in tokenizer.eos_ids
            text = answer.add(
                response.text, response.finish_reason, forced=response.forced, by_stop_string=by_stop_string
            )
            reason = answer.reason or None
            yield replace(response, text=text, finish_reason=reason, thought=answer.new_thought())
            if answer.reason:
                return


def tool_grammar(tools: Sequence[Any], choice: str | Mapping[str, Any], strict: bool) -> Grammar | None:
    """The grammar of an answer under `tool_choice` and `strict` of `run_tools`; None if the answer is free.

    Raises:
        RequestError: `choice` names an unknown tool, or a tool's schema has no grammar.
    """
    if choice == "none" or (choice == "auto" and not (strict and tools)):
        return None
    from phi4_mlx.grammar.grammars import tool_calls

    return tool_calls(tools, choice)
