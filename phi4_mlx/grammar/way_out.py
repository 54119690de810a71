"""A search for a short way to the end of an answer.

llguidance gives the tokens that may come next, but not the distance to the end. The search therefore walks on a copy of
its state: forced tokens first, then the token that looks nearest to an end. It is made for JSON; for any other grammar
it succeeds only by chance.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_WAY = 10_000  # tokens of the shortest answer that is searched for
MAX_SEARCH_S = 0.5  # seconds of processor time for one search; 2,000 properties take 0.4 s
MAX_STEP_S = 0.1  # the same between two tokens, while all other answers wait

_TRIES = 4  # each with its own random seed
_MARKS = b"@.:/-T"  # separators inside dates, addresses and other formats
_OUTSIDE, _INSIDE, _ESCAPED = range(3)  # a JSON string, and the place after a backslash in one


class Paths:
    """Finds ways to the end of an answer, in the tokens of one vocabulary."""

    def __init__(self, texts: Sequence[bytes], of_byte: Mapping[int, int], end: int):
        """Stores the vocabulary.

        Args:
            texts: token -> its bytes; empty for control tokens.
            of_byte: byte -> the token that is this byte alone.
            end: a token that ends a turn.
        """
        self._texts, self._of_byte, self._end = texts, of_byte, end
        self._after_number = [of_byte[byte] for byte in b"}]," if byte in of_byte]

    def in_string(self, state: int, tokens: Iterable[int]) -> int:
        """The state of JSON after some tokens: 0 outside strings, as at the start, and otherwise inside one.

        Args:
            state: the state before the tokens.
            tokens: ids.
        """
        for token in tokens:
            if not self._texts[token]:
                state = _OUTSIDE  # a control token ends any JSON before it
            for byte in self._texts[token]:
                if state == _ESCAPED:
                    state = _INSIDE
                elif byte == ord('"'):
                    state = _INSIDE if state == _OUTSIDE else _OUTSIDE
                elif byte == ord("\\") and state == _INSIDE:
                    state = _ESCAPED
        return state

    def way_out(
        self,
        matcher: LLMatcher,
        examples: Iterable[bytes] = (),
        state: int = _OUTSIDE,
        most: int = MAX_WAY,
        seconds: float = MAX_SEARCH_S,
    ) -> list[int] | None:
        """Finds tokens that lead from a matcher's state to a place where the answer may end.

        Args:
            matcher: the state to start from; not changed.
            examples: texts that match the grammar's patterns, and its multiples; random bytes rarely do.
            state: as in `in_string`.
            most: the limit of the way, in tokens.
            seconds: the limit of the search, of processor time.

        Returns:
            Token ids without the end marker, the same for the same state; empty if the answer may end here. None if no
            way is found within the limits.
        """
        texts = [[self._of_byte[byte] for byte in text] for text in examples]
        give_up_at = time.thread_time() + seconds
        for dice in map(random.Random, range(_TRIES)):
            here, now, way = matcher.deep_copy(), state, list[int]()
            while len(way) <= most and not here.is_accepting() and time.thread_time() < give_up_at:
                step = here.compute_ff_tokens() or self._ending(here, texts, now != _OUTSIDE)
                step = step or self._nearest(here.compute_bitmask(), now != _OUTSIDE, dice)
                if not step or not here.consume_tokens(step):
                    break
                now = self.in_string(now, step)
                way += step
            if here.is_accepting() and not here.is_error():
                return way
        return None

    def _ending(self, matcher: LLMatcher, examples: list[list[int]], in_string: bool) -> list[int]:
        """The end of an example that completes the string, number or answer; empty if none fits or none is needed."""
        closings = [self._of_byte[ord('"')]] if in_string else [self._end, *self._after_number]
        if any(matcher.validate_tokens([closing]) for closing in closings):
            return []
        endings = (text[n:] for text in examples for n in range(len(text)))
        fitting = (each for each in endings if matcher.validate_tokens(each) == len(each))
        closed = ([*each, closing] for each in fitting for closing in closings)
        return next((each[:-1] for each in closed if matcher.validate_tokens(each) == len(each)), [])

    def _nearest(self, mask: bytes, in_string: bool, dice: random.Random) -> list[int]:
        """The one-byte token that looks nearest to an end; random among equals, so that the walk cannot cycle."""

        def allowed(chars: Iterable[int]) -> list[int]:
            found = ((byte, self._of_byte[byte]) for byte in chars if byte in self._of_byte)
            return [byte for byte, token in found if mask[token >> 3] >> (token & 7) & 1]

        def first(*choices: bytes) -> list[int]:
            return next(filter(None, map(allowed, choices)), [])

        others = allowed(byte for byte in range(32, 127) if byte not in b'"[]{},\\-')
        found = first(b'"') if in_string else first(b"}", b"]", b",", b'"') if dice.random() < 7 / 8 else []
        if not found and dice.random() < 1 / 2:
            in_number = not in_string and not any(chr(byte).isalpha() for byte in others if byte not in b"eE")
            found = first(b"0") if in_number else first(_MARKS)
        found = found or others or first(b'"', b",", b"}", b"]", b"-", b"[", b"{", b"\\")
        if found:
            return [self._of_byte[dice.choice(found)]]
        bits = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        return [int(bits[0])] if len(bits) else []
