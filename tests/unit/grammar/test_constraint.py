"""Grammars: what each accepts and refuses; a constraint that applies one to an answer, token by token."""

from __future__ import annotations

import itertools
import pickle
import random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from llguidance import LLMatcher, LLTokenizer

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar import compiler
from phi4_mlx.grammar.call_rules import spelled
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import Grammar, choice, json_object, json_schema, lark, regex, tool_calls
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import DATA
from tests.json_schemas import STRING, obj

V = 512  # more than the tiny tokenizers' ids
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "$defs": {"name": {"type": "string", "maxLength": 20}},
        },
    },
}
ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}, "b": {"type": "float"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DATA / "tiny_tokenizer")


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer without control tokens for tool calls."""
    return load_tokenizer(DATA / "tiny_sentencepiece")


def obeys(grammar: Grammar, text: str) -> bool:
    """True if the grammar accepts a text as a whole; control tokens count as their text."""
    matcher = LLMatcher(compiler.byte_tokenizer(), spelled(grammar.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    assert mask.shape == (V,) and mask.dtype == mx.bool_
    return [token for token, may in enumerate(mask.tolist()) if may]


def drawn(constraint: Constraint, seed: int, most: int = 100) -> list[int]:
    """Tokens sampled uniformly from the mask, with the tokens that they force."""
    dice, tokens = random.Random(seed), list[int]()
    while len(tokens) < most and not constraint.done:
        token = dice.choice(allowed(constraint))
        forced = constraint.accept(token)
        if forced is not None:
            tokens += [token, *forced]
        elif not constraint.complete:
            assert len(allowed(constraint)) == 1  # after a refusal, the mask holds only the token that fits
    return tokens


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            json_schema(obj({"b": {"type": "integer"}, "a": STRING}, "b", additionalProperties=False)),
            ['{"b": 1, "a": "x"}', '{"b": -2}'],
            ['{"a": "x", "b": 1}', '{"b":1}', '{"b": 1,"a": "x"}', '{"b": 1, "c": 2}', "{}"],
        ),
        (json_schema(obj({"a": STRING})), ["{}", '{"z": [1, {"y": null}]}'], ['{"\\u0061": 1}', '{"a": 1}']),
        (json_schema(obj({"a": STRING}), closed=True), ['{"a": "x"}'], ['{"z": 1}']),
        (json_schema(True), ["null", '"x"', "[1, 2]", "[]", '{"a": 1.5e3}', '{"a": "b"}'], ["", "nul", "x", "[1,2]"]),
        (json_schema({"oneOf": [{"const": 1, "title": "one"}, {"enum": ["x", None]}]}), ["1", '"x"', "null"], ["2"]),
        (
            json_schema({"type": "array", "items": STRING, "uniqueItems": False, "maxItems": 2}),
            ["[]", '["a", "b"]'],
            ['["a", "b", "c"]'],
        ),
        (
            json_schema(
                {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "$id": "https://x.y/z",
                    "$defs": {
                        "n": obj(
                            {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                            "next",
                            additionalProperties=False,
                        )
                    },
                    "$ref": "#/$defs/n",
                }
            ),
            ['{"next": {"next": null}}'],
            ["{}", '{"next": 1}'],
        ),
        (json_schema({"const": {"b": "é\n", "a": [1]}}), ['{"b": "é\\n", "a": [1]}'], ['{"a": [1], "b": "é\\n"}']),
        (
            json_schema(obj({"not": STRING, "$ref": {"enum": ["if", "not"]}}, "not")),
            ['{"not": "x", "$ref": "if"}'],
            ['{"$ref": "if"}'],
        ),
        (
            json_schema({"type": "string", "format": "date"}),
            ['"2024-02-29"', '"2000-02-29"', '"0001-12-31"', '"1999-09-30"'],
            ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"', '"2024-04-31"', '"2024-1-01"'],
        ),
        (
            json_schema({"type": "string", "format": "date-time"}),
            ['"2024-02-29T10:00:00Z"'],
            ['"2023-02-29T10:00:00Z"', '"2024-02-29"'],
        ),
        (
            json_schema({"type": "number", "exclusiveMinimum": 50, "exclusiveMaximum": 50.5}),
            ["50.1", "50.25", "50.000001"],
            ["50", "50.0", "50.00", "50.5", "50.50"],
        ),
        (
            json_schema({"type": "number", "minimum": 2, "exclusiveMinimum": True, "maximum": 2.5}),
            ["2.5", "2.1"],
            ["2", "2.0", "3"],
        ),
        (json_schema({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 4}), ["3"], ["2", "4"]),
        (json_object(), ["{}", '{"a": [1]}'], ["[]", '"x"', ""]),
        (regex(r"[a-z]+\d{2}"), ["ab12", "z99"], ["12", "ab1", "ab123"]),
        (choice(["yes", "no", 'a "b"\n\\', "yes"]), ["yes", "no", 'a "b"\n\\'], ["y", "maybe", ""]),
        (lark('start: "a" NUM+\nNUM: /[0-9]/'), ["a1", "a12"], ["a", "1"]),
    ],
)
def test_what_a_grammar_accepts(grammar: Grammar, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not obeys(grammar, text)] == []
    assert [text for text in bad if obeys(grammar, text)] == []


def call(*calls: tuple[str, str]) -> str:
    inside = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
    return f"<|tool_call|>[{inside}]<|/tool_call|>"


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            tool_calls([WEATHER, ADD]),
            [
                "",
                'Hi, "you"\n',
                call(("add", '{"a": 1, "b": 2.5}')),
                "So: " + call(("get_weather", '{"city": "Rome"}')),
            ],
            [
                call(),
                call(("mul", "{}")),
                call(("add", '{"a": 1}')),
                call(("add", '{"a": 1, "b": 2}')) + "x",
                call(("get_weather", '{"city": "Rome", "days": 10}')),
            ],
        ),
        (
            tool_calls([WEATHER, ADD], "required"),
            [
                call(("add", '{"a": 1, "b": 2}')),
                call(("get_weather", '{"city": "Rome", "days": 3}'), ("add", '{"a": 1, "b": 2}')),
            ],
            ["", "Hi", "Hi" + call(("add", '{"a": 1, "b": 2}')), call(("get_weather", '{"city": "Rome", "more": 3}'))],
        ),
        (
            tool_calls([WEATHER, ADD], "required", parallel=False),
            [call(("add", '{"a": 1, "b": 2}'))],
            [call(*[("add", '{"a": 1, "b": 2}')] * 2)],
        ),
        (
            tool_calls([WEATHER, ADD], "add"),
            [call(("add", '{"a": 1, "b": 2}'))],
            ["", call(*[("add", '{"a": 1, "b": 2}')] * 2), call(("get_weather", '{"city": "a"}'))],
        ),
        (
            tool_calls([WEATHER, ADD], {"type": "function", "function": {"name": "get_weather"}}),
            [call(("get_weather", '{"city": "Rome"}'))],
            [call(("add", '{"a": 1, "b": 2}'))],
        ),
        (tool_calls([{"name": "now"}], "now"), [call(("now", "{}"))], [call(("now", '{"a": 1}'))]),
        (
            tool_calls([ADD], answer=json_schema({"type": "integer"})),
            ["5", call(("add", '{"a": 1, "b": 2}')), call(*[("add", '{"a": 1, "b": 2}')] * 2)],
            ["", "Hi", '"5"', "5" + call(("add", '{"a": 1, "b": 2}')), call(("add", "5"))],
        ),
        (tool_calls([{"name": "now"}], answer=regex("a+/b")), ["aa/b", call(("now", "{}"))], ["", "a/c", "now"]),
        (tool_calls([{"name": "now"}], answer=choice(["a", "b"])), ["a", call(("now", "{}"))], ["ab", "c"]),
        (tool_calls([{"name": "now"}], answer=lark('start: "x" | Y\nY: /[0-9]/')), ["x", "7"], ["", "xx", "y"]),
        (tool_calls([{"name": "now"}], "required", answer=choice(["a"])), [call(("now", "{}"))], ["a"]),
    ],
)
def test_what_a_grammar_of_tool_calls_accepts(grammar: Grammar, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not obeys(grammar, text)] == []
    assert [text for text in bad if obeys(grammar, text)] == []


def test_500_optional_properties_can_be_served(tokenizer: Tokenizer) -> None:
    constraint = Constraint(json_schema(obj({f"p{n}": STRING for n in range(500)})), tokenizer, V, max_tokens=60)
    assert drawn(constraint, 1, 60) and constraint.complete


def test_compiling_stops_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = obj({f"p{n}": {"type": "string", "pattern": "^(ab|a|b)*$", "minLength": 5_000} for n in range(400)})
    compile_grammar, compiled = compiler.compile_grammar, list[str]()

    def counted(what: str, text: str, library: LLTokenizer) -> LLMatcher:
        compiled.append(text)
        return compile_grammar(what, text, library)

    monkeypatch.setattr(compiler, "compile_grammar", counted)
    ticks = itertools.count()
    clock = SimpleNamespace(thread_time=lambda: next(ticks) * compiler.MAX_COMPILE_S / 10)
    monkeypatch.setattr(compiler, "time", clock)
    with pytest.raises(RequestError, match=r"the schema takes more than 1 s to compile"):
        json_schema(heavy)
    assert len(compiled) == 11  # of 400 patterns, which are compiled before the schema


@pytest.mark.parametrize(
    "given", ["", 5, None, "a" * 5_000, "(", "(?=a)b", r"(a)\1", "a\ud800", "a&&[", "[z-a]", "(a{1000}){1000}"]
)
def test_an_unsupported_regular_expression_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="regular expression") as caught:
        regex(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given", [[], "ab", None, [""], [1], ["a"] * 1_001, ["a" * 40_000, "b" * 40_000], ["\udc00"], {"a": 1}]
)
def test_a_malformed_choice_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="choice"):
        choice(given)


@pytest.mark.parametrize(
    "given", ["", 1, "nonsense", "start: start", "start: a", "#" * 70_000, 'start: "a" & "b"', "(" * 1_001]
)
def test_an_unsupported_lark_grammar_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="Lark grammar") as caught:
        lark(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "options", "message"),
    [
        ([], {}, "no tools"),
        ({}, {}, "tools must be a list"),
        ([{"name": ""}], {}, "name"),
        ([WEATHER, WEATHER], {}, "two tools"),
        ([WEATHER], {"choice": "other"}, "'auto', 'required' or one of 'get_weather', not 'other'"),
        ([WEATHER], {"choice": "none"}, "not 'none'"),
        ([WEATHER], {"choice": {"type": "function"}}, "the choice of a tool"),
        ([WEATHER], {"choice": None}, "the choice of a tool"),
        ([WEATHER], {"choice": ["auto"]}, "the choice of a tool"),
        ([{"name": "f", "parameters": obj({"a": {"not": STRING}}), "strict": True}], {}, "tool 'f': .*'not'"),
        ([{"name": "f", "parameters": {"a": {"type": "strange"}}, "strict": True}], {}, "tool 'f': .*strange"),
    ],
)
def test_malformed_tools_and_choices_are_refused(tools: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tool_calls(tools, **options)


def test_a_grammar_travels_as_text(tokenizer: Tokenizer) -> None:
    grammar = tool_calls([ADD], "add")
    assert pickle.loads(pickle.dumps(grammar)) == grammar
    assert drawn(Constraint(grammar.text, tokenizer, V), 1) == drawn(Constraint(grammar, tokenizer, V), 1)


# One answer.

PERSON = json_schema(obj({"name": STRING, "age": {"type": "integer"}}, "name", "age", additionalProperties=False))


def test_only_tokens_that_obey_are_allowed_and_then_the_end(tokenizer: Tokenizer) -> None:
    constraint = Constraint(choice(["yes", "no"]), tokenizer, V)
    texts = {tokenizer.token_bytes(token) for token in allowed(constraint)}
    assert texts <= {b"y", b"ye", b"yes", b"n", b"no"} and {b"y", b"n"} <= texts
    assert not constraint.done and not constraint.complete
    forced = constraint.accept(tokenizer.encode("n")[0])
    assert forced == [*tokenizer.encode("o"), tokenizer.control_ids["<|end|>"]]
    assert constraint.done and constraint.complete
    assert allowed(constraint) == sorted(tokenizer.eos_ids)
    assert constraint.accept(min(tokenizer.eos_ids)) == []


def test_where_an_answer_may_end_or_continue_both_are_allowed(tokenizer: Tokenizer) -> None:
    constraint = Constraint(regex("[ab]+"), tokenizer, V)
    assert not set(allowed(constraint)) & tokenizer.eos_ids
    assert constraint.accept(tokenizer.encode("a")[0]) == []
    assert tokenizer.eos_ids <= set(allowed(constraint)) and tokenizer.encode("b")[0] in allowed(constraint)
    assert constraint.complete and not constraint.done
    assert constraint.accept(min(tokenizer.eos_ids)) == [] and constraint.done


def test_forced_text_comes_in_the_tokenizers_own_tokens(tokenizer: Tokenizer) -> None:
    schema = obj({"hello world": {"enum": [7]}, "temperature": STRING}, "hello world", "temperature")
    constraint = Constraint(json_schema(schema), tokenizer, V)
    (first,) = allowed(constraint)  # forced text at the start comes through a mask of one token
    forced = constraint.accept(first)
    text = tokenizer.decode([first, *(forced or [])])
    assert text.startswith('{"hello world": 7, "temperature":')
    assert [first, *(forced or [])] == tokenizer.encode(text)


def test_control_tokens_are_never_allowed_inside_text(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    for each in (tokenizer, sentencepiece):
        for grammar in (PERSON, json_schema(True), regex("(?s:.*)"), tool_calls([ADD])):
            constraint = Constraint(grammar, each, V)
            controls = {*each.control_ids.values()} - each.eos_ids - {each.control_ids.get("<|tool_call|>")}
            for _ in range(4):
                assert not controls & set(allowed(constraint)), grammar
                last = next(token for token in reversed(allowed(constraint)) if token not in each.eos_ids)
                assert constraint.accept(last) is not None
    constraint = Constraint(PERSON, tokenizer, V)
    constraint.accept(allowed(constraint)[0])
    for token in tokenizer.encode(' "'):
        assert constraint.accept(token) is not None
    assert len(allowed(constraint)) > 100 and not tokenizer.eos_ids & set(allowed(constraint))


def test_ids_beyond_the_vocabulary_are_never_allowed(tokenizer: Tokenizer) -> None:
    assert max(allowed(Constraint(regex("(?s:.*)"), tokenizer, V))) < tokenizer.vocab_size < V


def test_calls_begin_with_the_control_token(tokenizer: Tokenizer) -> None:
    begin, end = tokenizer.control_ids["<|tool_call|>"], tokenizer.control_ids["<|/tool_call|>"]
    must = Constraint(tool_calls([ADD, WEATHER], "required"), tokenizer, V)
    assert allowed(must) == [begin]
    may = Constraint(tool_calls([ADD]), tokenizer, V)
    for token in tokenizer.encode("Hi <|tool_call|>"):  # spelled out, the marker is text
        assert may.accept(token) == []
    assert {begin, *tokenizer.eos_ids} <= set(allowed(may)) and len(allowed(may)) > 100
    forced = may.accept(begin)
    assert tokenizer.decode(forced or []) == '[{"name": "add", "arguments": {"a": '
    assert forced == tokenizer.encode(tokenizer.decode(forced or []))
    assert not tokenizer.eos_ids & set(allowed(may))
    assert tokenizer.decode(may.accept(tokenizer.encode("1")[0]) or []) == ""
    assert tokenizer.decode(may.accept(tokenizer.encode(",")[0]) or []) == ' "b": '
    for token in tokenizer.encode("2}}]"):
        assert may.accept(token) is not None
    assert may.done and allowed(may) == sorted(tokenizer.eos_ids)
    tokens = drawn(Constraint(tool_calls([ADD], "add"), tokenizer, V, max_tokens=90), 5)
    assert tokens[0] == begin and tokens[-2:] == [end, tokenizer.control_ids["<|end|>"]]


def test_a_tokenizer_without_the_control_tokens_spells_them(sentencepiece: Tokenizer) -> None:
    must = tool_calls([ADD], "add")
    text = sentencepiece.decode(drawn(Constraint(must, sentencepiece, V, max_tokens=120), 3, 120)[:-1])
    assert obeys(must, text) and text.startswith('<|tool_call|>[{"name": "add", "arguments": {"a":')
    may = Constraint(tool_calls([ADD]), sentencepiece, V)
    forced: list[int] | None = []
    for token in sentencepiece.encode("Hi <|tool_call|>"):
        forced = may.accept(token)
    assert sentencepiece.decode(forced or []).strip().startswith('[{"name": "add"') and not may.complete


def test_a_token_that_does_not_obey_is_a_request_error(tokenizer: Tokenizer) -> None:
    constraint = Constraint(PERSON, tokenizer, V)
    with pytest.raises(RequestError, match="cannot follow its grammar") as caught:
        constraint.accept(tokenizer.encode("x")[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="cannot follow its grammar"):
        Constraint("start: (", tokenizer, V)
    with pytest.raises(RequestError, match="unknown special token"):
        Constraint(lark('start: "a" <|nothing|>'), tokenizer, V)


@pytest.mark.parametrize("max_tokens", [20, 40, 70, 100])
@pytest.mark.parametrize(
    "grammar",
    [
        json_schema({"type": "array", "items": obj({"a": STRING, "b": {"type": "array", "items": STRING}}, "a", "b")}),
        json_object(),
        json_schema(True),
        json_schema({"type": "integer", "multipleOf": 7}),
        regex(r"[a-z]+(-[a-z]+)*@[a-z]+\.(com|org)"),
        json_schema(
            {
                "$ref": "#/$defs/t",
                "$defs": {"t": obj({"kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "kids")},
            }
        ),
    ],
)
def test_an_answer_ends_within_its_token_limit(tokenizer: Tokenizer, grammar: Grammar, max_tokens: int) -> None:
    for seed in range(10):
        constraint = Constraint(grammar, tokenizer, V, max_tokens)
        tokens = drawn(constraint, seed, max_tokens)
        assert len(tokens) <= max_tokens and constraint.complete, tokenizer.decode(tokens)
        text = tokenizer.decode(token for token in tokens if token not in tokenizer.eos_ids)
        assert obeys(grammar, text)


def test_the_way_is_found_again_when_forced_text_comes_in_other_tokens(tokenizer: Tokenizer) -> None:
    schema = obj({"k": {"type": "string", "pattern": r"^\w+@\w+\.hello$"}}, "k", additionalProperties=False)
    schema["patternProperties"] = {"^x-quite-a-long-name-[a-z]+$": STRING}

    def written(max_tokens: int | None) -> tuple[Constraint, list[int]]:
        """The answer up to `.hello`; `hello` is forced, in fewer tokens than it has in the way to the end."""
        constraint = Constraint(json_schema(schema), tokenizer, V, max_tokens)
        tokens: list[int] = []
        for token in [allowed(constraint)[0], *tokenizer.encode("aaaaaa@a"), *tokenizer.encode(".")]:
            tokens += [token, *(constraint.accept(token) or [])]
        return constraint, tokens

    constraint, tokens = written(None)
    assert tokenizer.decode(tokens) == '{"k": "aaaaaa@a.hello'
    constraint, _ = written(len(tokens) + 6)
    (comma,) = tokenizer.encode('",')
    assert comma in allowed(constraint)
    assert constraint.accept(comma) is None  # another property does not fit
    assert allowed(constraint) == tokenizer.encode('"')


def test_without_a_limit_no_token_is_refused(tokenizer: Tokenizer) -> None:
    for seed in range(10):
        constraint = Constraint(json_object(), tokenizer, V)
        for _ in range(150):
            assert constraint.accept(random.Random(seed).choice(allowed(constraint))) is not None


def test_a_text_that_may_end_anywhere_stops_at_the_limit(tokenizer: Tokenizer) -> None:
    constraint = Constraint(tool_calls([ADD]), tokenizer, V, max_tokens=8)
    letter = tokenizer.encode("a")[0]
    for _ in range(7):
        assert constraint.accept(letter) == []
    begin = tokenizer.control_ids["<|tool_call|>"]
    assert begin in allowed(constraint)
    assert constraint.accept(begin) is None  # no call fits any more
    assert begin not in allowed(constraint) and letter in allowed(constraint)
    assert constraint.accept(letter) == []
