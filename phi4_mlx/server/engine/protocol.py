"""The messages between the server and its engine: plain values that are sent from one process to the other.

The server handles HTTP, JSON and conversations; the engine handles token ids and their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.tokens.prompt import Prompt


@dataclass(frozen=True)
class Job:
    """A request to the engine for one answer.

    Attributes:
        id: identifies the job in events.
        prompt: token ids, at least one, with the pictures and sounds among them; pickled with the job.
        max_tokens: the longest answer, in tokens.
        sampling: the sampling settings.
        stop: strings that end the answer; the text does not include them.
        top_logprobs: number of alternatives reported with each token; 0 reports only the token's own log-probability,
            None reports none.
        grammar: the grammar that the answer must follow, as text of `phi4_mlx.grammar.grammars`; None for free text.
        adapter: the name of an adapter in `Settings.adapters`; None for the model itself.
        timeout_s: seconds after which the answer ends, from the time the engine takes the job.
        priority: a job of a lower number is served first.
    """

    id: int
    prompt: Prompt
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    adapter: str | None = None
    timeout_s: float = 600.0
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token: its bytes, its natural log-probability, and (bytes, log-probability) of the likeliest tokens."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that is final; empty if a token ends within a character.

    Attributes:
        job: the job's id.
        text: the text.
        logprobs: of the tokens, if the job asks for them.
        forced: True once max_tokens forces the answer to its end; the model itself would have continued otherwise.
    """

    job: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    forced: bool = False


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        job: the job's id.
        reason: "stop" for an end marker or a stop string, "length" for max_tokens (also where a grammar forced the end
            of the answer), "timeout" for timeout_s.
        stop_string: the stop string that ended it; None if there was none.
        prompt_tokens: tokens of the whole prompt.
        cached_tokens: tokens of the prompt that were not prefilled, because an earlier prompt has the same prefix.
        answer_tokens: sampled tokens.
    """

    job: int
    reason: Literal["stop", "length", "timeout"]
    stop_string: str | None
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Failure:
    """A job that failed: an HTTP status and one line for the client."""

    job: int
    status: int
    message: str


@dataclass(frozen=True)
class Cancel:
    """Ends a job whose client has disconnected."""

    job: int


@dataclass(frozen=True)
class Ping:
    """Asks for the state of the engine; the `Pong` repeats the number."""

    number: int


@dataclass(frozen=True)
class Leave:
    """Ends the engine in order: its store takes what is in its memory, and other ranks end too."""


@dataclass(frozen=True)
class Pong:
    """The state of the engine: running jobs, and counts and sizes since its start, by name."""

    number: int
    gauges: Mapping[str, float]


@dataclass(frozen=True)
class Beat:
    """A sign of life, sent by a thread of the engine once a second.

    Attributes:
        turns: steps taken so far; 0 while the model is loaded.
        waiting: True if there is nothing to do.
    """

    turns: int
    waiting: bool


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        longest: most tokens of a prompt and its answer, limited by the context or the memory.
        note: as `Config.context_note`, where the context is the limit.
    """

    longest: int
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """One line for the log."""

    line: str


@dataclass(frozen=True)
class Broken:
    """The engine cannot start: one line for the person who started the server."""

    message: str


Event = Piece | Finish | Failure  # about a job
Command = Job | Cancel | Ping | Leave  # from the server to the engine
Report = list[Event] | Pong | Beat | Ready | Notice | Broken  # from the engine to the server
