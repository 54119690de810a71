"""Short ways to write JSON schemas, for tests of grammars."""

from __future__ import annotations

from typing import Any

from phi4_mlx.grammar.compiler import byte_tokenizer, compile_grammar
from phi4_mlx.grammar.grammars import Grammar

STRING = {"type": "string"}


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def accepts(grammar: Grammar, text: str) -> bool:
    """True if the text is an answer that obeys the grammar."""
    matcher = compile_grammar("the grammar", grammar.text, byte_tokenizer())
    ids = list(text.encode())
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()
