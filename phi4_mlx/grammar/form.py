"""Grammars in llguidance's form: JSON in the style of the model's training, and Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The style of json.dumps. `\uXXXX` is not allowed: with it, a free key could spell a named one in a second way.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON that obeys a schema, as text."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": JSON_STYLE}}]})


def lark_grammar(text: str) -> str:
    """A Lark grammar, as text."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})
