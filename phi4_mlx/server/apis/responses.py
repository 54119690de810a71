"""OpenAI's /v1/responses: parses its JSON into an `Ask`, and formats answers and streams.

The server stores nothing: a client sends the whole conversation each time, and fields that refer to a stored one are
refused.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.answer import EventAnswer
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
from phi4_mlx.server.apis.wire import Ask, Call, Delta, End, WireError, in_call_order, logprobs_json
from phi4_mlx.server.limits import (
    INCLUDE_LIMIT,
    MESSAGES_LIMIT,
    METADATA_CHARS_LIMIT,
    METADATA_LIMIT,
    TOP_LOGPROBS_LIMIT,
)

ROLES = ("system", "developer", "user", "assistant")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
LOGPROBS = "message.output_text.logprobs"


def parse(body: Any, vocabulary: int) -> Ask:
    """Parses a body.

    Args:
        body: the result of `json.loads`.
        vocabulary: the number of token ids.

    Raises:
        WireError: the body is malformed, exceeds a limit, or asks for something that is not supported; names the field.
    """
    fields = read_body(body)
    fields.forbid("nothing is stored; send the whole conversation as input", "previous_response_id", "conversation")
    fields.forbid("nothing is stored; send instructions and input", "prompt")
    fields.forbid("the server answers only while the client waits", "background", "background_options")
    fields.forbid("an input that is too long is refused, not truncated", "context_management")
    fields.forbid("this model reads and writes only text", "image")
    fields.forbid("this server does not moderate answers", "moderation")
    if fields.one_of("truncation", ("disabled", "auto"), "disabled") == "auto":
        fields.refuse("truncation", "must be 'disabled': an input that is too long is refused, not truncated")
    tools = [read_tool(tool) for tool in read_tools(fields)]
    choice = check_tool_choice(fields, tools, read_tool_choice(fields))
    sampling = read_sampling(fields, vocabulary)
    max_tokens = read_max_tokens(fields, "max_output_tokens")
    parallel = fields.boolean("parallel_tool_calls", True)
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=read_response_format(fields.child("text"), "format"),
        sampling=sampling,
        max_tokens=max_tokens,
        stop=read_stop(fields),
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
            "text": {"format": fields.child("text").get("format") or {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in tools],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        },
    )


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    include = fields.items("include", INCLUDE_LIMIT)
    for each in include:
        if not isinstance(each, str):
            fields.refuse("include", f"must be a list of strings, not {shown(each)}")
    if LOGPROBS in include or top:
        return top or 0
    return None


def _metadata(fields: Fields) -> dict[str, str]:
    pairs = fields.child("metadata")
    if len(pairs.values) > METADATA_LIMIT:
        fields.refuse("metadata", f"must have at most {METADATA_LIMIT} pairs, not {len(pairs.values):,}")
    return {name: pairs.text(name, "", 0, METADATA_CHARS_LIMIT) for name in pairs.values}


def _read_messages(fields: Fields) -> list[JsonObject]:
    fields.need("input")
    instructions = fields.text("instructions", "")
    messages: list[JsonObject] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(fields.get("input"), str):
        return [*messages, {"role": "user", "content": fields.get("input")}]
    for item in fields.children("input", MESSAGES_LIMIT, 1):
        _add(messages, item)
    if not messages:
        fields.refuse("input", "contains no message")
    return in_call_order(messages)


def _add(messages: list[JsonObject], item: Fields) -> None:
    """Adds an item of the input; a call becomes part of the assistant's turn before it."""
    kind = item.one_of("type", ITEMS, "message")
    if kind == "reasoning":  # of another model
        return
    if kind == "message":
        item.need("role", "content")
        role = item.one_of("role", ROLES)
        messages.append({"role": "system" if role == "developer" else role, "content": read_text(item)})
        return
    call_id = item.needed_name("call_id")
    if kind == "function_call_output":
        item.need("output")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": read_text(item, "output")})
        return
    call = tool_call(call_id, item.needed_name("name"), read_arguments(item))
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


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
