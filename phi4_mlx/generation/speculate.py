"""Guesses of the tokens to come, which one forward pass checks all at once.

`PromptLookup` guesses that what the sequence ends with goes on as it did the last time; `DraftModel` asks a smaller
model. Neither changes what is drawn: a guess holds if the model draws that very token from its own distribution. For a
guess that is certain of itself this is what rejection sampling comes to.

How long a guess is, and whether there is one, is worked out from what forward passes take and how many guesses held.

Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.text import Model

Mode = Literal["auto", "off", "lookup"]

MOST = 16  # guesses a pass: half of them would have to hold to pay for more
GAIN = 1.05  # what a guess must promise: what its bookkeeping costs, and more
NGRAM = 2  # tokens that the sequence must have in common with an earlier place
CANDIDATES = 16  # earlier places that are looked at, the latest first
LONGEST = 32  # tokens in common, beyond which a place is not better for having more
MEMORY = 0.9  # what a measurement still weighs at the next one


class Pace:
    """What forward passes take: one of a token, and every further token in it.

    Args:
        timed: whether to measure it; else a further token is taken to cost a tenth of a pass, which is what it does
            where reading the weights takes the time. Then the guesses are the same every time.
    """

    def __init__(self, timed: bool):
        self.timed = timed
        self._step_s = 0.0
        self._further = 0.5 if timed else 0.1  # passes; half of one is what it costs at worst, on a CPU

    def took(self, tokens: int, seconds: float) -> None:
        """Notes a pass of so many tokens."""
        if not self.timed:
            return
        if tokens == 1:
            # The quickest of late: a pass is often held up, and never takes less than it must.
            self._step_s = min(seconds, self._step_s / MEMORY) if self._step_s else seconds
        elif self._step_s:
            further = (seconds / self._step_s - 1) / (tokens - 1)
            self._further = MEMORY * self._further + (1 - MEMORY) * min(max(further, 0.0), 2.0)

    def length(self, chance: float, most: int) -> int:
        """How many guesses promise the most tokens a second; 0 if none do.

        Args:
            chance: that a guess holds, if those before it did.
            most: guesses there may be.
        """
        best, gain, tokens = 0, GAIN, 1.0
        for n in range(1, min(most, MOST) + 1):
            tokens += chance**n
            if (promised := tokens / (1 + n * self._further)) > gain:
                best, gain = n, promised
        return best


class _Rate:
    """How often something came true of late, from a first opinion that weighs as much as four times seen."""

    def __init__(self, opinion: float):
        self.held, self.tried = 4 * opinion, 4.0

    def saw(self, held: bool) -> None:
        if self.tried > 1 / (1 - MEMORY):
            self.held, self.tried = MEMORY * self.held, MEMORY * self.tried
        self.held, self.tried = self.held + held, self.tried + 1

    @property
    def chance(self) -> float:
        return self.held / self.tried


class PromptLookup:
    """Guesses from an earlier place, in prompt or answer, where the same tokens stood.

    It also guesses in silence, where guessing does not pay, and so finds out for nothing when it would. Takes a few
    numbers a token of the sequence, and a few steps a token.

    Args:
        timed: see `Pace`.
    """

    def __init__(self, timed: bool = True):
        self.pace = Pace(timed)
        # By how much stood there alike: 2 or 3 tokens, 4 to 7, 8 to 15, 16 and more.
        self._rates = [_Rate(opinion) for opinion in (0.2, 0.5, 0.8, 0.9)]
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended
        self._earlier: list[int] = []  # the same for each place: where its n-gram ended before, or -1
        self._source, self._alike = -1, 0  # where the token stands that is guessed next, and how much is alike before

    def begin(self, ids: Sequence[int]) -> None:
        """Told of the tokens that there are already."""
        self._ids, self._latest, self._earlier, self._source = [], {}, [], -1
        for token in ids:
            self._append(token)
        self._source, self._alike = self._find()

    def extend(self, tokens: Sequence[int]) -> None:
        """Told of tokens that have become certain."""
        for token in tokens:
            guessed = self._source >= 0
            held = guessed and self._ids[self._source] == token
            if guessed:
                self._rate.saw(held)
            self._append(token)
            if held:
                self._source, self._alike = self._source + 1, self._alike + 1
            else:
                self._source, self._alike = self._find()

    def took(self, tokens: int, seconds: float) -> None:
        """Told how long a forward pass of so many tokens took."""
        self.pace.took(tokens, seconds)

    def pays(self) -> bool:
        """Whether a guess is worth waiting for the token before it."""
        return self._source >= 0 and self.pace.length(self._rate.chance, MOST) > 0

    def guess(self, most: int) -> list[int]:
        """The tokens that may come next, at most so many."""
        if self._source < 0:
            return []
        guesses: list[int] = []
        for at in range(self._source, self._source + self.pace.length(self._rate.chance, most)):
            guesses.append(self._ids[at] if at < len(self._ids) else guesses[at - len(self._ids)])
        return guesses

    @property
    def _rate(self) -> _Rate:
        return self._rates[min(max(self._alike.bit_length() - 2, 0), 3)]

    def _append(self, token: int) -> None:
        self._ids.append(token)
        end = len(self._ids)
        ngram = tuple(self._ids[end - NGRAM :])
        self._earlier.append(self._latest.get(ngram, -1) if end >= NGRAM else -1)
        if end >= NGRAM:
            self._latest[ngram] = end

    def _find(self) -> tuple[int, int]:
        """The earlier place that has most in common with the end, the latest of equals; -1 if there is none."""
        ids, end = self._ids, len(self._ids)
        source, alike, place = -1, 0, self._earlier[-1] if ids else -1
        for _ in range(CANDIDATES):
            if place < 0:
                break
            n = NGRAM
            while n < min(place, LONGEST) and ids[place - 1 - n] == ids[end - 1 - n]:
                n += 1
            if n > alike:
                source, alike = place, n
            place = self._earlier[place - 1]
        return source, alike


class DraftModel:
    """Guesses what a smaller model finds likeliest.

    Args:
        draft: a model with the vocabulary of the one that is guessed for.
        timed: see `Pace`.
    """

    RETRY = 64  # tokens until it tries again where it did not pay

    def __init__(self, draft: Model, timed: bool = True):
        self.draft, self.pace = draft, Pace(timed)
        self._cache = draft.make_cache()
        self._rate = _Rate(0.8)
        self._ids: list[int] = []
        self._guesses: list[int] = []
        self._since = 0  # tokens since the last guess

    def begin(self, ids: Sequence[int]) -> None:
        """Told of the tokens that there are already."""
        self._ids, self._guesses = [*ids], []

    def extend(self, tokens: Sequence[int]) -> None:
        """Told of tokens that have become certain."""
        for token, guess in zip(tokens, self._guesses):  # noqa: B905
            self._rate.saw(token == guess)
            if token != guess:
                break
        self._ids += tokens
        self._since += len(tokens)
        self._guesses = []

    def took(self, tokens: int, seconds: float) -> None:
        """Told how long a forward pass of so many tokens took, guessing included."""
        self.pace.took(tokens, seconds)

    def pays(self) -> bool:
        """Whether a guess is worth waiting for the token before it."""
        promising = self.pace.length(self._rate.chance, MOST) > 0 or self._since >= self.RETRY
        return promising and self._room > 0

    def guess(self, most: int) -> list[int]:
        """The tokens that may come next, at most so many."""
        n = min(most, max(1, self.pace.length(self._rate.chance, most)), self._room)
        if n < 1:
            return []
        new = self._cache.reuse(self._ids)
        self._guesses = [token for token, _ in generate_step(new, self.draft, max_tokens=n, cache=self._cache)]
        self._since = 0
        return [*self._guesses]

    @property
    def _room(self) -> int:
        """How many tokens more the draft's context holds, but for one that is certain and not yet known here."""
        return self.draft.config.max_position_embeddings - len(self._ids) - 1


def make_proposer(
    mode: Mode, model: Model, draft: Model | None = None, *, seeded: bool = False, bounded: bool = False
) -> PromptLookup | DraftModel | None:
    """What a command's options ask for; None for no guesses.

    Args:
        mode: "auto" guesses where the clock says that it pays; "lookup" wherever it may; "off" never.
        model: that is guessed for.
        draft: guesses in the place of a lookup.
        seeded: tokens are drawn at random and must be the same again, so that the clock can have no say.
        bounded: the cache forgets tokens, and cannot take guesses back.

    Raises:
        RequestError: the draft model has another vocabulary.
    """
    timed = mode == "auto" and not seeded
    if mode == "off" or bounded or (draft is None and mode == "auto" and seeded):
        return None
    if draft is None:
        return PromptLookup(timed)
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise RequestError(f"the draft model's vocabulary is {theirs}, the model's {ours}; take one of the same family")
    return DraftModel(draft, timed)
