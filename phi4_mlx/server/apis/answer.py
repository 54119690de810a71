"""The formatters of answers: the interface, and what APIs with the same kind of stream share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.wire import Ask, Call, Delta, End, Usage, WireError, error_body, new_id, sse
from phi4_mlx.server.engine.protocol import TokenLogprob

DONE = b"data: [DONE]\n\n"  # the end of a stream of chunks
FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "timeout": "length"}


@dataclass
class Answer(ABC):
    """Formats the answers to an `Ask`, as one body or as server-sent events.

    Attributes:
        ask: the request.
        created: the time of the request, in seconds since 1970.
        prompt_tokens: the length of all prompts, for an API that reports it before the answer.
        make_id: makes an id from its prefix.
    """

    ask: Ask
    created: int
    prompt_tokens: int = 0
    make_id: Callable[[str], str] = new_id

    heartbeat: ClassVar[bytes] = b": \n\n"  # a comment, which keeps the connection open during a long prefill
    id_prefix: ClassVar[str]

    def __post_init__(self) -> None:
        self.id = self.make_id(self.id_prefix)

    @abstractmethod
    def body(self, items: Iterable[Delta | End]) -> JsonObject:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def opening(self) -> bytes:
        """The events at the start of a stream."""

    @abstractmethod
    def chunk(self, item: Delta | End) -> bytes:
        """The events for one item; there may be none."""

    @abstractmethod
    def closing(self) -> bytes:
        """The events after the last `End`."""

    @abstractmethod
    def failure(self, error: WireError) -> bytes:
        """The events that end a stream which failed; they replace `closing`."""


@dataclass
class Complete:
    """All parts of one answer."""

    end: End
    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the answer."""
        return "".join(self.texts)

    @property
    def thought(self) -> str:
        """The thoughts before the answer."""
        return "".join(self.thoughts)


class ChunkAnswer(Answer):
    """Several answers, streamed in chunks of the same form; OpenAI's chat completions and completions."""

    chunk_object: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ends: list[End] = []

    def closing(self) -> bytes:
        """The token counts, if the client asked for them, and the end of the stream."""
        if not self.ask.include_usage:
            return DONE
        usage = Usage.of(self.ends, self.ask.n).openai()
        return sse({**self.head(self.chunk_object), "choices": [], "usage": usage}) + DONE

    def failure(self, error: WireError) -> bytes:
        """An error in place of a chunk, without the usual end; clients raise it."""
        return sse(error_body(error))

    def head(self, kind: str) -> JsonObject:
        """The first fields of a body or a chunk."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def event(self, choice: JsonObject) -> bytes:
        """A chunk with one choice."""
        chunk = {**self.head(self.chunk_object), "choices": [choice]}
        return sse({**chunk, "usage": None} if self.ask.include_usage else chunk)

    def collect(self, items: Iterable[Delta | End], count: int) -> list[Complete]:
        """The items of `count` answers, sorted by answer."""
        answers = [Complete(End(index)) for index in range(count)]
        for item in items:
            answer = answers[item.index]
            if isinstance(item, End):
                answer.end = item
                continue
            answer.thoughts.append(item.thought)
            answer.texts.append(item.text)
            answer.calls += [item.call] if item.call else []
            answer.logprobs += item.logprobs
        return answers

    def usage(self, answers: Iterable[Complete]) -> JsonObject:
        """The token counts of a body."""
        return Usage.of([answer.end for answer in answers], self.ask.n).openai()


class EventAnswer(Answer):
    """One answer as a list of blocks, streamed as named events; Anthropic's messages and OpenAI's responses.

    Attributes:
        blocks: thoughts, texts and tool calls so far.
        end: the end of the answer.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks: list[JsonObject] = []
        self.end = End()
        self._text: list[str] | None = None  # of the last block, while that is an open text
        self._thought: list[str] | None = None  # of the last block, while that is an open block of thoughts
        self._events: list[JsonObject] = []  # not yet sent

    @abstractmethod
    def final(self) -> JsonObject:
        """The complete answer."""

    @abstractmethod
    def open_text(self) -> None:
        """Adds an empty text block and emits its events."""

    @abstractmethod
    def text_delta(self, text: str) -> JsonObject:
        """The event for more text of the last block."""

    @abstractmethod
    def close_text(self, text: str) -> None:
        """Completes the last block with its whole text and emits its events."""

    @abstractmethod
    def open_thought(self) -> None:
        """Adds an empty block of thoughts and emits its events."""

    @abstractmethod
    def thought_delta(self, text: str) -> JsonObject:
        """The event for more thoughts of the last block."""

    @abstractmethod
    def close_thought(self, text: str) -> None:
        """Completes the last block with all thoughts and emits its events."""

    @abstractmethod
    def add_call(self, call: Call) -> None:
        """Adds a block for a tool call and emits its events."""

    def body(self, items: Iterable[Delta | End]) -> JsonObject:
        """The complete answer."""
        for item in items:
            self.add(item)
        return self.final()

    def chunk(self, item: Delta | End) -> bytes:
        """The events for one item."""
        self.add(item)
        events, self._events = self._events, []
        return b"".join(map(self.frame, events))

    def add(self, item: Delta | End) -> None:
        """Adds an item to the blocks and emits its events."""
        if isinstance(item, End):
            self.end = item
            if not self.blocks or self._thought is not None:  # clients expect at least one text or call
                self._begin_text()
            self._finish_text()
            return
        if item.thought:
            if self._thought is None:
                self._thought = []
                self.open_thought()
            self._thought.append(item.thought)
            self.emit(self.thought_delta(item.thought))
        if item.text:
            text = self._begin_text() if self._text is None else self._text
            text.append(item.text)
            self.emit(self.text_delta(item.text))
        if item.call:
            self._finish_thought()
            self._finish_text()
            self.add_call(item.call)

    def emit(self, event: JsonObject) -> None:
        """Queues an event for the next chunk."""
        self._events.append(event)

    def frame(self, event: JsonObject) -> bytes:
        """A server-sent event named by its type."""
        return sse(event, event["type"])

    def _begin_text(self) -> list[str]:
        self._finish_thought()
        self._text = []
        self.open_text()
        return self._text

    def _finish_thought(self) -> None:
        if self._thought is not None:
            self.close_thought("".join(self._thought))
            self._thought = None

    def _finish_text(self) -> None:
        if self._text is not None:
            self.close_text("".join(self._text))
            self._text = None
