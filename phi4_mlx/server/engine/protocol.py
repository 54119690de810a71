"""What the server and its engine say to each other: plain values, which cross from one process to the other.

The server knows HTTP, JSON and messages; the engine knows token ids, and the text that they make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from phi4_mlx.generation.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """One answer that the engine is asked for.

    Attributes:
        id: names the job in events.
        prompt: token ids, at least one.
        max_tokens: the longest answer, in tokens.
        sampling: how tokens are drawn.
        stop: strings that end the answer before them.
        top_logprobs: how many alternatives each token tells, 0 for none but the token's own; None for no logprobs.
        grammar: what the answer must obey, as `phi4_mlx.grammar.grammars` writes it; None for anything.
        adapter: the name of an adapter in the allowed folder; None for the base.
        timeout_s: seconds from now after which the answer is cut.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    adapter: str | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token: its bytes, its natural log-probability, and (bytes, log-probability) of the likeliest ones."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that has become certain; empty where a token's characters are still incomplete."""

    job: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        job: whose.
        reason: "stop" for an end marker or a stop string, "length" for max_tokens, "timeout" for a job cut by its own
            limit of time.
        stop_string: the stop string that ended it.
        prompt_tokens: the whole prompt.
        cached_tokens: those of them that were not prefilled, because an earlier prompt began alike.
        answer_tokens: drawn.
    """

    job: int
    reason: Literal["stop", "length", "timeout"]
    stop_string: str | None
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Failure:
    """A job that came to nothing: an HTTP status and one line for the client."""

    job: int
    status: int
    message: str


Event = Piece | Finish | Failure


@dataclass(frozen=True)
class Cancel:
    """Forget a job: its client has left."""

    job: int


@dataclass(frozen=True)
class Ping:
    """Are you there? `number` tells one question from another."""

    number: int


@dataclass(frozen=True)
class Pong:
    """What the engine is at: jobs under way, and counts and bytes since its start, by name."""

    number: int
    gauges: Mapping[str, float]


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        longest: tokens that a prompt and its answer may come to: what the context holds, or the memory.
    """

    longest: int


@dataclass(frozen=True)
class Broken:
    """The model cannot be loaded: one line for whoever started the server."""

    message: str
