"""Grammars that an answer must obey: a JSON schema, a regular expression, a choice, a Lark grammar, tool calls.

A `Grammar` is plain text, made and checked without a model; a `Constraint` applies it to one answer, token by token.
llguidance computes the tokens that may come next in about 0.03 ms at the real vocabulary size. JSON is written as in
the model's training, `{"a": 1, "b": [2, 3]}`, and in the schema's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.user_file import read_file
from phi4_mlx.grammar.apart import made_apart
from phi4_mlx.grammar.call_rules import CALL_OR_ANSWER, MAY_CALL, MUST_CALL, spelled
from phi4_mlx.grammar.compiler import TooComplex, check_grammar, limits
from phi4_mlx.grammar.form import JSON_STYLE, json_grammar, lark_grammar
from phi4_mlx.grammar.keywords import TYPES, compiles
from phi4_mlx.grammar.schema import MAX_MULTIPLE, PlainSchema, plain_schema
from phi4_mlx.tools.declarations import check_tools
from phi4_mlx.tools.hints import class_schema

MAX_PATTERN = 4_096  # characters
MAX_LARK = 65_536  # characters
MAX_LARK_PARTS = 1_000  # rules and brackets; 3,000 nested ones overflow llguidance's stack
MAX_CHOICES = 1_000
MAX_CHOICES_CHARS = 65_536  # of all choices together


@dataclass(frozen=True)
class Grammar:
    """A grammar as one text, which can be sent to another process; made and checked by the functions below.

    Attributes:
        text: the grammar in llguidance's form.
        loosened: what the grammar does not enforce, one line each, such as "tool 'search': uniqueItems".
    """

    text: str
    loosened: tuple[str, ...] = ()


def json_schema(schema: Any, closed: bool = False, strict: bool = True) -> Grammar:
    """JSON that a schema accepts, with the properties in the schema's order.

    Numbers stay a millionth away from an exclusive bound. Properties that the schema does not name may come twice.
    Bounds beyond 64 bits and formats that are not in `phi4_mlx.grammar.examples.FORMATS` are ignored.

    Args:
        schema: JSON Schema (draft 2020-12) of at most 64 KB and 64 levels; references only within it.
        closed: objects with `properties` and without `additionalProperties` allow no others.
        strict: refuses a keyword that a grammar cannot enforce, and a schema that is too large or takes over a second
            to compile; otherwise the keyword or all but the schema's type is left out, and is in `loosened`.

    Raises:
        RequestError: the schema is malformed, no answer obeys it, or it is strict and cannot be enforced; says why.
    """
    try:
        plain = plain_schema(schema, closed=closed, strict=strict)
        trials = [json_grammar(each) for each in plain.costly]
        grammar = _checked("the schema", json_grammar(plain.schema), trials)
    except TooComplex as error:
        if strict:
            raise
        loosened = f"the schema: the whole schema ({error!s:.200})"
        return Grammar(json_grammar(type_alone(schema)), (loosened,))
    return replace(grammar, loosened=tuple(f"the schema: {each}" for each in plain.loosened))


def type_alone(schema: Any) -> JsonObject:
    """A schema with the type of another, if that has one, and nothing else."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return {"type": kind} if isinstance(kind, str) and kind in TYPES else {}


def class_answer(kind: Any) -> tuple[Grammar, Callable[[str], Any]]:
    """JSON of a dataclass or a pydantic model; what a grammar cannot enforce is left to the class.

    Args:
        kind: the class, as for `phi4_mlx.tools.hints.class_schema`.

    Returns:
        The grammar, and a function that makes an instance from an answer.

    Raises:
        RequestError: as in `json_schema` and `class_schema`.
    """
    schema, read = class_schema(kind)
    return json_schema(schema, closed=True, strict=False), read


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar(json_grammar({"type": "object"}))


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
    return _checked("the choice", lark_grammar(f"start: {rules}\n"))


def lark(text: str) -> Grammar:
    """Text that a Lark grammar accepts, in llguidance's dialect.

    Args:
        text: at most 65,536 characters. A control token comes only where the grammar names it, as in `<|end|>`.

    Raises:
        RequestError: the grammar is malformed or too large, or no text obeys it.
    """
    if isinstance(text, str) and not {*"&~%"}.isdisjoint(text):
        # Intersections, complements and schemas within it may cost any time: a process with limits tries them.
        return Grammar(*made_apart(json.dumps({"format": ["grammar", text]}), "response_format"))
    return lark_here(text)


def lark_here(text: str) -> Grammar:
    """A Lark grammar that is compiled in this process, whatever it costs; otherwise as `lark`."""
    _check_text("a Lark grammar", text, MAX_LARK)
    if (parts := sum(map(text.count, ":([{"))) > MAX_LARK_PARTS:
        raise RequestError(
            f"a Lark grammar has {parts:,} rules and brackets, and the limit is {MAX_LARK_PARTS:,}; make it smaller"
        )
    from llguidance import LLMatcher

    grammar = lark_grammar(text)
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

    Arguments obey the tool's schema; names that it does not list are refused, unless it allows them. Keywords that a
    grammar cannot enforce are left out, and arguments whose schema cannot be compiled are any object; `loosened` says
    which. A tool with `"strict": true` is refused instead.

    Args:
        tools: each as for `phi4_mlx.tools.declarations.check_tools`.
        choice: "auto" (a text, or a text and then calls), "required" (at least one call), or one tool, by its name or
            as OpenAI's {"type": "function", "function": {"name": ...}} (one call of it). "none" needs no grammar.
        parallel: allows more than one call.
        answer: the grammar of an answer without calls under "auto"; None for any text, which may also precede calls.

    Raises:
        RequestError: a tool is malformed, `json_schema` refuses the schema of a strict one, or the chosen tool does
            not exist.
    """
    checked = {tool["function"]["name"]: tool["function"] for tool in check_tools(tools)}
    if not checked:
        raise RequestError("there are no tools to call; give at least one, or leave out the choice of a tool")
    names = list(checked)
    if choice not in ("auto", "required"):
        names = [_chosen(choice, checked)]
    one = not parallel or choice not in ("auto", "required")
    plain: dict[str, PlainSchema] = {}
    left = MAX_MULTIPLE
    for number, name in enumerate(names):
        plain[name] = _arguments(checked[name], f"#/$defs/t{number}", left)
        left -= plain[name].states
    make = partial(_calls_grammar, auto=choice == "auto", one=one, answer=answer)
    try:
        return make(plain)
    except RequestError as error:
        reason, tried = error, dict(plain)
        # Arguments that were too much for `plain_schema` are any object already.
        known = {name: each for name, each in plain.items() if each.schema != {"type": "object"}}
        plain |= {name: _compilable(checked[name], each) for name, each in known.items()}
    # Each alone can be compiled; if not all together, the smaller half of the schemas is kept, then none.
    loose = [
        name for name in sorted(plain, key=lambda name: len(str(plain[name].schema))) if not _strict(checked[name])
    ]
    for kept in dict.fromkeys((len(loose), len(loose) // 2, 0)):
        some = plain | {name: _any_object(plain[name], reason) for name in loose[kept:]}
        if some == tried:
            continue
        try:
            return make(some)
        except RequestError as error:
            reason = error
    raise reason


def _strict(tool: JsonObject) -> bool:
    return tool.get("strict") is True


def _arguments(tool: JsonObject, at: str, states: int) -> PlainSchema:
    """The schema of a tool's arguments, which will stand at `at` and may have so many states of `multipleOf`."""
    strict = _strict(tool)
    try:
        if tool["parameters"]["type"] != "object":
            raise RequestError(f"parameters must be an object, not of type {tool['parameters']['type']!r:.100}")
        plain = plain_schema(tool["parameters"], at, closed=True, strict=strict, lenient=not strict)
        if plain.states > states:
            raise RequestError(f"'multipleOf' of all tools takes over {MAX_MULTIPLE:,} states; choose rounder ones")
        return plain
    except RequestError as error:
        if strict:
            raise RequestError(f"tool {tool['name']!r}: {error}") from None
        return _any_object(None, error)


def _compilable(tool: JsonObject, plain: PlainSchema) -> PlainSchema:
    """A tool's arguments, or any object if they cannot be compiled."""
    what = f"tool {tool['name']!r}"
    alone = plain_schema(tool["parameters"], closed=True, strict=_strict(tool), lenient=not _strict(tool))
    if _strict(tool):
        _checked(what, json_grammar(alone.schema), [json_grammar(each) for each in alone.costly])
    elif not compiles(alone.schema):
        return _any_object(plain, RequestError(f"{what} cannot be compiled"))
    return plain


def _any_object(plain: PlainSchema | None, error: RequestError) -> PlainSchema:
    if plain is not None and plain.schema == {"type": "object"}:
        return plain
    return PlainSchema({"type": "object"}, [], (f"the whole schema ({error!s:.200})",))


def _calls_grammar(plain: Mapping[str, PlainSchema], auto: bool, one: bool, answer: Grammar | None) -> Grammar:
    """The grammar of calls of tools, given the arguments of each; it is checked."""
    calls: list[JsonObject] = []
    for number, name in enumerate(plain):
        parts = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/t{number}"}}
        calls.append({"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False})
    definitions = {f"t{number}": each.schema for number, each in enumerate(plain.values())}
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **({"maxItems": 1} if one else {})}
    grammars = [{"name": "calls", "json_schema": {**schema, "$defs": definitions, "x-guidance": JSON_STYLE}}]
    main = MAY_CALL if auto else MUST_CALL
    loosened = [f"tool {name!r}: {line}" for name, each in plain.items() for line in each.loosened]
    if answer is not None and auto:
        main = CALL_OR_ANSWER
        grammars.append({**json.loads(answer.text)["grammars"][0], "name": "answer"})
        loosened += answer.loosened
    text = json.dumps({"grammars": [{"lark_grammar": main}, *grammars]})
    trials = dict.fromkeys(json_grammar(part) for each in plain.values() for part in each.costly)
    return replace(_checked("the tools", text, list(trials)), loosened=tuple(loosened))


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
