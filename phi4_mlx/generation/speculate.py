"""Speculative decoding: guesses of the next tokens, which one forward pass verifies together.

`PromptLookup` guesses that the end of the sequence continues as it did at an earlier place; `DraftModel` asks a smaller
model. Neither changes the tokens drawn: a guess holds if the model draws that token from its own distribution. For a
deterministic guess this equals rejection sampling.

The length of a guess follows from the measured time of forward passes and the share of guesses that held.

Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.steps import finish_chunk, generate_step
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.safe import safe
from phi4_mlx.tokens.prompt import Prompt

Mode = Literal["auto", "off", "lookup"]

MAX_GUESSES = 16  # a pass; half of them would have to hold to pay for more
MIN_GAIN = 1.05  # expected gain of a guess, to cover its bookkeeping
NGRAM = 2  # tokens that an earlier place must share with the end
CANDIDATES = 16  # earlier places examined, the latest first
DRAFT_CHANCE = 0.8  # that a guess of a draft model holds, before any has been tried
READ_AT_ONCE = 64  # tokens that a draft model reads at once before it guesses; more are a prefill in chunks
LONGEST = 32  # shared tokens beyond which a longer match is not better
DECAY = 0.9  # weight of past measurements at the next one
PRIOR = 0.5  # passes that a further token is taken to cost before it is measured; the worst case, on a CPU
FORGET = 256  # passes without a guess, after which the prior counts again: a machine is not busy forever


class Pace:
    """The time of a forward pass of one token, and of every further token in it.

    Args:
        timed: measure the times. False assumes that a further token costs a tenth of a pass, as where reading the
            weights dominates; guesses are then reproducible.
    """

    def __init__(self, timed: bool):
        self.timed = timed
        self._step_s = 0.0
        self._further = PRIOR if timed else 0.1  # in passes
        self._plain = 0  # passes of one token since the last longer one

    def took(self, tokens: int, seconds: float) -> None:
        """Records the wall time of a pass over `tokens` tokens."""
        if not self.timed:
            return
        if tokens == 1:
            # The fastest recent pass: passes are often delayed, never too fast.
            self._step_s = min(seconds, self._step_s / DECAY) if self._step_s else seconds
            self._plain += 1
            if self._plain == FORGET:
                self._plain, self._further = 0, min(self._further, PRIOR)
        elif self._step_s:
            self._plain = 0
            further = (seconds / self._step_s - 1) / (tokens - 1)
            self._further = DECAY * self._further + (1 - DECAY) * min(max(further, 0.0), 2.0)

    @property
    def known(self) -> bool:
        """True unless the time of a pass of one token is still to be measured."""
        return not self.timed or self._step_s > 0

    def length(self, chance: float, most: int) -> int:
        """The number of guesses with the most expected tokens a second; 0 if guessing does not pay.

        Args:
            chance: probability that a guess holds if those before it did.
            most: upper limit.
        """
        return self.further([[chance**n for n in range(1, most + 1)]], min(most, MAX_GUESSES))

    def further(self, gains: Sequence[Sequence[float]], most: int) -> int:
        """`length` of rows that share a pass.

        Args:
            gains: for each row, the probability of each further token that the pass makes it final.
            most: upper limit.
        """
        best, gain, tokens = 0, MIN_GAIN * len(gains), float(len(gains))
        for n in range(most):
            tokens += sum(row[n] for row in gains if n < len(row))
            if (promised := tokens / (1 + (n + 1) * self._further)) > gain:
                best, gain = n + 1, promised
        return best


class _Rate:
    """Recent success rate, starting from a prior that weighs as much as four observations."""

    def __init__(self, prior: float):
        self.held, self.tried = 4 * prior, 4.0

    def saw(self, held: bool) -> None:
        if self.tried > 1 / (1 - DECAY):
            self.held, self.tried = DECAY * self.held, DECAY * self.tried
        self.held, self.tried = self.held + held, self.tried + 1

    @property
    def chance(self) -> float:
        return self.held / self.tried


class PromptLookup:
    """Guesses from an earlier place in prompt or answer with the same tokens.

    Where guessing does not pay it still compares guesses with the tokens drawn, at no cost, and so notices when it
    would. Memory and time are a few numbers and a few operations a token.

    Args:
        timed: see `Pace`.
    """

    def __init__(self, timed: bool = True):
        self.pace = Pace(timed)
        # By the length of the match: 2 or 3 tokens, 4 to 7, 8 to 15, 16 and more.
        self._rates = [_Rate(prior) for prior in (0.2, 0.5, 0.8, 0.9)]
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended
        self._earlier: list[int] = []  # by place: where its n-gram ended before, or -1
        self._source, self._matched = -1, 0  # the position guessed from next, and the length of the match before it

    def begin(self, ids: Sequence[int]) -> None:
        """See `Proposer.begin`."""
        self._ids, self._latest, self._earlier, self._source = [], {}, [], -1
        for token in ids:
            self._append(token)
        self._source, self._matched = self._find()

    def extend(self, tokens: Sequence[int]) -> None:
        """See `Proposer.extend`."""
        for token in tokens:
            guessed = self._source >= 0
            held = guessed and self._ids[self._source] == token
            if guessed:
                self._rate.saw(held)
            self._append(token)
            if held:
                self._source, self._matched = self._source + 1, self._matched + 1
            else:
                self._source, self._matched = self._find()

    def took(self, tokens: int, seconds: float) -> None:
        """See `Proposer.took`."""
        self.pace.took(tokens, seconds)

    def pays(self) -> bool:
        """See `Proposer.pays`."""
        return self._source >= 0 and self.pace.length(self._rate.chance, MAX_GUESSES) > 0

    def guess(self, most: int) -> list[int]:
        """See `Proposer.guess`."""
        return self.ahead(self.pace.length(self._rate.chance, most)) if self._source >= 0 else []

    @property
    def chance(self) -> float:
        """See `RowProposer.chance`."""
        return self._rate.chance if self._source >= 0 else 0.0

    def ahead(self, n: int) -> list[int]:
        """See `RowProposer.ahead`."""
        guesses: list[int] = []
        for at in range(self._source, self._source + n):
            guesses.append(self._ids[at] if at < len(self._ids) else guesses[at - len(self._ids)])
        return guesses

    def read(self, most: int) -> bool:
        """True: it has read everything that it knows of."""
        return True

    def nbytes(self, length: int) -> int:
        """0: a few numbers a token."""
        return 0

    @property
    def _rate(self) -> _Rate:
        return self._rates[min(max(self._matched.bit_length() - 2, 0), 3)]

    def _append(self, token: int) -> None:
        self._ids.append(token)
        end = len(self._ids)
        ngram = tuple(self._ids[end - NGRAM :])
        self._earlier.append(self._latest.get(ngram, -1) if end >= NGRAM else -1)
        if end >= NGRAM:
            self._latest[ngram] = end

    def _find(self) -> tuple[int, int]:
        """The earlier place with the longest match, the latest of equals, and the match's length; (-1, 0) if none."""
        ids, end = self._ids, len(self._ids)
        source, matched, place = -1, 0, self._earlier[-1] if ids else -1
        for _ in range(CANDIDATES):
            if place < 0:
                break
            n = NGRAM
            while n < min(place, LONGEST) and ids[place - 1 - n] == ids[end - 1 - n]:
                n += 1
            if n > matched:
                source, matched = place, n
            place = self._earlier[place - 1]
        return source, matched


class DraftModel:
    """Guesses the likeliest tokens of a smaller model.

    Args:
        draft: a model with the same vocabulary.
        timed: see `Pace`.
    """

    RETRY = 64  # tokens after which it tries again where guessing did not pay

    def __init__(self, draft: LanguageModel, timed: bool = True):
        self.draft, self.pace = draft, Pace(timed)
        self._cache = draft.make_cache()
        self._rate = _Rate(DRAFT_CHANCE)
        self._ids: list[int] = []
        self._guesses: list[int] = []
        self._since = 0  # tokens since the last guess

    def begin(self, ids: Sequence[int]) -> None:
        """See `Proposer.begin`."""
        self._ids, self._guesses = [*ids], []
        if not ids:
            self._cache = self.draft.make_cache()

    def extend(self, tokens: Sequence[int]) -> None:
        """See `Proposer.extend`."""
        for token, guess in zip(tokens, self._guesses):  # noqa: B905
            self._rate.saw(token == guess)
            if token != guess:
                break
        self._ids += tokens
        self._since += len(tokens)
        self._guesses = []

    def took(self, tokens: int, seconds: float) -> None:
        """See `Proposer.took`; the time includes guessing."""
        self.pace.took(tokens, seconds)

    def pays(self) -> bool:
        """See `Proposer.pays`."""
        promising = self.pace.length(self._rate.chance, MAX_GUESSES) > 0 or self._since >= self.RETRY
        return promising and self._room > 0

    def guess(self, most: int) -> list[int]:
        """See `Proposer.guess`."""
        return self.ahead(min(most, max(1, self.pace.length(self._rate.chance, most))))

    @property
    def chance(self) -> float:
        """See `RowProposer.chance`; where its guesses failed it tries again after a while."""
        if self._room < 1:
            return 0.0
        return max(self._rate.chance, DRAFT_CHANCE) if self._since >= self.RETRY else self._rate.chance

    def read(self, most: int) -> bool:
        """See `RowProposer.read`."""
        changes = self._cache.offset > 0 and self._cache.regime != self.draft.regime(len(self._ids) + 1)
        rest = self._ids if changes else self._cache.reuse(self._ids)
        if len(rest) <= READ_AT_ONCE:
            return True
        if most > 0:
            if changes or not self._cache.offset:
                self._cache = self.draft.make_cache()
                self._cache.admit(mx.array([self._ids]))  # sets the RoPE table of the whole length
            self.draft.hidden(mx.array([rest[:most]]), self._cache, rows=1)
            finish_chunk(self._cache, self._cache.needs_snapshots)
        return False

    def nbytes(self, length: int) -> int:
        """The bytes of the draft's cache."""
        return cache_bytes(self.draft.context_cost(), length)

    def ahead(self, n: int) -> list[int]:
        """See `RowProposer.ahead`."""
        n = min(n, self._room)
        if n < 1:
            return []
        new = Prompt(self._cache.reuse(self._ids))  # without media: a guess may be wrong
        self._guesses = [token for token, _ in generate_step(new, self.draft, max_tokens=n, cache=self._cache)]
        self._since = 0
        return [*self._guesses]

    @property
    def _room(self) -> int:
        """Tokens that the draft's context still holds, less one that is final and not yet known here."""
        return self.draft.config.max_position_embeddings - len(self._ids) - 1


def make_proposer(
    mode: Mode,
    model: LanguageModel,
    draft: LanguageModel | None = None,
    *,
    seeded: bool = False,
    rewindable: bool = True,
) -> PromptLookup | DraftModel | None:
    """The proposer that a command's options name; None for no guesses.

    Args:
        mode: "auto" guesses where measured times say that it pays; "lookup" always; "off" never.
        model: the model whose tokens are guessed.
        draft: guesses in place of a lookup.
        seeded: draws are random and must be repeatable, so measured times may not influence them.
        rewindable: the cache can take wrong guesses back; see `PromptCache.rewindable`.

    Raises:
        RequestError: the draft model has another vocabulary.
    """
    timed = mode == "auto" and not seeded
    if mode == "off" or safe("speculation") or not rewindable or (draft is None and mode == "auto" and seeded):
        return None
    if draft is None:
        return PromptLookup(timed)
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise RequestError(f"the draft model's vocabulary is {theirs}, the model's {ours}; take one of the same family")
    return DraftModel(draft, timed)
