"""OpenAI's /v1/chat/completions: parses its JSON into an `Ask`, and formats answers and streams.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.answer import FINISH_REASONS, ChunkAnswer
from phi4_mlx.server.apis.body import (
    API_SAMPLING,
    check_tool_choice,
    demands_format,
    read_max_tokens,
    read_model,
    read_priority,
    read_response_format,
    read_sampling,
    read_stop,
    read_tool_choice,
    read_tools,
    tool_call,
)
from phi4_mlx.server.apis.content import read_arguments, read_content, result_content
from phi4_mlx.server.apis.fields import Fields, read_body
from phi4_mlx.server.apis.wire import Ask, Delta, End, in_call_order, logprobs_json
from phi4_mlx.server.engine.protocol import TokenLogprob
from phi4_mlx.server.limits import (
    ANSWERS_LIMIT,
    CALLS_LIMIT,
    MESSAGES_LIMIT,
    TOP_LOGPROBS_LIMIT,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def parse(body: Any, vocabulary: int, defaults: Sampling = API_SAMPLING, media: bool = False) -> Ask:
    """Parses a body.

    Args:
        body: the result of `json.loads`.
        vocabulary: the number of token ids.
        defaults: of the sampling settings.
        media: True if the model takes pictures and sounds.

    Raises:
        WireError: the body is malformed, exceeds a limit, or no answer to it would be right; names the field.
    """
    fields = read_body(body)
    if isinstance(fields.get("function_call"), dict):
        fields.refuse("function_call", "asks for a call of functions; use tools and tool_choice")
    if fields.has("functions"):
        fields.ignore("functions")
    tools, others = read_tools(fields)
    max_completion_tokens = read_max_tokens(fields, "max_completion_tokens")
    max_tokens = read_max_tokens(fields)  # the older name
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields, media),
        tools=tools,
        tool_choice=check_tool_choice(fields, tools, read_tool_choice(fields, "function"), others),
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        response_format=read_response_format(fields),
        strict=demands_format(fields),
        sampling=read_sampling(fields, vocabulary, defaults),
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        stop=read_stop(fields),
        n=fields.integer("n", 1, 1, ANSWERS_LIMIT),
        priority=read_priority(fields),
        stream=fields.boolean("stream", False),
        include_usage=fields.child("stream_options").boolean("include_usage", False),
        top_logprobs=_top_logprobs(fields),
        ignored=fields.ignored.paths(),  # last, when all else is read
    )


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    if fields.boolean("logprobs", False):
        return top or 0
    if top:
        fields.ignore("top_logprobs")
    return None


def _read_messages(fields: Fields, media: bool) -> list[JsonObject]:
    fields.need("messages")
    given = fields.children("messages", MESSAGES_LIMIT, 1)
    last = max((n for n, each in enumerate(given) if each.get("role") == "assistant"), default=-1)
    return in_call_order([_message(each, n < last, media) for n, each in enumerate(given)])


def _message(given: Fields, older: bool, media: bool) -> JsonObject:
    """A message with only the fields that `check_messages` knows; a client's other fields are ignored."""
    given.need("role")
    role = given.one_of("role", ROLES)
    if role in ("tool", "function"):
        call_id = given.get("tool_call_id")
        return {
            "role": "tool",
            "tool_call_id": call_id if isinstance(call_id, str) else "",
            "content": result_content(given, media=media),
        }
    is_answer = role == "assistant"
    content = read_content(given, placeholders=older or is_answer, media=media and not is_answer)
    if role == "user" and content is None:
        given.refuse("content", "is missing")
    message: JsonObject = {"role": "system" if role == "developer" else role, "content": content or ""}
    if role != "assistant":
        return message
    if not content and given.has("refusal"):
        message["content"] = given.text("refusal", "")
    calls = [_call(each) for each in given.children("tool_calls", CALLS_LIMIT)]
    if given.has("function_call"):  # the older form
        calls.append(_called("", given.child("function_call")))
    return {**message, "tool_calls": calls} if calls else message


def _call(given: Fields) -> JsonObject:
    """An earlier call; what a model wrote wrong in it is for the model to see."""
    call_id = given.get("id")
    call_id = call_id if isinstance(call_id, str) else ""
    if given.get("type") == "custom":
        custom = given.child("custom")
        return tool_call(call_id, custom.text("name", ""), json.dumps({"input": custom.get("input")}))
    given.need("function")
    return _called(call_id, given.child("function"))


def _called(call_id: str, function: Fields) -> JsonObject:
    return tool_call(call_id, function.text("name", ""), read_arguments(function))


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
            if answer.thought:
                message["reasoning_content"] = answer.thought
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
        """A chunk with thoughts, one with text, one with a call, or one with the finish reason."""
        if isinstance(item, End):
            self.ends.append(item)
            return self._event(item.index, {}, finish_reason=FINISH_REASONS[item.reason])
        events = b""
        if item.thought:
            events += self._event(item.index, {"reasoning_content": item.thought})
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
