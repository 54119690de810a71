"""A tokenizer as llguidance has it, examples of patterns, and ways to the end of an answer."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from llguidance import LLMatcher

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar import grammars as constrain
from phi4_mlx.grammar import way_out
from phi4_mlx.grammar import words as grammar_words
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema, regex
from phi4_mlx.grammar.way_out import example, hints_of
from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.conftest import DATA

V = 512
PERSON = json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{3}", "foo", r"\.pdf$", "^a|b$", "a.c[x-z]+?$", '"q"', "é+", r"\w+\s\w+", r"[^a-z]\D\W\S", ".*foo",
        "^(?:x|yy){2,5}$", "[а-я]{2}", r"[^\d\s]", "x*", r"[\w.-]+@\d", "[^a]b", "(?P<n>ab)*c{2}",
    ],
)  # fmt: skip
def test_an_example_of_a_pattern_is_one(pattern: str) -> None:
    found = example(pattern)
    assert found is not None and re.search(pattern, found) and len(found) < 12


@pytest.mark.parametrize(
    "pattern",
    ["(", r"\p{L}", "(?=a)b", r"(a)\1", "a{1000}", "(a{400}){400}", "(" * 5_000, "a{99999999999}", "a{4000000000}"],
)
def test_there_may_be_no_example(pattern: str) -> None:
    assert example(pattern) is None


@pytest.mark.parametrize("text", ["", '{"x": "', '{"x": "ab', '{"x": "\\\\', '{"x": "\\"'])
@pytest.mark.parametrize(
    "inner",
    [
        {"type": "string", "pattern": "[0-9]{3}"},
        {"type": "string", "pattern": "foo|b.r"},
        {"type": "string", "pattern": r"\.pdf$"},
        {"type": "string", "pattern": '"q"$'},
        {"type": "string", "minLength": 30},
        {"type": "string"},
        {"anyOf": [{"type": "string", "format": name} for name in way_out._EXAMPLES] + [{"type": "string"}]},
    ],
)
def test_a_way_leads_to_an_end_from_anywhere(text: str, inner: dict[str, Any]) -> None:
    closed = {"type": "object", "properties": {"x": inner}, "required": ["x"], "additionalProperties": False}
    grammar, paths = json_schema(closed), constrain._byte_paths()
    matcher = LLMatcher(constrain._bytes_tokenizer(), grammar.text, log_level=0)
    assert matcher.consume_tokens(list(text.encode()))
    way = paths.way_out(matcher, hints_of(grammar.text), paths.in_string(0, text.encode()), most=60)
    assert way is not None and len(way) < 60
    assert matcher.consume_tokens(way) and matcher.is_accepting()
    json.loads(text + bytes(way).decode())


@pytest.mark.parametrize("folder", ["tiny_tokenizer", "tiny_sentencepiece"])
def test_forced_text_is_in_tokens_of_the_vocabulary_without_a_space_before(folder: str) -> None:
    tokenizer = load_tokenizer(DATA / folder)
    for text in ("hello world", "the city", "\n", ""):
        ids = grammar_words.words_of(tokenizer).library.tokenize_str(text)
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
        assert len(ids) < len(text) or len(text) < 2


@pytest.mark.parametrize("name", sorted(way_out._EXAMPLES))
def test_an_example_of_a_format_is_one(name: str) -> None:
    matcher = LLMatcher(constrain._bytes_tokenizer(), json_schema({"type": "string", "format": name}).text, log_level=0)
    assert matcher.consume_tokens(list(json.dumps(way_out._EXAMPLES[name].decode()).encode()))
    assert matcher.is_accepting()


def test_a_tokenizer_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    words = grammar_words.Words
    monkeypatch.setattr(grammar_words, "Words", lambda tokenizer: made.append(0) or words(tokenizer))
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    for _ in range(3):
        Constraint(PERSON, tokenizer, V)
    assert len(made) == 1 and tokenizer in grammar_words._known
    known = len(grammar_words._known)
    del tokenizer
    assert len(grammar_words._known) < known  # nothing keeps it


def test_a_tokenizer_without_an_end_is_refused() -> None:
    endless = load_tokenizer(DATA / "tiny_tokenizer")
    endless.eos_ids = frozenset()
    with pytest.raises(RequestError, match="ends a turn"):
        Constraint(PERSON, endless, V)


def test_tokens_of_control_strings_outside_the_added_ones_are_no_text() -> None:
    """o200k's own vocabulary lists strings like `<|endoftext03|>`."""
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    fake = tokenizer.encode("x")[0]
    tokenizer._texts[fake] = b"<|fake|>"
    mask = Constraint(regex("(?s:.*)"), tokenizer, V).mask().tolist()
    assert mask[tokenizer.encode("y")[0]] and not mask[fake]


def test_the_search_for_a_way_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way_out, "MAX_SEARCH_S", 0.2)
    endless = constrain._lark_grammar("start: " + " | ".join(f'"w{n}" start' for n in range(50)))
    matcher = LLMatcher(constrain._bytes_tokenizer(), endless)
    start = time.perf_counter()
    assert constrain._byte_paths().way_out(matcher) is None
    assert time.perf_counter() - start < 2
