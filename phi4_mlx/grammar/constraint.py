"""A constraint that masks the next token of one answer so that the answer obeys a grammar."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from phi4_mlx.grammar.call_rules import spelled
from phi4_mlx.grammar.compiler import compile_grammar, raise_error
from phi4_mlx.grammar.examples import grammar_examples
from phi4_mlx.grammar.grammars import Grammar
from phi4_mlx.grammar.vocabulary import vocabulary_of
from phi4_mlx.grammar.way_out import MAX_STEP_S, MAX_WAY
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN

_REFUSED = "the answer cannot follow its grammar"


class Constraint:
    """Makes one answer obey a grammar; `generate_step` takes it as `logits_mask`."""

    def __init__(self, grammar: Grammar | str, tokenizer: Tokenizer, vocab_size: int, max_tokens: int | None = None):
        """Compiles the grammar for a tokenizer in some milliseconds; the first use of a tokenizer adds a second.

        Args:
            grammar: a `Grammar`, or its text.
            tokenizer: the one that `load` returned.
            vocab_size: the model's [V]; ids that the tokenizer lacks are never allowed.
            max_tokens: the limit of the answer, in tokens. With it the answer ends in time: a token is refused if the
                shortest end found after it would not fit.

        Raises:
            RequestError: the grammar cannot be compiled, or the tokenizer has no token that ends a turn.
        """
        text = grammar.text if isinstance(grammar, Grammar) else grammar
        if not {CALLS_OPEN, CALLS_CLOSE} <= tokenizer.control_ids.keys():
            text = spelled(text)
        self._vocabulary = vocabulary_of(tokenizer)
        self._vocab_size = vocab_size
        self._matcher = compile_grammar(_REFUSED, text, self._vocabulary.library)
        self._ended = False
        self._left = max_tokens
        self._barred: list[int] = []  # tokens refused at this step
        self._in_string = self._in_string_before = 0
        self._examples = grammar_examples(text)
        self._way = self._find_way(MAX_WAY, 2 * MAX_STEP_S) if max_tokens else None  # tokens that lead to the end
        self._longest_way = len(self._way or ())
        self._follow_way = False
        self._forced = False

    @property
    def forced(self) -> bool:
        """True once a sampled token was refused because of `max_tokens`: the rest is not what the model would write."""
        return self._forced

    @property
    def done(self) -> bool:
        """True if only the end of the turn may follow."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """True if the answer so far is a whole answer that obeys the grammar."""
        return self._ended or bool(self._matcher.is_accepting())

    def mask(self) -> mx.array:
        """Computes which tokens may come next.

        Returns:
            bool [V].

        Raises:
            RequestError: the grammar has become too complex to follow.
        """
        if self._follow_way and self._way:
            return mx.arange(self._vocab_size) == self._way[0]
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # of forced text, only the first token
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        allowed[self._barred] = 0
        return mx.array(allowed.view(np.bool_))

    def accept(self, token: int) -> list[int] | None:
        """Appends a sampled token to the answer.

        Args:
            token: an id that the mask allows.

        Returns:
            The ids that must follow, already appended: forced text, as the tokenizer encodes it, and the end of the
            turn. None if the token is refused, which happens only with `max_tokens`; sample another under a new mask.

        Raises:
            RequestError: the token does not obey the grammar, or the grammar has become too complex to follow.
        """
        if self._ended:
            return []
        self._append([token])
        if token in self._vocabulary.eos:
            self._ended = True
            return []
        if self._left is not None and not self._affords(token):
            return None
        self._follow_way, self._barred = False, []
        forced = self._matcher.compute_ff_tokens()
        self._append(forced)
        if self._left is not None:
            self._left -= 1 + len(forced)
            if self._way and forced:  # the way may spell the forced text in other tokens
                same = self._way[: len(forced)] == forced
                self._way = self._way[len(forced) :] if same else self._find_way(max(self._left, 0))
        if self._matcher.is_stopped():
            self._ended = True
            forced = [*forced, self._vocabulary.end]
        return forced

    def _affords(self, token: int) -> bool:
        """True if an end fits into the tokens left after `token`, just appended; if not, removes it again."""
        assert self._left is not None
        left, before = self._left - 1, self._way
        if left > 64 + 4 * self._longest_way:  # far from the limit
            self._way = None
            return True
        if before and before[0] == token:
            way: list[int] | None = before[1:]
        elif before and self._matcher.validate_tokens([*before, self._vocabulary.end]) == len(before) + 1:
            way = before
        else:
            way = self._find_way(left)
        # The end of the turn is a token too. If no way is found, usually none fits.
        if (way is None and before is not None) or (way and len(way) >= left):
            self._matcher.rollback(1)
            inside, self._in_string = self._in_string, self._in_string_before
            back = self._find_way(left) if before is None else before
            if back is not None and (not back or len(back) < self._left):
                self._way, self._follow_way, self._forced = back, bool(back), True
                self._barred.append(token)  # where the answer may end, it may also continue without this token
                return False
            self._matcher.consume_token(token)  # no end fits without the token either
            self._in_string = inside
        self._way = way
        self._longest_way = max(self._longest_way, len(way or ()))
        return True

    def _find_way(self, most: int, seconds: float = MAX_STEP_S) -> list[int] | None:
        return self._vocabulary.paths.way_out(self._matcher, self._examples, self._in_string, most, seconds)

    def _append(self, tokens: list[int]) -> None:
        self._matcher.consume_tokens(tokens)
        self._check()
        self._in_string_before = self._in_string
        self._in_string = self._vocabulary.paths.in_string(self._in_string, tokens)

    def _check(self) -> None:
        raise_error(_REFUSED, self._matcher)
