"""The tool loop: generate an answer, run its tool calls, feed back the results, until an answer has no calls.

Answers are kept as the ids that were drawn and one cache serves all rounds, so each round prefills only the results of
the round before. Tool arguments and results are data: control strings in them stay text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.generation.answer import AnswerAssembler, stream_answer, tool_grammar
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.prompt import Prompt
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Tool, Toolbox, error_text

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.models.prompt_cache import PromptCache
    from phi4_mlx.tokens.tokenizer import Tokenizer

MAX_ROUNDS = 8
MAX_TOKENS = 1024  # per answer; more than elsewhere, because a call that is cut cannot be run

Approval = Callable[[ToolCall], bool | str]
Message = dict[str, Any]  # in OpenAI's form


@dataclass(frozen=True)
class ToolResult:
    """The result of one tool call.

    Attributes:
        call: the call.
        text: the result as the model reads it; begins with "error: " if the call failed, was refused or was not run.
    """

    call: ToolCall
    text: str


AgentEvent = GenerationResponse | ToolCall | ToolResult


@dataclass(frozen=True)
class AgentResult:
    """The outcome of `run_tools`.

    Attributes:
        text: the last answer, without its tool calls.
        messages: the whole conversation in OpenAI's form, with calls and results; usable as the next `messages`.
        rounds: number of answers.
        finish_reason: "stop"; "length" if `max_tokens` or a full context cut the last answer; "max_rounds" or "timeout"
            if a limit ended the loop. Calls that were not run get an error as their result; those of an answer that
            was cut are never run.
        error: why a tool call in the last answer was left as text, in one line; or None.
        loosened: parts of the tools' schemas that decoding did not enforce, one line each, such as "tool 'search':
            uniqueItems"; a tool with `"strict": true` is refused instead.
    """

    text: str
    messages: list[Message]
    rounds: int
    finish_reason: str
    error: str | None = None
    loosened: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if the model itself ended the last answer; False if a limit did."""
        return self.finish_reason == "stop"


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
    on_event: Callable[[AgentEvent], object] | None = None,
    cache: PromptCache | None = None,
    **options: Any,
) -> AgentResult:
    """Answers a conversation and runs the tool calls that the model makes on the way.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        messages: as for `tokenizer.apply_chat_template`.
        tools: Python functions, described by their type hints and docstrings, or (OpenAI tool, function) pairs. They
            run in the caller's thread, in order, with keyword arguments. The model reads a returned string as it is,
            any other value as JSON, and an exception as an error.
        max_rounds: the most answers the model may give. Calls in the last one are not run.
        timeout_s: seconds for all rounds, checked between tokens, between prefill chunks and before each call. A
            running tool is not stopped.
        tool_choice: "auto", "none", "required", or one tool by name or in OpenAI's form. The last two apply to the
            first answer; later answers are under "auto".
        strict: restricts calls to the tools' schemas during decoding. False allows schemas that have no grammar, but
            not where a call is required.
        approve: called before each call; True runs it, False refuses it, and a string refuses it with that reason.
        on_event: called with each event: a `GenerationResponse` for a token, its text without calls; a `ToolCall`
            before it is run; a `ToolResult`.
        cache: from `model.make_cache()`; pass it again to continue a conversation.
        options: those of `stream_generate`; `max_tokens`, for each answer, is 1,024 by default.

    Raises:
        RequestError: a message, a tool or an option is malformed, or the context has no room for the messages.
    """
    toolbox = Toolbox(tools, strict)
    loop = ToolLoop(
        model,
        tokenizer,
        tokenizer.apply_chat_template(messages, tools=toolbox.declarations or None),
        toolbox if tool_choice != "none" else Toolbox(),
        model.make_cache() if cache is None else cache,
        DecodeOptions(**{"max_tokens": MAX_TOKENS, **options}),
        grammar=None if tool_choice == "auto" else tool_grammar(toolbox.declarations, tool_choice, strict),
        max_rounds=max_rounds,
        timeout_s=timeout_s,
        approve=approve,
    )
    for event in loop.events():
        if on_event is not None:
            on_event(event)
    return loop.result(messages)


@dataclass
class Round:
    """One answer of the model and the results of its tool calls.

    Attributes:
        text: the answer without its calls; thoughts are part of it, as the model wrote them.
        ids: the answer's tokens as they were drawn, without the end marker.
        calls: the tool calls in it.
        results: the result of each call, as the model reads it.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def result_messages(self) -> list[Message]:
        """The results as messages for the chat format."""
        return [{"role": "tool", "content": result} for result in self.results]


def round_messages(each: Round, ids: Iterator[str]) -> list[Message]:
    """A round as messages in OpenAI's form, with the ids of its calls taken from `ids`."""
    if not each.calls:
        return [{"role": "assistant", "content": each.text}] if each.ids else []
    names = [next(ids) for _ in each.calls]
    calls = [call.message(name) for call, name in zip(each.calls, names, strict=True)]
    pairs = zip(names, each.results, strict=True)
    results = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in pairs]
    return [{"role": "assistant", "content": each.text, "tool_calls": calls}, *results]


def call_ids(messages: Sequence[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Call ids "call_1", "call_2" and so on, without those that the conversation uses already."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    taken = {call.get("id") for call in calls if isinstance(call, Mapping)}
    names = (f"call_{number}" for number in count(1))
    return (name for name in names if name not in taken)


class ToolLoop:
    """The rounds of answers and tool calls that follow one prompt.

    Attributes:
        rounds: the answers so far; the text and calls of one under way are set when it ends or the caller leaves. At
            the end every call has a result.
        prompt_tokens: tokens in the whole prompt of the last round.
        finish_reason: as in `AgentResult`, once `events` has ended; "" if the caller left it early.
        error, loosened: as in `AgentResult`.
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
        longest: int | None = None,
        thinks: bool = False,
        shorten: Callable[[int], Sequence[int]] | None = None,
    ):
        """Checks the limits; `events` runs the loop.

        Args:
            model, tokenizer, cache, max_rounds, timeout_s, approve: as for `run_tools`.
            prompt: ids that end with the start of an answer.
            toolbox: the tools; without any, there is one round.
            options: for each answer; `max_tokens` is lowered to what the context has room for.
            grammar: restricts the first answer, which then ends within `max_tokens`. The other answers, and all of them
                by default, are restricted only by the toolbox's schemas.
            longest: the most tokens of a prompt and its answer; None for what the model's context holds.
            thinks: True separates the thoughts at the start of each answer that `grammar` does not restrict.
            shorten: called before each round but the first with the tokens of calls and results since the prompt;
                returns the prompt to use instead. None keeps the prompt.

        Raises:
            RequestError: an option is outside its range.
        """
        check_whole("max_rounds", max_rounds, 1)
        if timeout_s is not None and not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
            raise RequestError(f"timeout_s must be a number of seconds over 0, or None, not {timeout_s!r:.100}")
        if options.logits_mask is not None:
            raise RequestError("logits_mask restricts one answer, and there may be several here; use tool_choice")
        self._model, self._tokenizer, self._prompt = model, tokenizer, Prompt() + prompt
        self._toolbox, self._cache, self._options = toolbox, cache, options
        self._grammar = grammar
        self._max_rounds, self._timeout_s, self._approve = max_rounds, timeout_s, approve
        self._longest = longest or model.config.max_position_embeddings
        self._thinks, self._shorten = thinks, shorten
        self._ends_at = float("inf")
        self.rounds: list[Round] = []
        self.prompt_tokens = 0
        self.finish_reason = ""
        self.error: str | None = None
        self.loosened: tuple[str, ...] = ()

    def events(self) -> Generator[AgentEvent, None, None]:
        """Runs the loop and yields the events of `on_event`; `rounds` stays complete if the caller leaves early.

        Raises:
            RequestError: as for `generate_step`.
        """
        if self._timeout_s is not None:
            self._ends_at = time.monotonic() + self._timeout_s
        try:
            yield from self._all_rounds()
        finally:
            if self.rounds:
                each = self.rounds[-1]
                each.results += [error_text("not run: stopped")] * (len(each.calls) - len(each.results))

    def result(self, messages: Sequence[Mapping[str, Any]]) -> AgentResult:
        """The outcome, once `events` has ended; `messages` are those that the prompt was made of."""
        conversation = [dict(message) for message in messages]
        ids = call_ids(messages)
        for each in self.rounds:
            conversation += round_messages(each, ids)
        text, rounds = self.rounds[-1].text, len(self.rounds)
        return AgentResult(text, conversation, rounds, self.finish_reason, self.error, self.loosened)

    def _all_rounds(self) -> Iterator[AgentEvent]:
        tail = Prompt()  # calls and results since the prompt
        while not self.finish_reason:
            if tail and self._shorten is not None:
                self._prompt = Prompt() + self._shorten(len(tail))
            prompt = self._prompt + tail
            room = self._longest - len(prompt)
            if self.rounds and (room < 1 or time.monotonic() >= self._ends_at):
                self.finish_reason = "length" if room < 1 else "timeout"
                return
            self.rounds.append(each := Round())
            yield from self._answer(each, prompt, min(self._options.max_tokens, max(room, 1)))
            if not each.calls:
                return
            yield from self._run_calls(each)
            tail += each.ids
            self._tokenizer.chat_format.append(self._tokenizer, tail, each.result_messages())

    @cached_property
    def _optional_calls(self) -> Grammar | None:
        """The grammar of an answer that may call tools; None if it is free."""
        return tool_grammar(self._toolbox.declarations, "auto", self._toolbox.strict)

    def _answer(self, each: Round, prompt: Prompt, max_tokens: int) -> Iterator[AgentEvent]:
        """Generates one answer into `each`."""
        required = self._grammar if len(self.rounds) == 1 else None
        options = replace(self._options, max_tokens=max_tokens)
        thinks = self._thinks and required is None
        answer = AnswerAssembler(self._toolbox.declarations, ends_at=self._ends_at, thinks=thinks)
        model, tokenizer, cache = self._model, self._tokenizer, self._cache
        grammar = required or self._optional_calls
        if grammar is not None:
            self.loosened = tuple(dict.fromkeys((*self.loosened, *grammar.loosened)))
        must_end = required is not None
        responses = stream_answer(model, tokenizer, prompt, cache, options, answer, grammar, must_end)
        self.prompt_tokens = len(prompt)
        try:
            for response in responses:
                if response.token not in tokenizer.eos_ids:
                    each.ids.append(response.token)
                yield response
        finally:  # the caller may leave between two tokens
            answer.finish()
            each.text, each.calls = answer.reply, list(answer.calls)
        self.error = answer.complaint
        if not each.calls or answer.reason != "stop":  # a cut answer may lack calls, so none is run
            self.finish_reason = answer.reason

    def _run_calls(self, each: Round) -> Iterator[AgentEvent]:
        if len(self.rounds) == self._max_rounds:
            self.finish_reason = self.finish_reason or "max_rounds"
        for call in each.calls:
            yield call
            if time.monotonic() >= self._ends_at:
                self.finish_reason = self.finish_reason or "timeout"
            each.results.append(self._result_text(call))
            yield ToolResult(call, each.results[-1])

    def _result_text(self, call: ToolCall) -> str:
        """Runs a call if the limits, its schema and `approve` allow it; returns the result or the error."""
        if self.finish_reason == "length":
            return error_text(f"not run: the answer was cut after {amount(len(self.rounds[-1].ids), 'token')}")
        if self.finish_reason:
            limit = f"{self._timeout_s} s" if self.finish_reason == "timeout" else amount(self._max_rounds, "round")
            return error_text(f"not run: the limit of {limit} is reached")
        if problem := self._toolbox.problem(call):
            return error_text(problem)
        verdict = True if self._approve is None else self._approve(call)
        if verdict is not True:
            return error_text(f"refused: {verdict}" if isinstance(verdict, str) and verdict else "refused by the user")
        return self._toolbox.run(call)
