"""What every API of the server shares: requests and answers as plain values, errors, server-sent events.

No HTTP and no model in here. `fields` reads JSON into these values; each API's module says how it tells them.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.engine.protocol import TokenLogprob


class WireError(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP.
        message: one line for the client: the field, its value, the limit.
        param: the field's path in the body.
        code: a word that programs may look for.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def type(self) -> str:
        """OpenAI's word for the status."""
        return _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: WireError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    shown = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": shown}


@dataclass(frozen=True)
class Ask:
    """What a request means, whichever API it came by.

    Attributes:
        model: as named by the client; the app knows which models and adapters there are.
        messages: a conversation in OpenAI's form, as `check_messages` takes it; empty for a completion.
        prompts: of a completion, each text or token ids; answered `n` times each, answer i * n + j being prompt i's.
        tools: in OpenAI's form.
        tool_choice: "none", "auto", "required", or the name of one of `tools`.
        parallel_tool_calls: whether one answer may call several times.
        response_format: None, ("json_object",), ("json_schema", schema), ("regex", pattern), ("choice", strings) or
            ("grammar", lark). Beside tools that may be called, an answer calls one or obeys this.
        sampling: how tokens are drawn.
        max_tokens: the longest answer; None for as long as fits.
        stop: strings that end an answer before them.
        n: answers to each prompt.
        stream: whether the answer is told as it is made.
        include_usage: whether a stream ends with the count of tokens.
        top_logprobs: as in `protocol.Job`.
        echo: whether the prompt stands before its answer.
        repeated: what the answer repeats of the request.
    """

    model: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "none"
    parallel_tool_calls: bool = True
    response_format: tuple[Any, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    repeated: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A tool call, whole; `arguments` is JSON without NaN or infinity."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Delta:
    """More of an answer: text, or a tool call, or both in this order."""

    index: int = 0
    text: str = ""
    call: Call | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer; counts as in `protocol.Finish`."""

    index: int = 0
    reason: Literal["stop", "length", "tool_calls", "timeout"] = "stop"
    stop_string: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens of a whole request: a prompt counts once, however often it is answered."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0

    @classmethod
    def of(cls, ends: Iterable[End], n: int) -> Usage:
        """The sum over answers, `n` to a prompt."""
        prompts: dict[int, tuple[int, int]] = {}
        answer_tokens = 0
        for end in ends:
            _, cached = prompts.get(end.index // n, (0, end.cached_tokens))
            prompts[end.index // n] = end.prompt_tokens, min(cached, end.cached_tokens)  # the others found the first's
            answer_tokens += end.answer_tokens
        return cls(sum(all_ for all_, _ in prompts.values()), sum(c for _, c in prompts.values()), answer_tokens)

    def openai(self) -> dict[str, Any]:
        """As chat completions and completions tell it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def new_id(prefix: str) -> str:
    """An id that no one has had or can guess."""
    return prefix + secrets.token_hex(12)


class Answer(ABC):
    """An API's way to tell the answers to an `Ask`: whole, or as server-sent events.

    Args:
        ask: what was asked.
        created: now, in seconds since 1970.
        make_id: makes an id from its prefix.
        prompt_tokens: of the prompts, for an API that tells them first.
    """

    heartbeat = b": \n\n"  # a comment; keeps a connection alive while a long prompt is read

    def __init__(self, ask: Ask, created: int, make_id: Callable[[str], str] = new_id, prompt_tokens: int = 0) -> None:
        self.ask, self.created, self.make_id, self.prompt_tokens = ask, created, make_id, prompt_tokens

    @abstractmethod
    def whole(self, items: Iterable[Delta | End]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def opening(self) -> bytes:
        """What a stream begins with."""

    @abstractmethod
    def chunk(self, item: Delta | End) -> bytes:
        """The events for one item, none perhaps."""

    @abstractmethod
    def closing(self) -> bytes:
        """What follows the last `End`."""

    @abstractmethod
    def failure(self, error: WireError) -> bytes:
        """What ends a stream instead, when something goes wrong in its midst."""


def json_bytes(value: Any) -> bytes:
    """JSON on one line, as UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for end_of_line in "\x85\u2028\u2029":  # to JSON mere characters, but some clients split lines at them
        if end_of_line in text:
            text = text.replace(end_of_line, f"\\u{ord(end_of_line):04x}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair that the model wrote as an escape
        return json.dumps(value, separators=(",", ":")).encode()


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event with JSON for data."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + json_bytes(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""How a stream of chat completions or completions ends."""


def token_text(token: bytes) -> str:
    """A token for people: its text, or its bytes if they are no whole characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; OpenAI's word for impossible is -9999."""
    return logprob if logprob > -9999.0 else -9999.0


def logprobs_json(logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens in the form of chat completions and responses."""

    def entry(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token_text(token), "logprob": finite(logprob), "bytes": list(token)}

    return [{**entry(it.text, it.logprob), "top_logprobs": [entry(*top) for top in it.top]} for it in logprobs]


def in_call_order(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with tools' results in the order of the calls: the model is shown no ids to match them by."""
    ordered: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    place: dict[str, int] = {}  # of each call of the assistant before them
    for message in [*messages, {"role": ""}]:
        if message["role"] == "tool":
            results.append(message)
            continue
        ordered += sorted(results, key=lambda it: place.get(it.get("tool_call_id", ""), len(place)))
        results = []
        place = {call["id"]: i for i, call in enumerate(message.get("tool_calls", ()))}
        ordered.append(message)
    return ordered[:-1]

FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "timeout": "length"}
