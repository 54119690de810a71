"""The questions of a run: kinds, languages, lengths and depths, in an order whose every beginning is a fair sample."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from phi4_mlx.evaluation.long_context.language import CODES, Language, load_language
from phi4_mlx.evaluation.long_context.problem import KINDS, Form, Problem
from phi4_mlx.tokens.tokenizer import Tokenizer

DEPTHS = (0, 25, 50, 75, 100)
_ANSWER_TOKENS = 64  # beside the values themselves, which may be said twice
_REASONING_TOKENS = 2048  # for models that think before they answer


@dataclass(frozen=True)
class Place:
    """Where a run asks a question.

    Attributes:
        language: of all texts.
        kind: a key of `KINDS`.
        form: of the values.
        length: of the prompt, in tokens.
        depth: of the first hidden sentence that matters, in per cent.
    """

    language: Language
    kind: str
    form: Form
    length: int
    depth: int

    @property
    def id(self) -> str:
        """The name of the question in results."""
        return f"{self.language.code}/{self.kind}/{self.form}/{self.length}/{self.depth}"

    def problem(self, seed: int) -> Problem:
        """The problem asked here."""
        draw = random.Random(f"{self.id} {seed}")
        return KINDS[self.kind].make(draw, self.language, self.form, self.depth / 100)


def languages(codes: Sequence[str]) -> list[Language]:
    """The languages of a run, each once.

    Args:
        codes: empty for all.

    Raises:
        RequestError: there is no such language.
    """
    return [load_language(code) for code in dict.fromkeys(codes or CODES)]


def places(
    spoken: Sequence[Language], lengths: Sequence[int], depths: Sequence[int], whole: bool, seed: int
) -> list[Place]:
    """The places of a run.

    Args:
        spoken: the languages.
        lengths: in tokens.
        depths: in per cent.
        whole: asks each kind in each language at each length and depth; else at one depth in turn, so that all
            languages together fill the grid.
        seed: of the order.

    Returns:
        The places, shuffled; forms of values take turns.
    """
    found = []
    for turn, language in enumerate(spoken):
        kinds = [(kind, KINDS[kind].forms_in(language)) for kind in KINDS]
        for at, (kind, forms) in enumerate(kinds):
            for column, length in enumerate(lengths):
                own = depths if whole else [depths[(turn + at + column) % len(depths)]]
                for depth in own if forms else []:
                    row = depths.index(depth)
                    found.append(Place(language, kind, forms[(turn + column + row) % len(forms)], length, depth))
    random.Random(seed).shuffle(found)
    return found


def answer_room(spoken: Sequence[Language], tokenizer: Tokenizer) -> int:
    """Tokens that an answer may take, by default: the values twice and some words, and before them the thoughts.

    Args:
        spoken: the languages of a run.
        tokenizer: the model's.
    """
    most = 0
    for place in places(spoken, [0], DEPTHS[:1], True, 0):
        for form in KINDS[place.kind].forms_in(place.language):
            problem = KINDS[place.kind].make(random.Random(0), place.language, form, 0.0)
            longest = max(problem.language.words, key=len, default="") if form == "word" else ""
            most = max(most, sum(len(tokenizer.encode(" " + max(longest, truth, key=len))) for truth in problem.truths))
    room = _ANSWER_TOKENS + 2 * most + _REASONING_TOKENS * tokenizer.chat_format.reasons
    return -(-room // 32) * 32
