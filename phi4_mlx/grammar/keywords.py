"""Keywords of JSON Schema: those that a grammar can enforce, the form of their values, and patterns and formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from phi4_mlx.grammar.compiler import byte_tokenizer, limits
from phi4_mlx.grammar.examples import FORMATS
from phi4_mlx.grammar.form import json_grammar
from phi4_mlx.grammar.numbers import is_number

# Keywords that hold a schema, a list of schemas, and schemas by name.
ONE = ("items", "additionalItems", "additionalProperties")
LISTS = ("items", "prefixItems", "anyOf", "allOf", "oneOf")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
# Keywords that llguidance would ignore, or refuse without naming their place.
NOT_ENFORCED = (
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "contentSchema", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy", "x-guidance",
)  # fmt: skip
# Keywords that restrict nothing; some would change how llguidance resolves references.
ANNOTATIONS = (
    "$schema", "$vocabulary", "$comment", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "id", "title",
    "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding",
)  # fmt: skip
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_ESCAPE = r"\\(.)"


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    return is_number(value) and value >= 0 and value == int(value)


def _is_limit(value: Any) -> bool:
    return isinstance(value, bool) or is_number(value)


def _is_type(value: Any) -> bool:
    kinds = value if isinstance(value, list) and value else [value]
    return all(isinstance(each, str) and each in TYPES for each in kinds)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one or more of {', '.join(TYPES)}"),
    "required": (_is_names, "a list of names"),
    "items": (lambda value: _is_schema(value) or _is_list(value), "a schema"),
    **dict.fromkeys(("additionalItems", "additionalProperties"), (_is_schema, "a schema")),
    **dict.fromkeys(("enum", "prefixItems", "anyOf", "allOf", "oneOf"), (_is_list, "a list")),
    **dict.fromkeys(MAPS, (_is_object, "an object")),
    **dict.fromkeys(("pattern", "$ref"), (_is_text, "a text")),
    **dict.fromkeys(("minimum", "maximum"), (is_number, "a number")),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), (_is_limit, "a number")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        (_is_size, "a whole number of at least 0"),
    ),
}


def malformed(key: str, value: Any) -> str | None:
    """A message about a keyword whose value has the wrong form; None if the form is right."""
    right, form = _FORMS.get(key, (None, ""))
    return None if right is None or right(value) else f"the schema's {key!r} must be {form}, not {value!r:.100}"


def plain_pattern(pattern: str) -> str:
    r"""A pattern with Python's `\Z` as `$`; both are the end of the text."""
    return re.sub(_ESCAPE, lambda found: "$" if found[1] == "Z" else found[0], pattern, flags=re.DOTALL)


def known_format(name: Any) -> bool:
    """True if llguidance knows a format; all others are annotations."""
    return isinstance(name, str) and name in FORMATS


def compiles(schema: Mapping[str, Any]) -> bool:
    """True if llguidance accepts a schema without references."""
    return _compiles(json_grammar(schema))


@lru_cache(maxsize=1_024)  # the same pattern may stand in a hundred tools
def _compiles(text: str) -> bool:
    from llguidance import LLMatcher

    return not LLMatcher(byte_tokenizer(), text, log_level=0, limits=limits()).is_error()
