"""Anthropic's /v1/messages: parses its JSON into an `Ask`, and formats answers, streams and errors.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.answer import EventAnswer
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
    read_tools,
    tool_call,
)
from phi4_mlx.server.apis.content import Content, joined, part_content, part_text, read_content, result_content
from phi4_mlx.server.apis.fields import Fields, read_body
from phi4_mlx.server.apis.wire import ERROR_TYPES, Ask, Call, WireError, in_call_order, sse
from phi4_mlx.server.limits import MESSAGES_LIMIT, NAME_CHARS_LIMIT, PARTS_LIMIT

ROLES = ("user", "assistant", "system")
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "timeout": "max_tokens", "tool_calls": "tool_use"}

_ERROR_TYPES = {**ERROR_TYPES, 413: "request_too_large", 504: "timeout_error"}


def error_body(error: WireError) -> JsonObject:
    """An error in Anthropic's form."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


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
    tools, others = read_tools(fields, "custom", "input_schema")
    holder, name = fields.child("output_config"), "format"
    if fields.has("output_format"):  # the name of a beta
        holder, name = fields, "output_format"
    if holder.has(name):
        holder.child(name).one_of("type", ("json_schema",))
    choice = fields.child("tool_choice")
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields, media),
        tools=tools,
        tool_choice=check_tool_choice(fields, tools, _tool_choice(choice), others),
        parallel_tool_calls=not choice.boolean("disable_parallel_tool_use", False),
        response_format=read_response_format(holder, name),
        strict=demands_format(holder, name),
        sampling=read_sampling(fields, vocabulary, defaults),
        max_tokens=read_max_tokens(fields),
        stop=read_stop(fields, "stop_sequences"),
        priority=read_priority(fields),
        stream=fields.boolean("stream", False),
        ignored=fields.ignored.paths(),  # last, when all else is read
    )


def _tool_choice(choice: Fields) -> str:
    kind = choice.one_of("type", (*TOOL_CHOICES, "tool"), "auto")
    if kind != "tool":
        return TOOL_CHOICES[kind]
    return choice.needed_name("name")


def _read_messages(fields: Fields, media: bool) -> list[JsonObject]:
    fields.need("messages")
    system = read_content(fields, "system", placeholders=True)
    messages: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    all_given = fields.children("messages", MESSAGES_LIMIT, 1)
    last = max((n for n, each in enumerate(all_given) if each.get("role") == "assistant"), default=-1)
    for n, given in enumerate(all_given):
        given.need("role")
        role = given.one_of("role", ROLES)
        if role == "system":
            messages.append({"role": role, "content": read_content(given, placeholders=True) or ""})
            continue
        if role == "user":
            given.need("content")
        messages += _assistant(given) if role == "assistant" else _user(given, n < last, media)
    if messages[-1]["role"] == "assistant":  # Anthropic's API would continue them
        fields.refuse("messages", "ends with an assistant message; continuing one is not supported here")
    return in_call_order(messages)


def _assistant(given: Fields) -> Iterator[JsonObject]:
    """One message with all texts and calls of the given one; tools that another server ran are text."""
    texts, calls = [], []
    for block in _blocks(given):
        kind = block.text("type", "text")
        if kind == "tool_use":
            call_id, name = (block.text(key, "", 0, NAME_CHARS_LIMIT) for key in ("id", "name"))
            used = block.get("input")
            arguments = used if isinstance(used, str) else json.dumps({} if used is None else used, ensure_ascii=False)
            calls.append(tool_call(call_id, name, arguments))
        elif kind in ("server_tool_use", "mcp_tool_use"):
            texts.append(f"\n{block.text('name', '')} {json.dumps(block.get('input'), ensure_ascii=False)}\n")
        elif kind.endswith("_tool_result"):
            texts.append(f"{result_content(block)}\n")
        else:
            texts.append(part_text(block, placeholders=True))
    message: JsonObject = {"role": "assistant", "content": "".join(texts)}
    yield {**message, "tool_calls": calls} if calls else message


def _user(given: Fields, older: bool, media: bool) -> Iterator[JsonObject]:
    """A user message for each run of contents and a tool message for each result, in the given order."""
    contents: list[Content] = []
    blocks = _blocks(given)
    for block in blocks:
        if not block.text("type", "text").endswith("tool_result"):
            contents.append(part_content(block, older, media))
            continue
        if contents:
            yield {"role": "user", "content": joined(contents)}
        contents = []
        yield _result(block, media)
    if contents or not blocks:
        yield {"role": "user", "content": joined(contents)}


def _result(block: Fields, media: bool) -> JsonObject:
    content = result_content(block, media=media)
    if block.get("is_error") is True:  # the model sees only the content
        content = joined(["Error: ", content])
    return {"role": "tool", "tool_call_id": block.text("tool_use_id", "", 0, NAME_CHARS_LIMIT), "content": content}


def _blocks(given: Fields) -> list[Fields]:
    content = given.get("content")
    if content is None or isinstance(content, str):
        return [Fields({"type": "text", "text": content or ""}, given.where("content"))]
    return given.children("content", PARTS_LIMIT)


class MessageAnswer(EventAnswer):
    """An answer as a message, or as a stream of the events that build it."""

    heartbeat = sse({"type": "ping"}, "ping")
    id_prefix = "msg_"

    def opening(self) -> bytes:
        """The message while it is empty."""
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = _usage(self.prompt_tokens, 0, 0)
        return self.frame({"type": "message_start", "message": message}) + self.heartbeat

    def closing(self) -> bytes:
        """The stop reason and the end of the message."""
        end = {"type": "message_delta", "delta": self._stop(), "usage": self._final_usage()}
        return self.frame(end) + self.frame({"type": "message_stop"})

    def failure(self, error: WireError) -> bytes:
        """An error; clients raise it."""
        return self.frame(error_body(error))

    def final(self) -> JsonObject:
        """The complete message."""
        return {**self._head(), "content": self.blocks, **self._stop(), "usage": self._final_usage()}

    def open_text(self) -> None:
        """Adds an empty text block and emits its start."""
        self._open({"type": "text", "text": ""})

    def text_delta(self, text: str) -> JsonObject:
        """A delta of the last block."""
        return self._event("content_block_delta", delta={"type": "text_delta", "text": text})

    def close_text(self, text: str) -> None:
        """Completes the last block with its whole text and emits its stop."""
        self._close({"type": "text", "text": text})

    def open_thought(self) -> None:
        """Adds an empty thinking block and emits its start."""
        self._open({"type": "thinking", "thinking": "", "signature": ""})

    def thought_delta(self, text: str) -> JsonObject:
        """A delta of the last block."""
        return self._event("content_block_delta", delta={"type": "thinking_delta", "thinking": text})

    def close_thought(self, text: str) -> None:
        """Completes the last block with all thoughts and emits its stop."""
        self._close({"type": "thinking", "thinking": text, "signature": ""})

    def add_call(self, call: Call) -> None:
        """Adds a tool_use block and emits its start, one delta and its stop."""
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        self._open(block)
        self.emit(self._event("content_block_delta", delta={"type": "input_json_delta", "partial_json": call.text}))
        self._close({**block, "input": dict(call.arguments)})

    def _head(self) -> JsonObject:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.ask.model}

    def _stop(self) -> JsonObject:
        reason = STOP_REASONS[self.end.reason]
        if reason == "end_turn" and self.end.stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self.end.stop_string}
        return {"stop_reason": reason, "stop_sequence": None}

    def _final_usage(self) -> JsonObject:
        return _usage(self.end.prompt_tokens, self.end.cached_tokens, self.end.answer_tokens)

    def _open(self, block: JsonObject) -> None:
        self.blocks.append(block)
        self.emit(self._event("content_block_start", content_block=block))

    def _close(self, block: JsonObject) -> None:
        self.blocks[-1] = block
        self.emit(self._event("content_block_stop"))

    def _event(self, kind: str, **more: JsonObject) -> JsonObject:
        return {"type": kind, "index": len(self.blocks) - 1, **more}


def _usage(prompt_tokens: int, cached_tokens: int, answer_tokens: int) -> JsonObject:
    return {
        "input_tokens": prompt_tokens - cached_tokens,  # Anthropic's three input counts add up to the prompt
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": answer_tokens,
    }
