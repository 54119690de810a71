"""OpenAI's /v1/responses: its JSON -> `Ask`, and an answer -> its JSON and its stream.

Nothing is stored, so a conversation is sent whole each time; what would refer to a stored one is refused.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from phi4_mlx.server.apis.body import (
    MESSAGES_LIMIT,
    NAME_CHARS_LIMIT,
    TOP_LOGPROBS_LIMIT,
    Fields,
    read_arguments,
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
from phi4_mlx.server.apis.wire import Answer, Ask, Call, Delta, End, Usage, WireError, in_call_order, logprobs_json, sse

ROLES = ("system", "developer", "user", "assistant")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
INCLUDE_LIMIT = 32
LOGPROBS = "message.output_text.logprobs"
METADATA_LIMIT = 16  # pairs

Event = dict[str, Any]


def parse(body: Any, vocabulary: int) -> Ask:
    """What a body asks for.

    Args:
        body: as `json.loads` made it.
        vocabulary: how many token ids there are.

    Raises:
        WireError: it asks for what is malformed, too much, or not done here; says which field.
    """
    fields = read_body(body)
    fields.forbid("nothing is stored; send the whole conversation as input", "previous_response_id", "conversation")
    fields.forbid("nothing is stored; send instructions and input", "prompt")
    fields.forbid("an answer is made while its client waits", "background", "background_options")
    fields.forbid("an input that does not fit is refused, not cut", "context_management")
    fields.forbid("this model reads and writes text alone", "image")
    fields.forbid("no answer is moderated", "moderation")
    if fields.one_of("truncation", ("disabled", "auto"), "disabled") == "auto":
        fields.refuse("truncation", "must be 'disabled': an input that does not fit is refused, not cut")
    tools = [read_tool(tool) for tool in read_tools(fields)]
    choice = read_tool_choice(fields, tools, _tool_choice(fields))
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


def _tool_choice(fields: Fields) -> str:
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return fields.one_of("tool_choice", ("none", "auto", "required"))
    given = fields.child("tool_choice")
    given.one_of("type", ("function",))
    given.need("name")
    return given.text("name", "", 1, NAME_CHARS_LIMIT)


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    for each in fields.items("include", INCLUDE_LIMIT):
        if not isinstance(each, str):
            fields.refuse("include", f"must hold texts, not {shown(each)}")
    asked = LOGPROBS in fields.items("include", INCLUDE_LIMIT)
    return (top or 0) if asked or top else None


def _metadata(fields: Fields) -> dict[str, str]:
    pairs = fields.child("metadata")
    if len(pairs.values) > METADATA_LIMIT:
        fields.refuse("metadata", f"must hold at most {METADATA_LIMIT} pairs, not {len(pairs.values):,}")
    return {name: pairs.text(name, "", 0, 512) for name in pairs.values}


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    fields.need("input")
    instructions = fields.text("instructions", "")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(fields.get("input"), str):
        return [*messages, {"role": "user", "content": fields.get("input")}]
    for item in fields.children("input", MESSAGES_LIMIT, 1):
        _add(messages, item)
    if not messages:
        fields.refuse("input", "holds no message")
    return in_call_order(messages)


def _add(messages: list[dict[str, Any]], item: Fields) -> None:
    """Adds an item of the input; a call joins the assistant's turn that it was made in."""
    kind = item.one_of("type", ITEMS, "message")
    if kind == "reasoning":  # of another model: this one thinks in its text, if at all
        return
    if kind == "message":
        item.need("role", "content")
        role = item.one_of("role", ROLES)
        messages.append({"role": "system" if role == "developer" else role, "content": read_text(item)})
        return
    item.need("call_id")
    call_id = item.text("call_id", "", 1, NAME_CHARS_LIMIT)
    if kind == "function_call_output":
        item.need("output")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": read_text(item, "output")})
        return
    item.need("name")
    call = tool_call(call_id, item.text("name", "", 1, NAME_CHARS_LIMIT), read_arguments(item))
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


class ResponseAnswer(Answer):
    """An answer as a response, or as the stream of events that it grows by."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._id = self.make_id("resp_")
        self._sent = 0
        self._output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the message that is still growing, the last of the output
        self._logprobs: list[dict[str, Any]] = []  # its tokens'
        self._untold: list[dict[str, Any]] = []  # tokens whose text has not come yet
        self._end = End()

    def whole(self, items: Iterable[Delta | End]) -> dict[str, Any]:
        """A response that is complete."""
        for item in items:
            for _ in self._events(item):
                pass
        return self._final()

    def opening(self) -> bytes:
        """The response as it is at first: empty."""
        started = self._response("in_progress")
        return self._sse({"type": "response.created", "response": started}) + self._sse(
            {"type": "response.in_progress", "response": started}
        )

    def chunk(self, item: Delta | End) -> bytes:
        """The events of an item."""
        return b"".join(map(self._sse, self._events(item)))

    def closing(self) -> bytes:
        """The whole response."""
        final = self._final()
        return self._sse({"type": f"response.{final['status']}", "response": final})

    def failure(self, error: WireError) -> bytes:
        """An error, and a response that failed by it."""
        code = error.code or ("rate_limit_exceeded" if error.status == 429 else "server_error")
        told = {"type": "error", "code": code, "message": error.message, "param": error.param}
        failed = {**self._response("failed"), "error": {"code": code, "message": error.message}}
        return self._sse(told) + self._sse({"type": "response.failed", "response": failed})

    def _sse(self, event: Event) -> bytes:
        self._sent += 1
        return sse({**event, "sequence_number": self._sent - 1}, event["type"])

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.ask.model,
            **self.ask.repeated,
            "output": list(self._output),
            "usage": None,
        }

    def _final(self) -> dict[str, Any]:
        cut = self._end.reason in ("length", "timeout")
        usage = Usage.of([self._end], 1)
        return {
            **self._response("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.answer_tokens,
            },
        }

    def _events(self, item: Delta | End) -> Iterator[Event]:
        if isinstance(item, End):
            self._end = item
            if not self._output:  # clients expect a message, be it empty
                yield from self._open_text()
            yield from self._close_text("incomplete" if item.reason in ("length", "timeout") else "completed")
            return
        if self.ask.top_logprobs is not None:
            self._untold += logprobs_json(item.logprobs)
        if item.text:
            yield from self._more_text(item.text)
        if item.call:
            yield from self._close_text("completed")
            yield from self._call(item.call)

    def _more_text(self, text: str) -> Iterator[Event]:
        if self._text is None:
            yield from self._open_text()
        assert self._text is not None
        self._text.append(text)
        told, self._untold = self._untold, []
        self._logprobs += told
        yield {**self._part("response.output_text.delta"), "delta": text, "logprobs": told}

    def _open_text(self) -> Iterator[Event]:
        self._text, self._logprobs = [], []
        item = {
            "id": self.make_id("msg_"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._output.append(item)
        yield self._item("response.output_item.added")
        yield {**self._part("response.content_part.added"), "part": _text_part("", [])}

    def _close_text(self, status: str) -> Iterator[Event]:
        told, self._untold = self._untold, []
        if self._text is None:
            return
        self._logprobs += told
        text, self._text = "".join(self._text), None
        part = _text_part(text, self._logprobs)
        self._output[-1] = {**self._output[-1], "status": status, "content": [part]}
        yield {**self._part("response.output_text.done"), "text": text, "logprobs": self._logprobs}
        yield {**self._part("response.content_part.done"), "part": part}
        yield self._item("response.output_item.done")

    def _call(self, call: Call) -> Iterator[Event]:
        item = {"id": self.make_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": call.id}
        self._output.append({**item, "name": call.name, "arguments": ""})
        yield self._item("response.output_item.added")
        here = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield {"type": "response.function_call_arguments.delta", **here, "delta": call.text}
        yield {"type": "response.function_call_arguments.done", **here, "name": call.name, "arguments": call.text}
        self._output[-1] = {**self._output[-1], "status": "completed", "arguments": call.text}
        yield self._item("response.output_item.done")

    def _item(self, kind: str) -> Event:
        return {"type": kind, "output_index": len(self._output) - 1, "item": self._output[-1]}

    def _part(self, kind: str) -> Event:
        at = len(self._output) - 1
        return {"type": kind, "item_id": self._output[-1]["id"], "output_index": at, "content_index": 0}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
