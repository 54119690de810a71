"""Compiling grammars with llguidance: its limits, its errors, and the check of a grammar before there is a model."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.examples import grammar_examples
from phi4_mlx.grammar.way_out import MAX_WAY, Paths

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Words of llguidance where one of its own limits is exceeded.
_LIMITS = ("fuel", "too many", "too large", "too big", "limit", "precomputation", "Unable to determine")
MAX_COMPILE_S = 1.0  # seconds of processor time for a grammar and its costly parts


class TooComplex(RequestError):
    """A grammar is too large or too complex; nothing is wrong with it otherwise."""


def limits() -> LLParserLimits:
    """The limits of llguidance's parser."""
    from llguidance import LLParserLimits

    # Its defaults bound a compilation to 0.3 s and a step to 0.1 s, and 300 KB of tools fit into them. 500 optional
    # properties need more than 2,000 items; multiples in a range need more fuel; a state of the lexer takes 2 KB.
    return LLParserLimits(
        verbose_errors=False, max_items_in_row=20_000, max_lexer_states=50_000, step_lexer_fuel=1_000_000
    )


def compile_grammar(what: str, text: str, library: LLTokenizer) -> LLMatcher:
    """Compiles a grammar.

    Args:
        what: the subject of the error message.
        text: the grammar in llguidance's form.
        library: llguidance's tokenizer.

    Raises:
        RequestError: the grammar cannot be compiled.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(library, text, log_level=0, limits=limits())
    raise_error(what, matcher)
    return matcher


def raise_error(what: str, matcher: LLMatcher) -> None:
    """Raises the error of a matcher, which itself never raises.

    Raises:
        RequestError: the matcher is in its error state.
        TooComplex: likewise, because of a limit.
    """
    if matcher.is_error():
        line = _line(matcher.get_error())
        if any(word in line for word in _LIMITS):
            raise TooComplex(f"{what} is too complex; make it simpler ({line})")
        raise RequestError(f"{what}: {line}")


@lru_cache(maxsize=16)  # a conversation checks its tools at every answer
def check_grammar(what: str, text: str, costly: tuple[str, ...] = (), sure: bool = True) -> None:
    """Compiles a grammar within `MAX_COMPILE_S`, and looks for one answer that obeys it.

    Args:
        what: the subject of the error messages.
        text: the grammar in llguidance's form, without control tokens.
        costly: its costly parts, each a grammar; these are compiled first.
        sure: the search finds an answer if there is one, as in JSON.

    Raises:
        RequestError: the grammar is malformed, or no answer obeys it.
        TooComplex: it takes too long to compile.
    """
    start = time.thread_time()
    for part in [*costly, text]:
        matcher = compile_grammar(what, part, byte_tokenizer())
        for warning in matcher.get_grammar_warnings():
            raise RequestError(f"{what}: {_line(warning)}")
        if time.thread_time() - start > MAX_COMPILE_S:
            raise TooComplex(f"{what} takes more than {MAX_COMPILE_S:g} s to compile; make it simpler")
    way = byte_paths().way_out(matcher, grammar_examples(text))
    raise_error(what, matcher)
    # A way through JSON is found if there is one; through hard patterns it is found only by chance.
    if way is None and ((sure and not costly) or not _may_begin(matcher)):
        matcher.consume_tokens(matcher.compute_ff_tokens())
        raise_error(f"{what} is too complex to follow, or its answers never end", matcher)
        raise RequestError(
            f"{what} is obeyed by no answer of up to {MAX_WAY:,} bytes: the shortest is longer, never ends, or does "
            "not exist; make it simpler"
        )


@lru_cache(maxsize=1)
def byte_tokenizer() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes, which makes a grammar testable without a model."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


@lru_cache(maxsize=1)
def byte_paths() -> Paths:
    """The search for a way out, in the tokens of `byte_tokenizer`."""
    texts = [bytes([byte]) for byte in range(256)]
    return Paths([*texts, *[b""] * 6], {byte: byte for byte in range(256)}, byte_tokenizer().eos_token)


def _may_begin(matcher: LLMatcher) -> bool:
    first = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), count=256, bitorder="little")
    return bool(first.any()) and not matcher.is_error()


def _line(message: str) -> str:
    return " ".join(message.partition("<state>")[0].partition("<backtrace>")[0].split())[:300]
