"""phi4_mlx.grammar.constraint."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from phi4_mlx.grammar.grammars import Grammar, _limits, _raise_error, _spelled
from phi4_mlx.grammar.way_out import MAX_LEAST, hints_of
from phi4_mlx.grammar.words import words_of
from phi4_mlx.tokens.tokenizer import Tokenizer


class Constraint:
    """Holds one answer to a grammar; what `generate_step` takes as `logits_mask`."""

    def __init__(self, grammar: Grammar | str, tokenizer: Tokenizer, vocab_size: int, max_tokens: int | None = None):
        """Compiles the grammar for a tokenizer: some milliseconds, and a second more for the first of a tokenizer.

        Args:
            grammar: a `Grammar`, or its text.
            tokenizer: what `load` returned.
            vocab_size: the model's [V]; ids beyond the tokenizer's never come.
            max_tokens: the tokens that the answer may take. With it the answer comes to its end in time: a token after
                which the shortest end found would not fit is refused.

        Raises:
            RequestError: the grammar cannot be compiled.
        """
        from llguidance import LLMatcher

        text = grammar.text if isinstance(grammar, Grammar) else grammar
        if not {"<|tool_call|>", "<|/tool_call|>"} <= tokenizer.control_ids.keys():
            text = _spelled(text)
        self._words = words_of(tokenizer)
        self._vocab_size = vocab_size
        self._matcher = LLMatcher(self._words.library, text, log_level=0, limits=_limits())
        self._check()
        self._ended = False
        self._left = max_tokens
        self._barred: list[int] = []  # refused at this step
        self._in_string = self._in_string_before = 0
        self._hints = hints_of(text)
        self._way = self._find_way(MAX_LEAST) if max_tokens else None  # tokens that lead to the end
        self._longest_way = len(self._way or ())
        self._follow_way = False

    @property
    def done(self) -> bool:
        """Whether nothing but the end of the turn may follow."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """Whether the answer so far obeys the grammar as a whole."""
        return self._ended or bool(self._matcher.is_accepting())

    def mask(self) -> mx.array:
        """Which tokens may come next, bool [V].

        Raises:
            RequestError: the grammar has become too complex to go on with.
        """
        if self._follow_way and self._way:
            return mx.arange(self._vocab_size) == self._way[0]
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # where text is forced, its first token alone
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        allowed[self._barred] = 0
        return mx.array(allowed.view(np.bool_))

    def accept(self, token: int) -> list[int] | None:
        """Takes a drawn token.

        Args:
            token: one that the mask allows.

        Returns:
            The tokens that must follow it, taken already: forced text, in the tokenizer's own tokens, and the end of
            the turn. None if the token was refused, which happens only with `max_tokens`: then another must be drawn,
            under a new mask.

        Raises:
            RequestError: the token does not obey the grammar, or the grammar has become too complex to go on with.
        """
        if self._ended:
            return []
        self._take([token])
        if token in self._words.eos:
            self._ended = True
            return []
        if self._left is not None and not self._affords(token):
            return None
        self._follow_way, self._barred = False, []
        forced = self._matcher.compute_ff_tokens()
        self._take(forced)
        if self._left is not None:
            self._left -= 1 + len(forced)
            if self._way and forced:  # the way may have it in other tokens
                same = self._way[: len(forced)] == forced
                self._way = self._way[len(forced) :] if same else self._find_way(max(self._left, 0))
        if self._matcher.is_stopped():
            self._ended = True
            forced = [*forced, self._words.end]
        return forced

    def _affords(self, token: int) -> bool:
        """Whether an end fits into what is left after `token`, which has just been taken; if not, takes it back."""
        assert self._left is not None
        left, before = self._left - 1, self._way
        if left > 64 + 4 * self._longest_way:  # far away
            self._way = None
            return True
        if before and before[0] == token:
            way: list[int] | None = before[1:]
        elif before and self._matcher.validate_tokens([*before, self._words.end]) == len(before) + 1:
            way = before
        else:
            way = self._find_way(left)
        # The end of the turn is a token too. Where no way is found, it is most often that none fits.
        if (way is None and before is not None) or (way and len(way) >= left):
            self._matcher.rollback(1)
            inside, self._in_string = self._in_string, self._in_string_before
            back = self._find_way(left) if before is None else before
            if back is not None and (not back or len(back) < self._left):
                self._way, self._follow_way = back, bool(back)
                self._barred.append(token)  # where the answer may end, it may also go on: without this token
                return False
            self._matcher.consume_token(token)  # there is no time either way
            self._in_string = inside
        self._way = way
        self._longest_way = max(self._longest_way, len(way or ()))
        return True

    def _find_way(self, most: int) -> list[int] | None:
        return self._words.paths.way_out(self._matcher, self._hints, self._in_string, most)

    def _take(self, tokens: list[int]) -> None:
        self._matcher.consume_tokens(tokens)
        self._check()
        self._in_string_before = self._in_string
        self._in_string = self._words.paths.in_string(self._in_string, tokens)

    def _check(self) -> None:
        _raise_error("the answer cannot be held to its grammar", self._matcher)
