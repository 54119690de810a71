"""OpenAI's /v1/chat/completions: its JSON -> `Ask`, and answers -> its JSON and its stream.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phi4_mlx.server.apis.body import (
    ANSWERS_LIMIT,
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
from phi4_mlx.server.apis.wire import (
    DONE,
    FINISH,
    Answer,
    Ask,
    Call,
    Delta,
    End,
    Usage,
    WireError,
    error_body,
    in_call_order,
    logprobs_json,
    sse,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
CALLS_LIMIT = 128  # in one message
def parse(body: Any, vocabulary: int) -> Ask:
    """What a body asks for.

    Args:
        body: as `json.loads` made it.
        vocabulary: how many token ids there are.

    Raises:
        WireError: it asks for what is malformed, too much, or not done here; says which field.
    """
    fields = read_body(body)
    fields.forbid("tools and tool_choice have taken its place", "functions", "function_call")
    fields.forbid("this model reads and writes text alone", "audio")
    fields.forbid("nothing is fetched", "web_search_options")
    fields.forbid("no answer is moderated", "moderation")
    for modality in fields.items("modalities", 8):
        if modality != "text":
            fields.refuse("modalities", f"holds {shown(modality)}; this model writes text alone")
    tools = _read_tools(fields)
    newer = read_max_tokens(fields, "max_completion_tokens")
    older = read_max_tokens(fields)
    return Ask(
        model=read_model(fields),
        messages=_read_messages(fields),
        tools=tools,
        tool_choice=read_tool_choice(fields, tools, _tool_choice(fields)),
        parallel_tool_calls=fields.boolean("parallel_tool_calls", True),
        response_format=read_response_format(fields),
        sampling=read_sampling(fields, vocabulary),
        max_tokens=older if newer is None else newer,
        stop=read_stop(fields),
        n=fields.whole("n", 1, 1, ANSWERS_LIMIT),
        stream=fields.boolean("stream", False),
        include_usage=fields.child("stream_options").boolean("include_usage", False),
        top_logprobs=_top_logprobs(fields),
    )


def _read_tools(fields: Fields) -> list[dict[str, Any]]:
    tools = read_tools(fields)
    for tool in tools:
        tool.need("function")
    return [read_tool(tool.child("function")) for tool in tools]


def _tool_choice(fields: Fields) -> str:
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return fields.one_of("tool_choice", ("none", "auto", "required"))
    given = fields.child("tool_choice")
    given.one_of("type", ("function",))
    function = given.child("function")
    function.need("name")
    return function.text("name", "", 1, NAME_CHARS_LIMIT)


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs", None, 0, TOP_LOGPROBS_LIMIT)
    if fields.boolean("logprobs", False):
        return top or 0
    if top:
        fields.refuse("top_logprobs", f"is {top}, but logprobs is not true")
    return None


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    fields.need("messages")
    return in_call_order([_message(each) for each in fields.children("messages", MESSAGES_LIMIT, 1)])


def _message(given: Fields) -> dict[str, Any]:
    """A message with nothing in it but what `check_messages` knows: a client's other fields have no say."""
    given.need("role")
    role = given.one_of("role", ROLES)
    given.forbid("tool_calls has taken its place", "function_call")
    given.forbid("this model reads text alone", "audio")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = read_text(given)
    if role == "assistant" and content is None and given.has("refusal"):
        content = given.text("refusal", "")
    calls = [_call(each) for each in given.children("tool_calls", CALLS_LIMIT)]
    if calls and role != "assistant":
        given.refuse("tool_calls", f"belong to the assistant, not to the role {role}")
    if content is None and not calls:
        given.refuse("content", "is missing")
    message["content"] = content or ""
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = given.text("tool_call_id", "", 0, NAME_CHARS_LIMIT)
    return message


def _call(given: Fields) -> dict[str, Any]:
    given.one_of("type", ("function",), "function")
    given.need("function")
    function = given.child("function")
    function.need("name")
    name = function.text("name", "", 1, NAME_CHARS_LIMIT)
    return tool_call(given.text("id", "", 0, NAME_CHARS_LIMIT), name, read_arguments(function))


class ChatAnswer(Answer):
    """Answers as chat.completion, or as a stream of chat.completion.chunk."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._id = self.make_id("chatcmpl-")
        self._calls = [0] * self.ask.n  # of each answer, so far
        self._ends: list[End] = []

    def whole(self, items: Iterable[Delta | End]) -> dict[str, Any]:
        """A chat.completion."""
        texts: list[list[str]] = [[] for _ in range(self.ask.n)]
        calls: list[list[Call]] = [[] for _ in texts]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in texts]
        ends = [End(index) for index in range(self.ask.n)]
        for item in items:
            if isinstance(item, End):
                ends[item.index] = item
                continue
            texts[item.index].append(item.text)
            calls[item.index] += [item.call] if item.call else []
            logprobs[item.index] += logprobs_json(item.logprobs)
        choices = []
        for end in ends:
            text = "".join(texts[end.index])
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls[end.index]:
                message["content"] = text or None
                message["tool_calls"] = [tool_call(it.id, it.name, it.text) for it in calls[end.index]]
            choice = {"index": end.index, "message": message, "finish_reason": FINISH[end.reason]}
            choices.append({**choice, "logprobs": self._logprobs(logprobs[end.index])})
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": Usage.of(ends, self.ask.n).openai(),
        }

    def opening(self) -> bytes:
        """A chunk for each answer that says who speaks."""
        return b"".join(self._event(index, {"role": "assistant", "content": ""}) for index in range(self.ask.n))

    def chunk(self, item: Delta | End) -> bytes:
        """A chunk of text, of a call, or with the reason of the end."""
        if isinstance(item, End):
            self._ends.append(item)
            return self._event(item.index, {}, finish_reason=FINISH[item.reason])
        events = b""
        logprobs = logprobs_json(item.logprobs) if self.ask.top_logprobs is not None else []
        if item.text or logprobs:
            events += self._event(item.index, {"content": item.text}, logprobs=self._logprobs(logprobs))
        if item.call:
            call = tool_call(item.call.id, item.call.name, item.call.text)
            events += self._event(item.index, {"tool_calls": [{"index": self._calls[item.index], **call}]})
            self._calls[item.index] += 1
        return events

    def closing(self) -> bytes:
        """The count of tokens, if it was asked for, and the end."""
        usage = Usage.of(self._ends, self.ask.n).openai()
        told = (
            sse({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
            if self.ask.include_usage
            else b""
        )
        return told + DONE

    def failure(self, error: WireError) -> bytes:
        """An error in the place of a chunk; the client raises it, and no end follows."""
        return sse(error_body(error))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self.created, "model": self.ask.model}

    def _logprobs(self, content: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.ask.top_logprobs is None else {"content": content, "refusal": None}

    def _event(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return sse({**chunk, "usage": None} if self.ask.include_usage else chunk)
