"""OpenAI's /v1/responses: parses its JSON into an `Ask`, and formats answers and streams.

The server stores nothing: a client sends the whole conversation each time, and fields that refer to a stored one are
refused.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
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
    read_tool_choice,
    read_tools,
    tool_call,
)
from phi4_mlx.server.apis.content import read_arguments, read_content, result_content
from phi4_mlx.server.apis.fields import Fields, read_body
from phi4_mlx.server.apis.wire import Ask, Call, Delta, End, WireError, in_call_order, logprobs_json
from phi4_mlx.server.limits import (
    INCLUDE_LIMIT,
    MESSAGES_LIMIT,
    METADATA_CHARS_LIMIT,
    METADATA_LIMIT,
    NAME_CHARS_LIMIT,
    TOP_LOGPROBS_LIMIT,
)

ROLES = ("system", "developer", "user", "assistant")
# Calls of tools that the client runs; their arguments are in the second field.
CALLS = {
    "function_call": "arguments", "custom_tool_call": "input", "local_shell_call": "action", "shell_call": "action",
    "apply_patch_call": "operation", "mcp_call": "arguments",
}  # fmt: skip
LOGPROBS = "message.output_text.logprobs"


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
    fields.forbid("nothing is stored; send the whole conversation as input", "previous_response_id", "conversation")
    fields.forbid("nothing is stored; send instructions and input", "prompt")
    fields.forbid("the server answers only while the client waits", "background")
    tools, others = read_tools(fields)
    choice = check_tool_choice(fields, tools, read_tool_choice(fields), others)
    text = fields.child("text")
    sampling = read_sampling(fields, vocabulary, defaults)
    max_tokens = read_max_tokens(fields, "max_output_tokens")
    parallel = fields.boolean("parallel_tool_calls", True)
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields, media),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=read_response_format(text, "format"),
        strict=demands_format(text, "format"),
        sampling=sampling,
        max_tokens=max_tokens,
        stop=read_stop(fields),
        priority=read_priority(fields),
        stream=fields.boolean("stream", False),
        top_logprobs=_top_logprobs(fields),
        repeated={
            "instructions": fields.get("instructions"),
            "max_output_tokens": max_tokens,
            "metadata": _metadata(fields),
            "parallel_tool_calls": parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temp,
            "text": {"format": text.get("format") or {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in tools],
            "top_p": sampling.top_p,
        },
        ignored=fields.ignored.paths(),  # last, when all else is read
    )


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    include = fields.items("include", INCLUDE_LIMIT)
    if any(each != LOGPROBS for each in include):
        fields.ignore("include")
    return top or 0 if LOGPROBS in include or top else None


def _metadata(fields: Fields) -> JsonObject:
    """The metadata, which the answer repeats if OpenAI's API would take them."""
    pairs = fields.get("metadata")
    texts = list(pairs.values()) if isinstance(pairs, dict) else [None]
    short = all(isinstance(each, str) and len(each) <= METADATA_CHARS_LIMIT for each in texts)
    if short and len(texts) <= METADATA_LIMIT:
        return dict(pairs)
    if pairs is not None:
        fields.ignore("metadata")
    return {}


def _read_messages(fields: Fields, media: bool) -> list[JsonObject]:
    fields.need("input")
    instructions = fields.text("instructions", "")
    messages: list[JsonObject] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(fields.get("input"), str):
        return [*messages, {"role": "user", "content": fields.get("input")}]
    before = len(messages)
    items = fields.children("input", MESSAGES_LIMIT, 1)
    answers = [each.get("role") == "assistant" or each.get("type") in tuple(CALLS) for each in items]
    last = max((n for n, answer in enumerate(answers) if answer), default=-1)
    for n, item in enumerate(items):
        _add(messages, item, n < last, media)
    if len(messages) == before:
        fields.refuse("input", "contains no message")
    return in_call_order(messages)


def _add(messages: list[JsonObject], item: Fields, older: bool, media: bool) -> None:
    """Adds an item of the input; a call becomes part of the assistant's turn before it."""
    kind = item.text("type", "message")
    if kind == "message":
        item.need("role")
        role = item.one_of("role", ROLES)
        is_answer = role == "assistant"
        content = read_content(item, placeholders=older or is_answer, media=media and not is_answer)
        if role == "user" and content is None:
            item.refuse("content", "is missing")
        messages.append({"role": "system" if role == "developer" else role, "content": content or ""})
    elif kind in CALLS:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(_call(item, kind))
        if item.has("output"):  # mcp_call has its own
            messages.append(_result(item, media))
    elif kind.endswith("_call_output"):
        messages.append(_result(item, media))
    else:  # thoughts, calls of tools that this server does not run, and references to what it does not store
        item.ignore()


def _call(item: Fields, kind: str) -> JsonObject:
    """An earlier call; what a model wrote wrong in it is for the model to see."""
    name = item.text("name", kind.removesuffix("_call"), 0, NAME_CHARS_LIMIT)
    arguments = read_arguments(item, CALLS[kind])
    if kind == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input")}, ensure_ascii=False)
    return tool_call(_call_id(item), name, arguments)


def _result(item: Fields, media: bool) -> JsonObject:
    return {"role": "tool", "tool_call_id": _call_id(item), "content": result_content(item, "output", media)}


def _call_id(item: Fields) -> str:
    return item.text("call_id", "", 0, NAME_CHARS_LIMIT) or item.text("id", "", 0, NAME_CHARS_LIMIT)


class ResponseAnswer(EventAnswer):
    """An answer as a response, or as a stream of the events that build it."""

    id_prefix = "resp_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sent = 0  # events
        self._logprobs: list[JsonObject] = []  # of the open text
        self._early: list[JsonObject] = []  # of tokens whose text has not come yet

    def opening(self) -> bytes:
        """The response while it is empty."""
        response = self._response("in_progress")
        created = self.frame({"type": "response.created", "response": response})
        return created + self.frame({"type": "response.in_progress", "response": response})

    def closing(self) -> bytes:
        """The complete response."""
        final = self.final()
        return self.frame({"type": f"response.{final['status']}", "response": final})

    def failure(self, error: WireError) -> bytes:
        """An error, and a response with the status failed."""
        code = error.code or ("rate_limit_exceeded" if error.status == 429 else "server_error")
        event = {"type": "error", "code": code, "message": error.message, "param": error.param}
        failed = {**self._response("failed"), "error": {"code": code, "message": error.message}}
        return self.frame(event) + self.frame({"type": "response.failed", "response": failed})

    def frame(self, event: JsonObject) -> bytes:
        """A server-sent event named by its type, with the next sequence number."""
        self._sent += 1
        return super().frame({**event, "sequence_number": self._sent - 1})

    def final(self) -> JsonObject:
        """The complete response."""
        end = self.end
        return {
            **self._response(self._status),
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "usage": {
                "input_tokens": end.prompt_tokens,
                "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": end.answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": end.prompt_tokens + end.answer_tokens,
            },
        }

    def add(self, item: Delta | End) -> None:
        """Adds an item to the blocks and emits its events; log-probabilities wait for text."""
        if isinstance(item, Delta) and self.ask.top_logprobs is not None:
            self._early += logprobs_json(item.logprobs)
        super().add(item)

    def open_text(self) -> None:
        """Adds an empty message and emits the start of its text."""
        self._logprobs = []
        item = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
        self._open({"id": self.make_id("msg_"), **item})
        self.emit({**self._part("response.content_part.added"), "part": _text_part("", [])})

    def text_delta(self, text: str) -> JsonObject:
        """A delta of the last message, with the log-probabilities up to its end."""
        logprobs, self._early = self._early, []
        self._logprobs += logprobs
        return {**self._part("response.output_text.delta"), "delta": text, "logprobs": logprobs}

    def close_text(self, text: str) -> None:
        """Completes the last message with its whole text and emits the ends of its text, its part and itself."""
        self._logprobs += self._early
        self._early = []
        part = _text_part(text, self._logprobs)
        self.emit({**self._part("response.output_text.done"), "text": text, "logprobs": self._logprobs})
        self.emit({**self._part("response.content_part.done"), "part": part})
        self._close(status=self._status, content=[part])

    def open_thought(self) -> None:
        """Adds an empty reasoning item and emits its start."""
        self._open({"id": self.make_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": []})

    def thought_delta(self, text: str) -> JsonObject:
        """A delta of the last item."""
        return {**self._part("response.reasoning_text.delta"), "delta": text}

    def close_thought(self, text: str) -> None:
        """Completes the last item with all thoughts and emits their end and its own."""
        self._early = []  # of the tokens of the thoughts
        self.emit({**self._part("response.reasoning_text.done"), "text": text})
        self._close(status="completed", content=[{"type": "reasoning_text", "text": text}])

    def add_call(self, call: Call) -> None:
        """Adds a function_call and emits its start, its arguments and its end."""
        self._early = []  # of the call's own tokens
        item = {"id": self.make_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": call.id}
        self._open({**item, "name": call.name, "arguments": ""})
        place = {"item_id": item["id"], "output_index": len(self.blocks) - 1}
        self.emit({"type": "response.function_call_arguments.delta", **place, "delta": call.text})
        done = {"type": "response.function_call_arguments.done", **place, "name": call.name, "arguments": call.text}
        self.emit(done)
        self._close(status="completed", arguments=call.text)

    @property
    def _status(self) -> str:
        return "incomplete" if self.end.reason in ("length", "timeout") else "completed"

    def _response(self, status: str) -> JsonObject:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.ask.model,
            **self.ask.repeated,
            "truncation": "auto" if self.ask.dropped else "disabled",
            "output": list(self.blocks),
            "usage": None,
        }

    def _open(self, item: JsonObject) -> None:
        self.blocks.append(item)
        self.emit(self._item("response.output_item.added"))

    def _close(self, **fields: Any) -> None:
        self.blocks[-1] = {**self.blocks[-1], **fields}
        self.emit(self._item("response.output_item.done"))

    def _item(self, kind: str) -> JsonObject:
        return {"type": kind, "output_index": len(self.blocks) - 1, "item": self.blocks[-1]}

    def _part(self, kind: str) -> JsonObject:
        index = len(self.blocks) - 1
        return {"type": kind, "item_id": self.blocks[-1]["id"], "output_index": index, "content_index": 0}


def _text_part(text: str, logprobs: list[JsonObject]) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
