"""Grammars that an answer must obey: a JSON schema, a regular expression, a choice, a Lark grammar, tool calls.

A `Grammar` is plain text, made and checked without a model; a `Constraint` applies it to one answer, token by token.
llguidance computes the tokens that may come next in about 0.03 ms at the real vocabulary size. JSON is written as in
the model's training, `{"a": 1, "b": [2, 3]}`, and in the schema's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.user_file import read_file
from phi4_mlx.grammar.call_rules import CALL_OR_ANSWER, MAY_CALL, MUST_CALL, spelled
from phi4_mlx.grammar.compiler import check_grammar, limits
from phi4_mlx.grammar.schema import plain_schema
from phi4_mlx.tools.declarations import check_tools
from phi4_mlx.tools.hints import class_schema

MAX_PATTERN = 4_096  # characters
MAX_LARK = 65_536  # characters
MAX_LARK_PARTS = 1_000  # rules and brackets; 3,000 nested ones overflow llguidance's stack
MAX_CHOICES = 1_000
MAX_CHOICES_CHARS = 65_536  # of all choices together

# The style of json.dumps. `\uXXXX` is not allowed: with it, a free key could spell a named one in a second way.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}


@dataclass(frozen=True)
class Grammar:
    """A grammar as one text, which can be sent to another process; made and checked by the functions below.

    Attributes:
        text: the grammar in llguidance's form.
    """

    text: str


def json_schema(schema: Any, closed: bool = False) -> Grammar:
    """JSON that a schema accepts, with the properties in the schema's order.

    Numbers stay a millionth away from an exclusive bound. Properties that the schema does not name may come twice.

    Args:
        schema: JSON Schema (draft 2020-12) of at most 64 KB, 500 properties and 64 levels; references only within it.
        closed: objects with `properties` and without `additionalProperties` allow no others.

    Raises:
        RequestError: the schema is malformed, too large, takes over a second to compile, or uses a keyword that a
            grammar cannot enforce; names it.
    """
    plain = plain_schema(schema, closed=closed)
    trials = [_json_grammar(each) for each in plain.costly]
    return _checked("the schema", _json_grammar(plain.schema), trials)


def class_answer(kind: Any) -> tuple[Grammar, Callable[[str], Any]]:
    """JSON of a dataclass or a pydantic model.

    Args:
        kind: the class, as for `phi4_mlx.tools.hints.class_schema`.

    Returns:
        The grammar, and a function that makes an instance from an answer.

    Raises:
        RequestError: as in `json_schema` and `class_schema`.
    """
    schema, read = class_schema(kind)
    return json_schema(schema, closed=True), read


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar(_json_grammar({"type": "object"}))


def regex(pattern: str) -> Grammar:
    """Text that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's regex crate: as Python's, without look-around and back-references; at most
            4,096 characters.

    Raises:
        RequestError: the pattern is malformed, too large, or nothing matches it.
    """
    _check_text("a regular expression", pattern, MAX_PATTERN)
    from llguidance import LLMatcher

    return _checked("the regular expression", LLMatcher.grammar_from_regex(pattern), sure=False)


def choice(strings: Sequence[str]) -> Grammar:
    """One of several texts.

    Args:
        strings: at most 1,000, none of them empty, with at most 65,536 characters in all.

    Raises:
        RequestError: there are no strings or too many, or one is not a text.
    """
    if not isinstance(strings, (list, tuple)) or not strings:
        raise RequestError(f"a choice needs a list of at least one string, not {strings!r:.100}")
    if len(strings) > MAX_CHOICES:
        raise RequestError(f"a choice has {len(strings):,} strings, and the limit is {MAX_CHOICES:,}; leave some out")
    for each in strings:
        _check_text("a string of a choice", each, MAX_CHOICES_CHARS)
    _check_text("a choice", "".join(strings), MAX_CHOICES_CHARS)
    rules = " | ".join(json.dumps(each, ensure_ascii=False) for each in dict.fromkeys(strings))
    return _checked("the choice", _lark_grammar(f"start: {rules}\n"))


def lark(text: str) -> Grammar:
    """Text that a Lark grammar accepts, in llguidance's dialect.

    Args:
        text: at most 65,536 characters. A control token comes only where the grammar names it, as in `<|end|>`.

    Raises:
        RequestError: the grammar is malformed or too large, or no text obeys it.
    """
    _check_text("a Lark grammar", text, MAX_LARK)
    if (parts := sum(map(text.count, ":([{"))) > MAX_LARK_PARTS:
        raise RequestError(
            f"a Lark grammar has {parts:,} rules and brackets, and the limit is {MAX_LARK_PARTS:,}; make it smaller"
        )
    from llguidance import LLMatcher

    grammar = _lark_grammar(text)
    failed, warnings = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if not failed and warnings and all("no tokenizer" in warning for warning in warnings):
        return Grammar(grammar)  # it names control tokens, which only a model's tokenizer knows
    return _checked("the Lark grammar", grammar, sure=False)


def tool_calls(
    tools: Sequence[Any],
    choice: str | Mapping[str, Any] = "auto",
    parallel: bool = True,
    answer: Grammar | None = None,
) -> Grammar:
    """Tool calls in the model's own form: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`.

    Arguments obey the tool's schema; names that it does not list are refused, unless it allows them.

    Args:
        tools: each as for `phi4_mlx.tools.declarations.check_tools`.
        choice: "auto" (a text, or a text and then calls), "required" (at least one call), or one tool, by its name or
            as OpenAI's {"type": "function", "function": {"name": ...}} (one call of it). "none" needs no grammar.
        parallel: allows more than one call.
        answer: the grammar of an answer without calls under "auto"; None for any text, which may also precede calls.

    Raises:
        RequestError: a tool is malformed, `json_schema` refuses its schema, or the chosen tool does not exist.
    """
    checked = {tool["function"]["name"]: tool["function"] for tool in check_tools(tools)}
    if not checked:
        raise RequestError("there are no tools to call; give at least one, or leave out the choice of a tool")
    names = list(checked)
    if choice not in ("auto", "required"):
        names = [_chosen(choice, checked)]
    calls: list[JsonObject] = []
    definitions: JsonObject = {}
    trials: list[str] = []
    for number, name in enumerate(names):
        try:
            arguments = plain_schema(checked[name]["parameters"], at=f"#/$defs/t{number}", closed=True)
        except RequestError as error:
            raise RequestError(f"tool {name!r}: {error}") from None
        definitions[f"t{number}"] = arguments.schema
        trials += [_json_grammar(each) for each in arguments.costly]
        parts = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/t{number}"}}
        calls.append({"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False})
    one = not parallel or choice not in ("auto", "required")
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **({"maxItems": 1} if one else {})}
    grammars = [{"name": "calls", "json_schema": {**schema, "$defs": definitions, "x-guidance": _JSON}}]
    main = MAY_CALL if choice == "auto" else MUST_CALL
    if answer is not None and choice == "auto":
        main = CALL_OR_ANSWER
        grammars.append({**json.loads(answer.text)["grammars"][0], "name": "answer"})
    text = json.dumps({"grammars": [{"lark_grammar": main}, *grammars]})
    return _checked("the tools", text, trials)


def schema_grammar(name: str) -> Grammar:
    """The grammar of a JSON schema in a file.

    Args:
        name: the file's path; `~` is the home folder.

    Raises:
        RequestError: the file cannot be read, is not JSON, or `json_schema` refuses its schema.
    """
    path = Path(os.path.expanduser(name))
    try:
        schema = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    try:
        return json_schema(schema)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def _checked(what: str, text: str, costly: Sequence[str] = (), sure: bool = True) -> Grammar:
    check_grammar(what, spelled(text), tuple(costly), sure)
    return Grammar(text)


def _chosen(choice: Any, tools: Mapping[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else choice
    if not isinstance(name, str) or name not in tools:
        raise RequestError(
            f"the choice of a tool must be 'auto', 'required' or one of {', '.join(map(repr, tools)):.200}, not "
            f"{choice!r:.100}"
        )
    return name


def _check_text(what: str, text: Any, most: int) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{what} must be a non-empty text, not {text!r:.100}")
    if len(text) > most:
        raise RequestError(f"{what} has {len(text):,} characters, and the limit is {most:,}; make it shorter")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} contains half a surrogate pair, which is not text; remove it") from None


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON}}]})


def _lark_grammar(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})
