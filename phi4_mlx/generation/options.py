"""Decode options: the settings of one answer, and what a mask and a proposer have to provide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from phi4_mlx.errors import check_whole
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE
from phi4_mlx.generation.sampling import Draw, LogitsProcessor

Progress = Callable[[int, int], None]  # (tokens prefilled, tokens to prefill)


class LogitsMask(Protocol):
    """Restricts one answer, such as a `phi4_mlx.grammar.constraint.Constraint`."""

    def mask(self) -> mx.array | None:
        """The tokens allowed next, bool [V]; None for all."""

    def accept(self, token: int) -> list[int] | None:
        """Takes a drawn token. Returns the tokens forced to follow it, or None if another must be drawn instead."""


def is_forced(mask: LogitsMask | None) -> bool:
    """True if a mask has refused a drawn token to end the answer within its limit; a mask may have no such limit."""
    return getattr(mask, "forced", False)


class Proposer(Protocol):
    """Guesses tokens ahead, such as a `phi4_mlx.generation.speculate.PromptLookup`."""

    def begin(self, ids: Sequence[int]) -> None:
        """Starts a sequence with the ids already in it."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens that are final."""

    def took(self, tokens: int, seconds: float) -> None:
        """Records the wall time of a forward pass over `tokens` tokens."""

    def pays(self) -> bool:
        """True if a guess is worth waiting for the token before it."""

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""


class RowProposer(Protocol):
    """Guesses tokens ahead for a row of a batch, which decides how many; each row has its own."""

    def begin(self, ids: Sequence[int]) -> None:
        """Starts a sequence with the ids already in it; without ids, frees what is cached."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens that are final."""

    def read(self, most: int) -> bool:
        """True if it can guess at once; else reads up to `most` tokens that it must read before."""

    @property
    def chance(self) -> float:
        """Probability that a guess holds if those before it did; 0 without a guess."""

    def ahead(self, n: int) -> list[int]:
        """The n tokens likely to come next, or fewer."""

    def nbytes(self, length: int) -> int:
        """Bytes that it keeps for a sequence of that length."""


@dataclass(frozen=True)
class DecodeOptions:
    """The options of `generate_step` and, with `stop`, of `stream_generate`; see there.

    Raises:
        RequestError: a number is outside its range.
    """

    max_tokens: int = 256
    sampler: Draw | None = None
    logits_processors: Iterable[LogitsProcessor] | None = None
    logits_mask: LogitsMask | None = None
    stop: str | Sequence[str] | None = None
    kv_bits: int | None = None
    max_kv_size: int | None = None
    proposer: Proposer | None = None
    prefill_step_size: int = PREFILL_STEP_SIZE
    prompt_progress_callback: Progress | None = None

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1)
        check_whole("prefill_step_size", self.prefill_step_size, 1)
