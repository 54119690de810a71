"""One sequence of a batch, and what a step of the batch says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import mlx.core as mx

from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.options import LogitsMask, RowProposer
from phi4_mlx.generation.sampling import Draw, LogitsProcessor, Sampler
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime

FORCED_RUN = 8  # forced tokens from which a prefill is faster than a step each
WORTH_WAITING = 32  # tokens to prefill that two sequences share, from which the second waits for the first


@dataclass(eq=False)
class BatchSequence:
    """A prompt and its answer so far.

    Attributes:
        model: the model that answers; sequences of several models may share a `Batch`, but no forward pass.
        ids: the prompt, and every token drawn since; a `Prompt` if there are media.
        max_tokens: the most tokens to draw.
        sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
        processors: each (all ids so far [S], logits [1, V]) -> logits [1, V], in turn.
        logits_mask: restricts the answer; see `generate_step`.
        cache: of the first ids; None for none. Taken over, and changed.
        last_turn: tokens before the last turn, where a snapshot lets other prompts branch off; 0 if unknown.
        adapter: the user's adapter of all its tokens, by name; None for that of its media, or for the base alone.
        kv_bits: 4 or 8 quantises its keys and values; None does not. A `cache` that is given must have the same.
        priority: a sequence of a lower number starts sooner, and takes the place of a running one of a higher number.
        proposer: guesses its next tokens; None for no guesses.
        end_ids: ends of an answer, which are never guessed.
        restarts: times that its rows were lost to a failure of a whole step.
        cost: bytes that its context takes.
        arrival: its number in the order of arrival; set by the batch.
    """

    model: LanguageModel
    ids: list[int]
    max_tokens: int
    sampler: Draw | None = None
    processors: Sequence[LogitsProcessor] = ()
    logits_mask: LogitsMask | None = None
    cache: PromptCache | None = None
    last_turn: int = 0
    adapter: str | None = None
    kv_bits: int | None = None
    priority: int = 0
    proposer: RowProposer | None = None
    end_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self.restarts = 0
        self.cost = self.model.context_cost(self.kv_bits)
        self.arrival = 0
        self._told = 0  # ids that the proposer knows

    @property
    def drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - self.prompt_tokens

    @property
    def regime(self) -> Regime:
        """The RoPE table that all its ids need."""
        return self.model.regime(len(self.ids))

    @property
    def line(self) -> tuple[int, int]:
        """Its place among other sequences; the lowest is served first."""
        return self.priority, self.arrival

    @property
    def nbytes(self) -> int:
        """Bytes that a cache of all its ids takes, in whole buffers, with its snapshots and those of its proposer."""
        return cache_bytes(self.cost, len(self.ids)) + self.proposer_bytes

    @property
    def proposer_bytes(self) -> int:
        """Bytes that its proposer keeps."""
        return self.proposer.nbytes(len(self.ids)) if self.proposer is not None else 0

    @property
    def is_greedy(self) -> bool:
        """True if it takes the likeliest token of unchanged logits."""
        likeliest = self.sampler is None or (isinstance(self.sampler, Sampler) and self.sampler.temp == 0)
        return likeliest and not self.processors and self.logits_mask is None

    def new_cache(self) -> PromptCache:
        """An empty cache of the kind that it needs."""
        return self.model.make_cache(kv_bits=self.kv_bits)

    def inform(self) -> None:
        """Tells the proposer of the ids that it does not know."""
        assert self.proposer is not None
        if self._told:
            self.proposer.extend(self.ids[self._told :])
        else:
            self.proposer.begin(self.ids)
        self._told = len(self.ids)

    def guesses(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; neither the end of an answer nor a slot of a picture."""
        assert self.proposer is not None
        never = self.end_ids | self.model.slot_ids
        return [*takewhile(lambda token: token not in never, self.proposer.ahead(most))]

    def rest(self) -> None:
        """Frees its cache and that of its proposer, until it is prefilled again."""
        self.cache, self._told = None, 0
        if self.proposer is not None:
            self.proposer.begin(())

    def take(self, token: int) -> list[int] | None:
        """Appends a drawn token; returns it with the tokens that a grammar forces after it.

        None if the grammar wants another token in its place.
        """
        forced = self.logits_mask.accept(token) if self.logits_mask is not None else []
        if forced is None:
            return None
        tokens = [token, *forced][: self.max_tokens - self.drawn]
        self.ids += tokens
        return tokens

    def waits_for(self, other: BatchSequence) -> bool:
        """True if the ids that `other` prefills next are its own too, so that it had better reuse their cache."""
        if self.model is not other.model or other.priority > self.priority:
            return False
        if (self.adapter, self.kv_bits, self.regime) != (other.adapter, other.kv_bits, other.regime):
            return False
        end = min((other.cache.offset if other.cache else 0) + WORTH_WAITING, len(other.ids))
        return self.ids[:end] == other.ids[:end]

    def in_step(self, length: int, regime: Regime) -> bool:
        """True if a cache of that length and regime continues one token at a time."""
        return self.regime == regime and len(self.ids) - length < FORCED_RUN


@dataclass(frozen=True)
class Token:
    """A drawn token and the log-probabilities [V] it was drawn from, computed only when read.

    The latter are None for a token that a grammar forced.
    """

    sequence: BatchSequence
    token: int
    logprobs: mx.array | None


@dataclass(frozen=True)
class Fault:
    """A sequence that cannot continue, and the reason."""

    sequence: BatchSequence
    error: Exception
