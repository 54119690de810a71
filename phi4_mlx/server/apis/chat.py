"""OpenAI's /v1/chat/completions: parses its JSON into an `Ask`, and formats answers and streams.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.answer import FINISH_REASONS, ChunkAnswer
from phi4_mlx.server.apis.body import (
    check_tool_choice,
    read_arguments,
    read_max_tokens,
    read_model,
    read_response_format,
    read_sampling,
    read_stop,
    read_text,
    read_tool,
    read_tool_choice,
    read_tools,
    tool_call,
)
from phi4_mlx.server.apis.fields import Fields, read_body, shown
from phi4_mlx.server.apis.wire import Ask, Delta, End, in_call_order, logprobs_json
from phi4_mlx.server.engine.protocol import TokenLogprob
from phi4_mlx.server.limits import (
    ANSWERS_LIMIT,
    CALLS_LIMIT,
    MESSAGES_LIMIT,
    MODALITIES_LIMIT,
    NAME_CHARS_LIMIT,
    TOP_LOGPROBS_LIMIT,
)

ROLES = ("system", "developer", "user", "assistant", "tool")


def parse(body: Any, vocabulary: int) -> Ask:
    """Parses a body.

    Args:
        body: the result of `json.loads`.
        vocabulary: the number of token ids.

    Raises:
        WireError: the body is malformed, exceeds a limit, or asks for something that is not supported; names the field.
    """
    fields = read_body(body)
    fields.forbid("use tools and tool_choice", "functions", "function_call")
    fields.forbid("this model reads and writes only text", "audio")
    fields.forbid("this server does not search the web", "web_search_options")
    fields.forbid("this server does not moderate answers", "moderation")
    for modality in fields.items("modalities", MODALITIES_LIMIT):
        if modality != "text":
            fields.refuse("modalities", f"contains {shown(modality)}; this model writes only text")
    tools = _read_tools(fields)
    max_completion_tokens = read_max_tokens(fields, "max_completion_tokens")
    max_tokens = read_max_tokens(fields)  # the older name
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields),
        tools=tools,
        tool_choice=check_tool_choice(fields, tools, read_tool_choice(fields, "function")),
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        response_format=read_response_format(fields),
        sampling=read_sampling(fields, vocabulary),
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        stop=read_stop(fields),
        n=fields.integer("n", 1, 1, ANSWERS_LIMIT),
        stream=fields.boolean("stream", False),
        include_usage=fields.child("stream_options").boolean("include_usage", False),
        top_logprobs=_top_logprobs(fields),
    )


def _read_tools(fields: Fields) -> list[JsonObject]:
    tools = read_tools(fields)
    for tool in tools:
        tool.need("function")
    return [read_tool(tool.child("function")) for tool in tools]


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    if fields.boolean("logprobs", False):
        return top or 0
    if top:
        fields.refuse("top_logprobs", f"is {top}, but logprobs is not true")
    return None


def _read_messages(fields: Fields) -> list[JsonObject]:
    fields.need("messages")
    return in_call_order([_message(each) for each in fields.children("messages", MESSAGES_LIMIT, 1)])


def _message(given: Fields) -> JsonObject:
    """A message with only the fields that `check_messages` knows; a client's other fields are ignored."""
    given.need("role")
    role = given.one_of("role", ROLES)
    given.forbid("use tool_calls", "function_call")
    given.forbid("this model reads only text", "audio")
    message: JsonObject = {"role": "system" if role == "developer" else role}
    content = read_text(given)
    if role == "assistant" and content is None and given.has("refusal"):
        content = given.text("refusal", "")
    calls = [_call(each) for each in given.children("tool_calls", CALLS_LIMIT)]
    if calls and role != "assistant":
        given.refuse("tool_calls", f"are allowed only in the role assistant, not {role}")
    if content is None and not calls:
        given.refuse("content", "is missing")
    message["content"] = content or ""
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = given.text("tool_call_id", "", 0, NAME_CHARS_LIMIT)
    return message


def _call(given: Fields) -> JsonObject:
    given.one_of("type", ("function",), "function")
    given.need("function")
    function = given.child("function")
    name = function.needed_name("name")
    return tool_call(given.text("id", "", 0, NAME_CHARS_LIMIT), name, read_arguments(function))


class ChatAnswer(ChunkAnswer):
    """Answers as a chat.completion, or as a stream of chat.completion.chunk."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._calls = [0] * self.ask.n  # sent so far, by answer

    def body(self, items: Iterable[Delta | End]) -> JsonObject:
        """A chat.completion."""
        answers = self.collect(items, self.ask.n)
        choices = []
        for index, answer in enumerate(answers):
            message: JsonObject = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.calls:
                message["content"] = answer.text or None
                message["tool_calls"] = [tool_call(call.id, call.name, call.text) for call in answer.calls]
            choice = {"index": index, "message": message, "finish_reason": FINISH_REASONS[answer.end.reason]}
            choices.append({**choice, "logprobs": self._logprobs(answer.logprobs)})
        return {**self.head("chat.completion"), "choices": choices, "usage": self.usage(answers)}

    def opening(self) -> bytes:
        """A chunk with the role for each answer."""
        return b"".join(self._event(index, {"role": "assistant", "content": ""}) for index in range(self.ask.n))

    def chunk(self, item: Delta | End) -> bytes:
        """A chunk with text, one with a call, or one with the finish reason."""
        if isinstance(item, End):
            self.ends.append(item)
            return self._event(item.index, {}, finish_reason=FINISH_REASONS[item.reason])
        events = b""
        if item.text or (item.logprobs and self.ask.top_logprobs is not None):
            events += self._event(item.index, {"content": item.text}, logprobs=self._logprobs(item.logprobs))
        if item.call:
            call = tool_call(item.call.id, item.call.name, item.call.text)
            events += self._event(item.index, {"tool_calls": [{"index": self._calls[item.index], **call}]})
            self._calls[item.index] += 1
        return events

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> JsonObject | None:
        return None if self.ask.top_logprobs is None else {"content": logprobs_json(logprobs), "refusal": None}

    def _event(
        self, index: int, delta: JsonObject, logprobs: JsonObject | None = None, finish_reason: str | None = None
    ) -> bytes:
        return self.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})
