"""Answers that obey a grammar: a JSON schema, a regular expression, a choice, a Lark grammar, calls of tools.

A `Grammar` is plain text, made and checked without any model; a `Constraint` holds one answer to it, token by token.
The grammars are llguidance's, which says what may come next in some 0.03 ms at the true vocabulary. JSON is written as
the model was trained on it, `{"a": 1, "b": [2, 3]}`, and in the schema's order.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.schema import plain_schema
from phi4_mlx.grammar.way_out import MAX_LEAST, Paths, hints_of
from phi4_mlx.tools.declarations import check_tools
from phi4_mlx.tools.hints import class_schema
from phi4_mlx.tools.python_file import _read

MAX_COMPILE_S = 1.0
MAX_PATTERN = 4_096  # characters
MAX_LARK = 65_536  # characters
MAX_LARK_PARTS = 1_000  # rules and brackets; 3,000, each within the one before, overrun the library's stack
MAX_CHOICES, MAX_CHOICES_CHARS = 1_000, 65_536

# How json.dumps parts items. `\uXXXX` is left out: with it, a free key could spell a named one a second way.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
# Text runs until the control token; "spelled" is for a tokenizer without one, where the text itself begins the calls.
_MAY_CALL = "start: TEXT | opened @calls <|/tool_call|>\nopened: TEXT <|tool_call|>\nTEXT: /(.|\\n)*/\n"
_MUST_CALL = "start: <|tool_call|> @calls <|/tool_call|>\n"
_CALL_OR_ANSWER = "start: @answer | <|tool_call|> @calls <|/tool_call|>\n"
_SPELLED = {
    _MAY_CALL: 'start: TEXT | opened @calls "<|/tool_call|>"\nopened[lazy]: TEXT "<|tool_call|>"\nTEXT: /(.|\\n)*/\n',
    _MUST_CALL: 'start: "<|tool_call|>" @calls "<|/tool_call|>"\n',
    _CALL_OR_ANSWER: 'start: @answer | "<|tool_call|>" @calls "<|/tool_call|>"\n',
}


@dataclass(frozen=True)
class Grammar:
    """What an answer must be, as one text that another process can be sent; made and checked by the functions below.

    Attributes:
        text: llguidance's own form.
    """

    text: str


def json_schema(schema: Any, closed: bool = False) -> Grammar:
    """JSON that a schema accepts, its properties in the schema's order.

    Numbers keep a millionth away from an exclusive bound. Properties that the schema does not name may come twice.

    Args:
        schema: JSON Schema (draft 2020-12), at most 64 KB, 500 properties, and 64 deep; references within it alone.
        closed: objects with `properties` that say nothing of others allow no others.

    Raises:
        RequestError: it is malformed, too large, takes over a second to compile, or uses a keyword that an answer
            cannot be held to; names it.
    """
    plain = plain_schema(schema, closed=closed)
    trials = [_json_grammar(each) for each in plain.costly]
    return _checked("the schema", Grammar(_json_grammar(plain.schema)), trials)


def class_answer(kind: Any) -> tuple[Grammar, Any]:
    """The grammar of a dataclass or a pydantic model, and a function that makes an instance of an answer.

    Raises:
        RequestError: as `json_schema` and `phi4_mlx.tools.hints.class_schema`.
    """
    schema, read = class_schema(kind)
    return json_schema(schema, closed=True), read


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar(_json_grammar({"type": "object"}))


def any_json() -> Grammar:
    """Any JSON value."""
    return Grammar(_json_grammar({}))


def regex(pattern: str) -> Grammar:
    """A text that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's regex crate: as Python's, but no look-around and no back-references; at most
            4,096 characters.

    Raises:
        RequestError: it is malformed, too large, or nothing matches it.
    """
    _check_text("a regular expression", pattern, MAX_PATTERN)
    from llguidance import LLMatcher

    return _checked("the regular expression", Grammar(LLMatcher.grammar_from_regex(pattern)), sure=False)


def choice(strings: Sequence[str]) -> Grammar:
    """One of some texts.

    Args:
        strings: at most 1,000, none empty, of at most 65,536 characters in all.

    Raises:
        RequestError: there are none, or too many, or one is no text.
    """
    if not isinstance(strings, (list, tuple)) or not strings:
        raise RequestError(f"a choice needs a list of at least one string, not {strings!r:.100}")
    if len(strings) > MAX_CHOICES:
        raise RequestError(f"a choice of {len(strings):,} strings is given, and at most {MAX_CHOICES:,} can be served")
    for each in strings:
        _check_text("a string of a choice", each, MAX_CHOICES_CHARS)
    _check_text("a choice", "".join(strings), MAX_CHOICES_CHARS)
    rules = " | ".join(json.dumps(each, ensure_ascii=False) for each in dict.fromkeys(strings))
    return _checked("the choice", Grammar(_lark_grammar(f"start: {rules}\n")))


def lark(text: str) -> Grammar:
    """What a Lark grammar accepts, in llguidance's dialect of it.

    Args:
        text: at most 65,536 characters. A control token comes only where the grammar names one, as in `<|end|>`.

    Raises:
        RequestError: it is malformed or too large, or nothing obeys it.
    """
    _check_text("a Lark grammar", text, MAX_LARK)
    if (parts := sum(map(text.count, ":([{"))) > MAX_LARK_PARTS:
        raise RequestError(f"a Lark grammar has {parts:,} rules and brackets; at most {MAX_LARK_PARTS:,} can be served")
    from llguidance import LLMatcher

    grammar = Grammar(_lark_grammar(text))
    failed, said = LLMatcher.validate_grammar_with_warnings(grammar.text, None, limits=_limits())
    if not failed and said and all("no tokenizer" in each for each in said):
        return grammar  # it names tokens, and only a tokenizer can tell which there are
    return _checked("the Lark grammar", grammar, sure=False)


def tool_calls(
    tools: Sequence[Any],
    choice: str | Mapping[str, Any] = "auto",
    parallel: bool = True,
    answer: Grammar | None = None,
) -> Grammar:
    """Calls of tools in the model's own form: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`.

    Arguments obey the tool's schema, and are none but those it names, unless it says otherwise.

    Args:
        tools: each as for `phi4_mlx.tools.declarations.check_tools`.
        choice: "auto" (a text, or a text and then calls), "required" (at least one call), or one tool, by its name or
            as OpenAI's {"type": "function", "function": {"name": ...}} (one call of it). "none" needs no grammar.
        parallel: allows more than one call.
        answer: what a text must obey that "auto" allows in the place of calls; None for any, also before calls.

    Raises:
        RequestError: a tool is malformed, or its schema is refused as by `json_schema`; or there is no such tool.
    """
    checked = {tool["function"]["name"]: tool["function"] for tool in check_tools(tools)}
    if not checked:
        raise RequestError("there are no tools to call; give at least one, or leave the choice of a tool out")
    names = list(checked)
    if choice not in ("auto", "required"):
        names = [_named(choice, checked)]
    calls, definitions, trials = [], {}, []
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
    main = _MAY_CALL if choice == "auto" else _MUST_CALL
    if answer is not None and choice == "auto":
        main = _CALL_OR_ANSWER
        grammars.append({**json.loads(answer.text)["grammars"][0], "name": "answer"})
    text = json.dumps({"grammars": [{"lark_grammar": main}, *grammars]})
    return _checked("the tools", Grammar(text), trials)


def _named(choice: Any, tools: Mapping[str, Any]) -> str:
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
        raise RequestError(f"{what} must be a text that is not empty, not {text!r:.100}")
    if len(text) > most:
        raise RequestError(f"{what} of {len(text):,} characters is given, and at most {most:,} can be served")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} holds half a surrogate pair, which is no text; take that out") from None


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON}}]})


def _lark_grammar(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _limits() -> Any:
    from llguidance import LLParserLimits

    # Its own limits are 20 ms to 0.3 s of work at each stage, but 500 optional properties need more than 2,000 items.
    return LLParserLimits(verbose_errors=False, max_items_in_row=20_000)


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> Any:
    """One whose tokens are the bytes; it makes a grammar testable before there is a model."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


@lru_cache(maxsize=1)
def _byte_paths() -> Paths:
    texts = [bytes([byte]) for byte in range(256)]
    return Paths([*texts, *[b""] * 6], {byte: byte for byte in range(256)}, _bytes_tokenizer().eos_token)


def _may_begin(matcher: Any) -> bool:
    first = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), count=256, bitorder="little")
    return bool(first.any()) and not matcher.is_error()


def _checked(what: str, grammar: Grammar, costly: Iterable[str] = (), sure: bool = True) -> Grammar:
    """Compiles a grammar within the time that it may take, its costly parts first, and looks for one answer."""
    from llguidance import LLMatcher

    costly = list(costly)
    start = time.perf_counter()
    for text in [*costly, _spelled(grammar.text)]:
        matcher = LLMatcher(_bytes_tokenizer(), text, log_level=0, limits=_limits())
        _raise_error(what, matcher)
        for warning in matcher.get_grammar_warnings():
            raise RequestError(f"{what}: {_line(warning)}")
        if time.perf_counter() - start > MAX_COMPILE_S:
            raise RequestError(f"{what} takes more than {MAX_COMPILE_S:g} s to compile; make it simpler")
    way = _byte_paths().way_out(matcher, hints_of(grammar.text))
    _raise_error(what, matcher)
    # A way through JSON is found unless there is none, but through hard patterns only by luck.
    if way is None and ((sure and not costly) or not _may_begin(matcher)):
        matcher.consume_tokens(matcher.compute_ff_tokens())
        _raise_error(f"{what} is too intricate to follow, or its answers never end", matcher)
        raise RequestError(
            f"{what} is obeyed by no answer of up to {MAX_LEAST:,} bytes: the least of them is longer, never ends, or "
            "there is none"
        )
    return grammar


def _spelled(text: str) -> str:
    """The same grammar without control tokens, if it is one of ours that has them."""
    if "<|tool_call|>" not in text:
        return text
    whole = json.loads(text)
    main = whole["grammars"][0]
    main["lark_grammar"] = _SPELLED.get(main.get("lark_grammar"), main.get("lark_grammar"))
    return json.dumps(whole)


def _raise_error(what: str, matcher: Any) -> None:
    if matcher.is_error():  # llguidance never raises
        raise RequestError(f"{what}: {_line(matcher.get_error())}")


def _line(message: str) -> str:
    return " ".join(message.partition("<state>")[0].partition("<backtrace>")[0].split())[:300]


# One answer.


def schema_grammar(name: str) -> Grammar:
    """The grammar of a JSON schema in a file.

    Raises:
        RequestError: it cannot be read, is not JSON, or is a schema that cannot be kept.
    """

    path = Path(os.path.expanduser(name))
    try:
        schema = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    try:
        return json_schema(schema)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
