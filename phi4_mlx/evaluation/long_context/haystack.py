"""Prompts of an exact length: filler sentences around the hidden ones, counted by the model's own tokenizer."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence

from phi4_mlx.evaluation.long_context.language import Language
from phi4_mlx.evaluation.long_context.problem import Insert, Problem
from phi4_mlx.tokens.tokenizer import Tokenizer

SLACK = 8  # tokens that a prompt may stay below its length, where no sentences add up to it
_ATTEMPTS = 12  # of filling up: tokens may merge where sentences meet


class Haystack:
    """The filler of one language for one tokenizer: an endless sequence of sentences that a seed fixes.

    Prompts of all lengths take their filler from its beginning, so that they share it up to the first hidden sentence.
    """

    def __init__(self, language: Language, tokenizer: Tokenizer, seed: int):
        self._language = language
        self._tokenizer = tokenizer
        self._draw = random.Random(f"filler {language.code} {seed}")
        self._costs: dict[str, int] = {}
        self._order: list[str] = []  # so far
        self._ends = [0]  # tokens up to each
        self._sums = _Sums({self._cost(text): text for text in (*language.filler, *language.short)})

    def prompt(self, problem: Problem, length: int) -> str | None:
        """The text of the user's message.

        Args:
            problem: its sentences are hidden at the sentence boundaries nearest to their depths.
            length: of the whole prompt under the chat template, in tokens.

        Returns:
            The message, whose prompt has from `length - SLACK` to `length` tokens; None if `length` has no room for the
            problem and filler.
        """
        filled = length - self.tokens(self._message(problem, []))  # tokens of filler
        best: str | None = None
        most = 0
        for _ in range(_ATTEMPTS):
            sentences = self._filler(filled)
            if not sentences:
                break
            message = self._message(problem, sentences)
            tokens = self.tokens(message)
            if most < tokens <= length:
                best, most = message, tokens
            if tokens == length:
                break
            filled += length - tokens
        return best if most >= length - SLACK else None

    def tokens(self, message: str) -> int:
        """Tokens of the prompt of a message, under the chat template."""
        return len(self._tokenizer.apply_chat_template([{"role": "user", "content": message}]))

    def _filler(self, tokens: int) -> list[str]:
        """The beginning of the filler, and sentences that fill it up to `tokens`."""
        while self._ends[-1] <= tokens:
            for text in self._draw.sample(self._language.filler, len(self._language.filler)):
                self._order.append(text)
                self._ends.append(self._ends[-1] + self._cost(text))
        kept = bisect.bisect_right(self._ends, max(0, tokens - self._sums.reserve)) - 1
        return self._order[:kept] + self._sums.texts(tokens - self._ends[kept])

    def _message(self, problem: Problem, filler: Sequence[str]) -> str:
        sentences = self._hidden(problem.inserts, filler)
        text = self._language.joiner.join(sentences)
        return self._language.texts["frame"].format(text=text, question=problem.question)

    def _hidden(self, inserts: Sequence[Insert], filler: Sequence[str]) -> list[str]:
        """The filler with each insert at the boundary nearest to its depth, in order of depth."""
        ends = [0]
        for text in filler:
            ends.append(ends[-1] + self._cost(text))
        whole = ends[-1] + sum(self._cost(insert.text) for insert in inserts)
        sentences: list[str] = []
        used = earlier = 0
        for insert in sorted(inserts, key=lambda insert: insert.depth):
            start = insert.depth * (whole - self._cost(insert.text)) - earlier  # in tokens of filler
            at = bisect.bisect_left(ends, start)
            if at == len(ends) or (at and start - ends[at - 1] <= ends[at] - start):
                at -= 1
            at = max(at, used)
            sentences += [*filler[used:at], insert.text]
            used, earlier = at, earlier + self._cost(insert.text)
        return [*sentences, *filler[used:]]

    def _cost(self, text: str) -> int:
        """Tokens of a sentence within a text."""
        if text not in self._costs:
            self._costs[text] = len(self._tokenizer.encode(self._language.joiner + text))
        return self._costs[text]


class _Sums:
    """Sentences whose tokens add up to a number."""

    def __init__(self, texts: dict[int, str]):
        self._texts = texts
        self.reserve = 4 * max(texts)  # tokens; with sentences of many sizes, nearly each sum exists from here
        self._last: list[int] = [0]  # sum -> the size of the last sentence, 0 if there is no such sum
        counts: list[float] = [0]
        for total in range(1, self.reserve + max(texts) + 1):
            fewest = min((size for size in texts if size <= total), key=lambda size: counts[total - size], default=0)
            count = counts[total - fewest] + 1 if fewest else float("inf")
            counts.append(count)
            self._last.append(fewest if count < float("inf") else 0)

    def texts(self, total: int) -> list[str]:
        """Sentences of `total` tokens, or of the nearest smaller number."""
        total = min(total, len(self._last) - 1)
        while total > 0 and not self._last[total]:
            total -= 1
        chosen: list[str] = []
        while total > 0:
            chosen.append(self._texts[self._last[total]])
            total -= self._last[total]
        return chosen
