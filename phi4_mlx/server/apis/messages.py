"""Anthropic's /v1/messages: its JSON -> `Ask`, and an answer -> its JSON and its stream.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from phi4_mlx.server.apis.body import (
    MESSAGES_LIMIT,
    NAME_CHARS_LIMIT,
    PARTS_LIMIT,
    Fields,
    read_body,
    read_max_tokens,
    read_model,
    read_response_format,
    read_sampling,
    read_stop,
    read_text,
    read_tool,
    read_tool_choice,
    read_tools,
    shown,
    tool_call,
)
from phi4_mlx.server.apis.wire import Answer, Ask, Call, Delta, End, Usage, WireError, in_call_order, sse

ROLES = ("user", "assistant", "system")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "timeout": "max_tokens", "tool_calls": "tool_use"}
THOUGHTS = ("thinking", "redacted_thinking")  # of another model, which clients send back; this one has none

Event = dict[str, Any]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: WireError) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def parse(body: Any, vocabulary: int, counting: bool = False) -> Ask:
    """What a body asks for.

    Args:
        body: as `json.loads` made it.
        vocabulary: how many token ids there are.
        counting: whether the prompt is only to be counted; then `max_tokens` may be absent.

    Raises:
        WireError: it asks for what is malformed, too much, or not done here; says which field.
    """
    fields = read_body(body)
    fields.forbid("this server runs no tools and keeps no state", "mcp_servers", "container", "context_management")
    thinking = ("disabled", "adaptive", "between_tools")
    if fields.has("thinking") and fields.child("thinking").get("type") not in thinking:
        fields.refuse("thinking", "cannot be enabled: this model has no thinking apart from its text")
    if not counting:
        fields.need("max_tokens")
    tools = [read_tool(tool, "input_schema") for tool in read_tools(fields, "custom")]
    output = fields.child("output_config")
    if output.has("format"):
        output.child("format").one_of("type", ("json_schema",))
    choice = fields.child("tool_choice")
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields),
        tools=tools,
        tool_choice=read_tool_choice(fields, tools, _tool_choice(choice)),
        parallel_tool_calls=not choice.boolean("disable_parallel_tool_use", False),
        response_format=read_response_format(output, "format"),
        sampling=read_sampling(fields, vocabulary),
        max_tokens=read_max_tokens(fields),
        stop=read_stop(fields, "stop_sequences"),
        stream=fields.boolean("stream", False),
    )


def _tool_choice(choice: Fields) -> str:
    kind = choice.one_of("type", (*CHOICES, "tool"), "auto")
    if kind != "tool":
        return CHOICES[kind]
    choice.need("name")
    return choice.text("name", "", 1, NAME_CHARS_LIMIT)


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    fields.need("messages")
    system = read_text(fields, "system")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for given in fields.children("messages", MESSAGES_LIMIT, 1):
        given.need("role", "content")
        role = given.one_of("role", ROLES)
        if role == "system":
            messages.append({"role": role, "content": read_text(given)})
        else:
            messages += _assistant(given) if role == "assistant" else _user(given)
    if messages[-1]["role"] == "assistant":  # Anthropic's API would let the model go on from them
        fields.refuse("messages", "ends with the assistant's words; to go on from those is not supported here")
    return in_call_order(messages)


def _assistant(given: Fields) -> Iterator[dict[str, Any]]:
    """One message: its texts, then its calls."""
    texts, calls = [], []
    for block in _blocks(given):
        kind = block.one_of("type", ("text", "tool_use", *THOUGHTS))
        if kind == "text":
            block.need("text")
            texts.append(block.text("text", ""))
        elif kind == "tool_use":
            block.need("id", "name", "input")
            arguments = json.dumps(block.child("input").values, ensure_ascii=False)
            call_id, name = (block.text(field, "", 1, NAME_CHARS_LIMIT) for field in ("id", "name"))
            calls.append(tool_call(call_id, name, arguments))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    yield {**message, "tool_calls": calls} if calls else message


def _user(given: Fields) -> Iterator[dict[str, Any]]:
    """A message for each run of texts, and one of a tool for each result, in the order given."""
    texts: list[str] = []
    blocks = _blocks(given)
    for block in blocks:
        kind = block.text("type", "")
        if kind == "text":
            block.need("text")
            texts.append(block.text("text", ""))
        elif kind == "tool_result":
            if texts:
                yield {"role": "user", "content": "".join(texts)}
            texts = []
            yield _result(block)
        else:
            block.refuse("type", f"is {shown(kind)}; this model reads text and tool_result alone")
    if texts or not blocks:
        yield {"role": "user", "content": "".join(texts)}


def _result(block: Fields) -> dict[str, Any]:
    block.need("tool_use_id")
    content = read_text(block) or ""
    if block.boolean("is_error", False):  # the model is shown nothing but the text
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": block.text("tool_use_id", "", 1, NAME_CHARS_LIMIT), "content": content}


def _blocks(given: Fields) -> list[Fields]:
    if isinstance(given.get("content"), str):
        return [Fields({"type": "text", "text": given.get("content")}, given.where("content"))]
    return given.children("content", PARTS_LIMIT)


class MessageAnswer(Answer):
    """An answer as a message, or as the stream of events that it grows by."""

    heartbeat = sse({"type": "ping"}, "ping")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._id = self.make_id("msg_")
        self._content: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the block that is still growing, the last of the content
        self._end = End()

    def whole(self, items: Iterable[Delta | End]) -> dict[str, Any]:
        """A message that is complete."""
        for item in items:
            for _ in self._events(item):
                pass
        return {**self._message(), "content": self._content, **self._stop(), "usage": self._usage()}

    def opening(self) -> bytes:
        """The message as it is at first: empty."""
        usage = {
            "input_tokens": self.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        empty = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _sse({"type": "message_start", "message": empty}) + self.heartbeat

    def chunk(self, item: Delta | End) -> bytes:
        """The events of an item."""
        return b"".join(map(_sse, self._events(item)))

    def closing(self) -> bytes:
        """Why the message stops, and that it does."""
        end = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return _sse(end) + _sse({"type": "message_stop"})

    def failure(self, error: WireError) -> bytes:
        """An error; the client raises it."""
        return _sse(error_body(error))

    def _message(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self.ask.model}

    def _stop(self) -> dict[str, Any]:
        reason = STOP_REASONS[self._end.reason]
        if self._end.stop_string is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": self._end.stop_string if reason == "stop_sequence" else None}

    def _usage(self) -> dict[str, int]:
        usage = Usage.of([self._end], 1)
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,  # here the parts add up to the prompt
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.answer_tokens,
        }

    def _events(self, item: Delta | End) -> Iterator[Event]:
        if isinstance(item, End):
            self._end = item
            if not self._content:  # clients expect a block, be it empty
                yield self._open_text()
            yield from self._close_text()
            return
        if item.text:
            if self._text is None:
                yield self._open_text()
            assert self._text is not None
            self._text.append(item.text)
            yield self._delta({"type": "text_delta", "text": item.text})
        if item.call:
            yield from self._close_text()
            yield from self._call(item.call)

    def _open_text(self) -> Event:
        self._text = []
        return self._open({"type": "text", "text": ""})

    def _close_text(self) -> Iterator[Event]:
        if self._text is not None:
            self._content[-1] = {"type": "text", "text": "".join(self._text)}
            self._text = None
            yield self._close()

    def _call(self, call: Call) -> Iterator[Event]:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield self._open(block)
        yield self._delta({"type": "input_json_delta", "partial_json": call.text})
        self._content[-1] = {**block, "input": dict(call.arguments)}
        yield self._close()

    def _open(self, block: dict[str, Any]) -> Event:
        self._content.append(block)
        return {"type": "content_block_start", "index": len(self._content) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Event:
        return {"type": "content_block_stop", "index": len(self._content) - 1}


def _sse(event: Event) -> bytes:
    return sse(event, event["type"])
