"""The search for a way to the end of an answer."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher

from phi4_mlx.grammar import way_out
from phi4_mlx.grammar.compiler import byte_paths, byte_tokenizer
from phi4_mlx.grammar.examples import FORMATS, grammar_examples
from phi4_mlx.grammar.grammars import json_schema


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
        {"anyOf": [{"type": "string", "format": name} for name in FORMATS] + [{"type": "string"}]},
    ],
)
def test_a_way_leads_to_an_end_from_anywhere(text: str, inner: dict[str, Any]) -> None:
    closed = {"type": "object", "properties": {"x": inner}, "required": ["x"], "additionalProperties": False}
    grammar, paths = json_schema(closed), byte_paths()
    matcher = LLMatcher(byte_tokenizer(), grammar.text, log_level=0)
    assert matcher.consume_tokens(list(text.encode()))
    way = paths.way_out(matcher, grammar_examples(grammar.text), paths.in_string(0, text.encode()), most=60)
    assert way is not None and len(way) < 60
    assert matcher.consume_tokens(way) and matcher.is_accepting()
    json.loads(text + bytes(way).decode())


def test_the_search_ends_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = {"lark_grammar": "start: " + " | ".join(f'"w{n}" start' for n in range(50))}
    matcher = LLMatcher(byte_tokenizer(), json.dumps({"grammars": [endless]}))
    ticks = itertools.count()
    clock = SimpleNamespace(thread_time=lambda: next(ticks) * way_out.MAX_SEARCH_S / 10)
    monkeypatch.setattr(way_out, "time", clock)
    assert byte_paths().way_out(matcher) is None
    assert 10 <= next(ticks) < 20  # looks at the clock at the start, before each of ten steps, and in each later try
