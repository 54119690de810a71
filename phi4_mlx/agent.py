"""The tool loop: the model answers, its calls are run, it is told the results, until an answer calls nothing.

A reply is kept as the ids that were drawn, and one cache serves all rounds, so that a round prefills the results of the
one before and nothing else. What a tool is given and what it returns is data: control strings in it stay text.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse, stream
from phi4_mlx.tools.calls import ToolCall, ToolCallParser
from phi4_mlx.tools.toolbox import Tool, Toolbox, error_text

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.cache import PromptCache
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.tokenizer import Tokenizer

MAX_ROUNDS = 8
MAX_TOKENS = 1024  # of one answer; more than elsewhere, since a call that is cut is none

Approval = Callable[[ToolCall], bool | str]


@dataclass(frozen=True)
class ToolResult:
    """What a call came to.

    Attributes:
        call: the call.
        text: what the model is told; begins with "error: " if the call failed, was refused or was not run.
    """

    call: ToolCall
    text: str


Event = GenerationResponse | ToolCall | ToolResult


@dataclass(frozen=True)
class AgentResult:
    """What `run_tools` came to.

    Attributes:
        text: the last answer, without the calls in it.
        messages: the whole conversation in OpenAI's form, calls and results included; it can be gone on with.
        rounds: how many answers the model gave.
        finish_reason: "stop"; "length" if the last answer was cut by `max_tokens` or the context is full; "max_rounds"
            or "timeout" if a limit ended it, and calls that were left are answered with an error.
        error: what looks like a call in the last answer and is none, in one line; or None.
    """

    text: str
    messages: list[dict[str, Any]]
    rounds: int
    finish_reason: str
    error: str | None = None


def run_tools(
    model: LanguageModel,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    *,
    max_rounds: int = MAX_ROUNDS,
    timeout_s: float | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    strict: bool = True,
    approve: Approval | None = None,
    on_event: Callable[[Event], Any] | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> AgentResult:
    """Answers a conversation, with tools to call on the way.

    Args:
        model: what `load` returned.
        tokenizer: what `load` returned.
        messages: as for `tokenizer.apply_chat_template`.
        tools: Python functions, described by their hints and docstrings; or (OpenAI tool, function) pairs. They run in
            the caller's thread, one after the other, with their arguments by name. What a function returns is told to
            the model: a string as it is, everything else as JSON; so is an exception, as an error.
        max_rounds: how many answers the model may give. Calls in the last of them are not run.
        timeout_s: seconds for the whole; looked at between tokens, between chunks of a prefill and before each call. A
            tool that is running is not stopped.
        tool_choice: "auto", "none", "required", or one tool by its name or in OpenAI's form. The latter two hold for
            the first answer; afterwards the choice is the model's.
        strict: whether calls are held to the tools' schemas while they are drawn; False is for a schema that cannot be
            kept, and then it matters only where a call is required.
        approve: asked before each call; True lets it run. A string refuses it and is told to the model, False refuses
            it without a reason.
        on_event: called with each event as it comes: a `GenerationResponse` for a token, whose text leaves calls out; a
            `ToolCall` that is about to be run; a `ToolResult`.
        cache: from `model.make_cache()`, to be kept from one conversation to the next.
        options: those of `stream_generate`; `max_tokens` (of each answer) is 1,024 if it is not given.

    Raises:
        RequestError: a message, a tool or an option is malformed, or the context has no room for the messages.
    """
    chosen = DecodeOptions(**{"max_tokens": MAX_TOKENS, **options})
    toolbox = Toolbox(tools, strict)
    prompt = tokenizer.apply_chat_template(messages, tools=toolbox.declarations or None)
    loop = ToolLoop(
        model,
        tokenizer,
        prompt,
        toolbox if tool_choice != "none" else Toolbox(),
        model.make_cache() if cache is None else cache,
        chosen,
        grammar=None if tool_choice == "auto" else tool_grammar(toolbox, tool_choice),
        max_rounds=max_rounds,
        timeout_s=timeout_s,
        approve=approve,
    )
    for event in loop.events():
        if on_event is not None:
            on_event(event)
    said = [dict(message) for message in messages]
    ids = call_ids(said)
    for each in loop.rounds:
        said += round_messages(each, ids)
    return AgentResult(loop.rounds[-1].text, said, len(loop.rounds), loop.finish_reason, loop.error)


@dataclass
class Round:
    """One answer of the model, and what its calls came to.

    Attributes:
        text: the answer without its calls.
        ids: the answer's tokens as they were drawn, without the end marker.
        calls: the calls in it.
        results: what the model is told of each.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def result_messages(self) -> list[dict[str, Any]]:
        """The results as the chat format takes them."""
        return [{"role": "tool", "content": result} for result in self.results]


def round_messages(each: Round, ids: Iterator[str]) -> list[dict[str, Any]]:
    """A round in OpenAI's form, its calls under names from `ids`."""
    if not each.calls:
        return [{"role": "assistant", "content": each.text}] if each.ids else []
    names = [next(ids) for _ in each.calls]
    calls = [call.message(name) for call, name in zip(each.calls, names, strict=True)]
    results = [
        {"role": "tool", "tool_call_id": name, "content": text} for name, text in zip(names, each.results, strict=True)
    ]
    return [{"role": "assistant", "content": each.text, "tool_calls": calls}, *results]


def call_ids(messages: Sequence[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Names for calls, "call_1" and so on, that no call of a conversation has yet."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    taken = {call.get("id") for call in calls if isinstance(call, Mapping)}
    return (name for name in map("call_{}".format, count(1)) if name not in taken)


class ToolLoop:
    """One prompt, and the rounds until it is answered.

    Attributes:
        rounds: the answers so far; the last one may be under way, and at the end each call in them has a result.
        prompt_tokens: the whole prompt of the last round.
        finish_reason: as in `AgentResult`, once `events` has ended; "" for one that was left early.
        error: as in `AgentResult`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        toolbox: Toolbox,
        cache: PromptCache,
        options: DecodeOptions,
        *,
        grammar: Grammar | None = None,
        max_rounds: int = MAX_ROUNDS,
        timeout_s: float | None = None,
        approve: Approval | None = None,
    ):
        """As `run_tools`.

        Args:
            model, tokenizer, max_rounds, timeout_s, approve: as there.
            prompt: ids that end with the start of an answer.
            toolbox: the tools; with none, there is one round.
            cache: as there; what it shares with the prompt is not run again.
            options: of each answer, which is shorter than `max_tokens` where the context ends before.
            grammar: what the first answer must obey, and come to its end in time; the others, and without it all, are
                held to what the toolbox says of calls.

        Raises:
            RequestError: an option is out of its limits.
        """
        check_whole("max_rounds", max_rounds, 1)
        if timeout_s is not None and not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
            raise RequestError(f"timeout_s must be a number of seconds over 0, or None, not {timeout_s!r:.100}")
        if options.logits_mask is not None:
            raise RequestError("logits_mask is for one answer only, and there may be several; use tool_choice")
        self._model, self._tokenizer, self._prompt = model, tokenizer, list(prompt)
        self._toolbox, self._cache, self._grammar = toolbox, cache, grammar
        self._call_grammar = tool_grammar(toolbox, "auto")
        self._max_rounds, self._timeout_s = max_rounds, timeout_s
        self._approve, self._options, self._ends_at = approve, options, float("inf")
        self.rounds: list[Round] = []
        self.prompt_tokens = 0
        self.finish_reason = ""
        self.error: str | None = None

    def events(self) -> Generator[Event, None, None]:
        """Draws and calls; what a caller who leaves early has seen stays in `rounds`.

        Yields:
            As `on_event` in `run_tools`.

        Raises:
            RequestError: as `generate_step`.
        """
        if self._timeout_s is not None:
            self._ends_at = time.monotonic() + self._timeout_s
        try:
            yield from self._all_rounds()
        finally:
            if self.rounds:
                each = self.rounds[-1]
                each.results += [error_text("not run: stopped")] * (len(each.calls) - len(each.results))

    def _all_rounds(self) -> Iterator[Event]:
        prompt, context = self._prompt, self._model.config.max_position_embeddings
        while not self.finish_reason:
            room = context - len(prompt)
            if self.rounds and (room < 1 or self._late()):
                self.finish_reason = "length" if room < 1 else "timeout"
                return
            self.rounds.append(each := Round())
            yield from self._answer(each, prompt, min(self._options.max_tokens, max(room, 1)))
            if not each.calls:
                return
            yield from self._run_calls(each)
            drawn = [*prompt, *each.ids]
            prompt = self._tokenizer.chat_format.extend(self._tokenizer, drawn, each.result_messages())

    def _answer(self, each: Round, prompt: list[int], max_tokens: int) -> Iterator[Event]:
        """One answer, its calls taken out of its text."""
        options = dataclasses.replace(self._options, max_tokens=max_tokens, logits_mask=self._constraint(max_tokens))
        if self._timeout_s is not None:
            watched = self._watched(options.prompt_progress_callback)
            options = dataclasses.replace(options, prompt_progress_callback=watched)
        parser = ToolCallParser(self._toolbox.declarations)
        self.prompt_tokens, reason = len(prompt), ""
        new = self._cache.reuse(prompt)
        try:
            for event in stream(self._model, self._tokenizer, new, self._cache, options):
                if event.token not in self._tokenizer.eos_ids:
                    each.ids.append(event.token)
                reason = event.finish_reason or ("timeout" if self._late() else "")
                text = parser.add(event.text) + (parser.finish() if reason else "")
                each.text, each.calls = each.text + text, list(parser.calls)
                yield dataclasses.replace(event, text=text, finish_reason=reason or None)
                if reason:
                    break
        except _TimeUp:
            reason = "timeout"
        finally:
            if not reason:  # left between two tokens
                each.text += parser.finish()
                each.calls = list(parser.calls)
        self.error = parser.error
        if not each.calls or reason == "timeout":
            self.finish_reason = reason

    def _constraint(self, max_tokens: int) -> Any:
        """What holds the answer that is about to be drawn, if anything does."""
        must = self._grammar if len(self.rounds) == 1 else None
        grammar = must or self._call_grammar
        if grammar is None:
            return None
        from phi4_mlx.grammar.constraint import Constraint

        # What must be is brought to its end in time. A call that is the model's own wish is cut, and so not run, rather
        # than run with half an argument.
        V = self._model.config.vocab_size
        return Constraint(grammar, self._tokenizer, V, max_tokens if must else None)

    def _run_calls(self, each: Round) -> Iterator[Event]:
        if len(self.rounds) == self._max_rounds:
            self.finish_reason = self.finish_reason or "max_rounds"
        for call in each.calls:
            yield call
            if self._late():
                self.finish_reason = self.finish_reason or "timeout"
            each.results.append(self._result(call))
            yield ToolResult(call, each.results[-1])

    def _result(self, call: ToolCall) -> str:
        if self.finish_reason:
            limit = f"{self._timeout_s} s" if self.finish_reason == "timeout" else f"{self._max_rounds} rounds"
            return error_text(f"not run: the limit of {limit} is reached")
        if problem := self._toolbox.problem(call):
            return error_text(problem)
        verdict = True if self._approve is None else self._approve(call)
        if verdict is not True:
            return error_text(f"refused: {verdict}" if isinstance(verdict, str) and verdict else "refused by the user")
        return self._toolbox.run(call)

    def _late(self) -> bool:
        return time.monotonic() >= self._ends_at

    def _watched(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """A progress callback that also ends a prefill whose time is up."""

        def watch(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self._late():
                raise _TimeUp

        return watch


def tool_grammar(toolbox: Toolbox, choice: str | Mapping[str, Any]) -> Grammar | None:
    """The grammar of an answer under a `tool_choice`; None where the answer is free.

    Raises:
        RequestError: `choice` names an unknown tool, or a tool's schema has no grammar.
    """
    if choice == "none" or (choice == "auto" and not (toolbox.strict and toolbox.declarations)):
        return None
    from phi4_mlx.grammar.grammars import tool_calls

    return tool_calls(toolbox.declarations) if choice == "auto" else tool_calls(toolbox.declarations, choice)


class _TimeUp(Exception):
    """The time limit was reached in the middle of a prefill."""
