"""Examples of regular expressions and formats."""

from __future__ import annotations

import json
import re

import pytest
from llguidance import LLMatcher

from phi4_mlx.grammar.compiler import byte_tokenizer
from phi4_mlx.grammar.examples import FORMATS, example
from phi4_mlx.grammar.grammars import json_schema


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
def test_some_patterns_have_no_example(pattern: str) -> None:
    assert example(pattern) is None


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_example_of_a_format_is_one(name: str) -> None:
    matcher = LLMatcher(byte_tokenizer(), json_schema({"type": "string", "format": name}).text, log_level=0)
    assert matcher.consume_tokens(list(json.dumps(FORMATS[name].decode()).encode()))
    assert matcher.is_accepting()
