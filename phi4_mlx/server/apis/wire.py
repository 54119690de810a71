"""The values that all APIs share: requests, answers, errors, and their JSON and server-sent events.

Nothing here knows HTTP or the model. Each API's module parses a body into an `Ask`, and formats answers to it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.engine.protocol import TokenLogprob

MESSAGE_CHARS = 2_000  # of an error; a message may quote the client's own text
IGNORED = "x-phi4-ignored"  # a header: what had no effect on the answer
IGNORED_CHARS = 1_000  # of that header
_NOT_IN_HEADERS = re.compile(r"[^ -~]")


class WireError(Exception):
    """A request that the server refuses or cannot complete.

    Attributes:
        status: the HTTP status.
        message: one line for the client: the field, its value and the limit.
        param: the field's path in the body.
        code: an error code for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        if len(message) > MESSAGE_CHARS:
            message = f"{message[: MESSAGE_CHARS - 3]}..."
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param = param if param is None else param[:MESSAGE_CHARS]

    @property
    def type(self) -> str:
        """OpenAI's error type for the status."""
        return ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: WireError) -> JsonObject:
    """An error in OpenAI's form."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


@dataclass(frozen=True)
class Ask:
    """A request, in the same form for every API.

    Attributes:
        model: the client's name for the model, "" if it gives none; the service puts the served name in its place.
        messages: a conversation in OpenAI's form, as `check_messages` takes it; empty for a completion.
        prompts: the prompts of a completion, each text or token ids. Each is answered `n` times; answer i * n + j
            belongs to prompt i.
        tools: in OpenAI's form.
        tool_choice: "none", "auto", "required", or the name of one of `tools`.
        parallel_tool_calls: True if one answer may contain several calls.
        response_format: None, ("json_object",), ("json_schema", schema), ("regex", pattern), ("choice", strings) or
            ("grammar", lark). With tools that may be called, an answer either calls one or follows this format.
        strict: True if the client demands `response_format` as it is; otherwise what no grammar can enforce is dropped.
        sampling: the sampling settings.
        max_tokens: the longest answer in tokens; None for as many as fit.
        stop: strings that end an answer; the answer does not include them.
        n: answers to each prompt.
        stream: True to send the answer as it is generated.
        include_usage: True to end a stream with the token counts.
        top_logprobs: as in `protocol.Job`.
        echo: True to repeat the prompt before its answer.
        priority: as in `protocol.Job`.
        repeated: fields of the request that the answer repeats.
        ignored: paths of the fields and parts that have no effect on the answer.
        dropped: number of the oldest turns that the service left out, because the context has no room for them.
    """

    model: str
    messages: list[JsonObject] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)
    tools: list[JsonObject] = field(default_factory=list)
    tool_choice: str = "none"
    parallel_tool_calls: bool = True
    response_format: tuple[Any, ...] | None = None
    strict: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    priority: int = 0
    repeated: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    dropped: int = 0


@dataclass(frozen=True)
class Call:
    """A complete tool call; `arguments` is JSON without NaN or infinity."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Delta:
    """The next part of an answer: any of thoughts, text and a tool call, in this order."""

    index: int = 0
    text: str = ""
    call: Call | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    thought: str = ""


@dataclass(frozen=True)
class End:
    """The end of an answer; token counts as in `protocol.Finish`."""

    index: int = 0
    reason: Literal["stop", "length", "tool_calls", "timeout"] = "stop"
    stop_string: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Usage:
    """Token counts of a whole request; a prompt counts once, no matter how many answers it has."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0

    @classmethod
    def of(cls, ends: Iterable[End], n: int) -> Usage:
        """The sum over all answers, `n` to a prompt."""
        prompt_tokens: dict[int, int] = {}  # by prompt
        cached_tokens: dict[int, int] = {}
        answer_tokens = 0
        for end in ends:
            prompt = end.index // n
            prompt_tokens[prompt] = end.prompt_tokens
            # The least: later answers to a prompt find what the first one has just cached.
            cached_tokens[prompt] = min(cached_tokens.get(prompt, end.cached_tokens), end.cached_tokens)
            answer_tokens += end.answer_tokens
        return cls(sum(prompt_tokens.values()), sum(cached_tokens.values()), answer_tokens)

    def openai(self) -> JsonObject:
        """The usage object of chat completions and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def ignored_header(paths: Iterable[str]) -> str:
    """Paths for the header x-phi4-ignored: one line of ASCII, cut at a comma if it is too long."""
    text = _NOT_IN_HEADERS.sub("?", ", ".join(paths))
    return text if len(text) <= IGNORED_CHARS else text[:IGNORED_CHARS].rpartition(", ")[0] + ", ..."


def new_id(prefix: str) -> str:
    """A new random id, which cannot be guessed."""
    return prefix + secrets.token_hex(12)


def json_bytes(value: Any) -> bytes:
    """JSON on one line, as UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for end_of_line in "\x85\u2028\u2029":  # plain characters in JSON, but some clients split lines at them
        if end_of_line in text:
            text = text.replace(end_of_line, f"\\u{ord(end_of_line):04x}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate that the model wrote as an escape
        return json.dumps(value, separators=(",", ":")).encode()


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event with JSON data."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + json_bytes(data) + b"\n\n"


def token_text(token: bytes) -> str:
    """A token as readable text: its characters, or its bytes if they are not complete characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def finite(logprob: float) -> float:
    """A log-probability that JSON can represent; OpenAI's value for an impossible token is -9999."""
    return logprob if logprob > -9999.0 else -9999.0


def logprobs_json(logprobs: Iterable[TokenLogprob]) -> list[JsonObject]:
    """Log-probabilities of tokens in the form of chat completions and responses."""

    def entry(token: bytes, logprob: float) -> JsonObject:
        return {"token": token_text(token), "logprob": finite(logprob), "bytes": list(token)}

    return [{**entry(it.text, it.logprob), "top_logprobs": [entry(*top) for top in it.top]} for it in logprobs]


def in_call_order(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """The messages, with tool results in the order of their calls; the prompt has no ids to match them by."""
    ordered: list[JsonObject] = []
    place: dict[str, int] = {}  # of each call in the assistant's message before the results
    for is_result, run in groupby(messages, key=lambda message: message["role"] == "tool"):
        if is_result:
            ordered += sorted(run, key=lambda result: place.get(result.get("tool_call_id", ""), len(place)))
        else:
            ordered += run
            place = {call["id"]: i for i, call in enumerate(ordered[-1].get("tool_calls", ()))}
    return ordered
