"""The leaderboard's questions, declarations and checker, on all of bfcl-eval's single-turn data."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.tools.judge import mistake
from phi4_mlx.evaluation.tools.leaderboard import INSTALL, LIVE, NON_LIVE, Case, Leaderboard
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.declarations import check_tools
from phi4_mlx.tools.parser import ToolCallParser
from tests.conftest import ROOT
from tests.leaderboard_answers import right_calls, written

AST = [category for category in (*NON_LIVE, *LIVE) if not category.endswith("relevance")]


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return Leaderboard()


@pytest.fixture(scope="module")
def cases(board: Leaderboard) -> dict[str, list[Case]]:
    return {category: board.cases(category) for category in (*NON_LIVE, *LIVE)}


def parsed(case: Case, text: str) -> tuple[ToolCall, ...]:
    parser = ToolCallParser(case.tools)
    parser.add(text)
    parser.finish()
    return parser.calls


def test_the_categories_are_the_single_turn_ones() -> None:
    from bfcl_eval.constants import category_mapping

    assert list(NON_LIVE) == category_mapping.NON_LIVE_CATEGORY
    assert list(LIVE) == category_mapping.LIVE_CATEGORY


def test_every_category_is_read_whole(cases: dict[str, list[Case]]) -> None:
    assert [len(cases[category]) for category in NON_LIVE] == [400, 100, 50, 200, 200, 200, 240]
    assert [len(cases[category]) for category in LIVE] == [258, 1053, 16, 24, 884, 16]
    assert all(case.truth for category in AST for case in cases[category])


def types(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema["type"]
        for each in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
            yield from types(each)


def test_every_declaration_is_taken_with_the_types_of_json(cases: dict[str, list[Case]]) -> None:
    tools = [tool for each in cases.values() for case in each for tool in check_tools(case.tools)]
    declared = [tool["function"]["parameters"] for tool in tools]
    assert len(declared) == 8726
    found = {kind for schema in declared for kind in types(schema)}
    assert found == {"object", "array", "string", "integer", "number", "boolean"}


def test_values_in_java_are_declared_as_source_text(cases: dict[str, list[Case]]) -> None:
    (tool,) = cases["simple_java"][1].tools
    parameters = tool["function"]["parameters"]
    assert {each["type"] for each in parameters["properties"].values()} == {"string"}
    assert "HashMap" in parameters["properties"]["params"]["description"]
    assert cases["simple_java"][1].functions[0]["parameters"]["properties"]["params"]["type"] == "HashMap"


def test_the_truth_passes(board: Leaderboard, cases: dict[str, list[Case]]) -> None:
    """At least 99.5 %: some right answers contradict their own declarations, or the checker's own types."""
    wrong = []
    for case in (case for category in AST for case in cases[category]):
        calls = right_calls(case)
        assert list(parsed(case, written(calls))) == calls
        if mistake(board, case, calls):
            wrong.append(case.name)
    assert len(wrong) == 9, wrong
    assert 9 / 2501 < 0.005


def wrong_type(value: Any) -> Any:
    return [value] if isinstance(value, (int, float)) else 987654


def wrong_value(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value + 987654321
    if isinstance(value, str):
        return f"{value} zzqx"
    return [*value, *(value or ["zzqx"])] if isinstance(value, list) else {**value, "zzqx": 1}


def wrong_calls(case: Case, calls: list[ToolCall]) -> Iterator[tuple[str, list[ToolCall]]]:
    """Calls that are wrong in one way each."""
    first, *rest = calls
    arguments, name = first.arguments, first.name
    required = next(each["parameters"]["required"] for each in case.functions if each["name"] == name)

    def with_arguments(changed: dict[str, Any]) -> list[ToolCall]:
        return [ToolCall(name, changed), *rest]

    yield "name", [ToolCall(f"{name}_2", arguments), *rest]
    yield "additional argument", with_arguments({**arguments, "zzqx": 1})
    yield "text", []
    yield "one call too many", [*calls, first]
    if rest:
        yield "one call too few", rest
    if required:
        yield "no arguments", with_arguments({})
    for each in required:
        yield "missing argument", with_arguments({key: arguments[key] for key in arguments if key != each})
        yield "required argument empty", with_arguments({**arguments, each: ""})
    for key, value in arguments.items():
        yield "type", with_arguments({**arguments, key: wrong_type(value)})
        if None not in case.truth[0][name][key]:
            yield "null", with_arguments({**arguments, key: None})
        if value is not None and not isinstance(value, bool):
            yield "value", with_arguments({**arguments, key: wrong_value(value)})
        if isinstance(value, list) and value[::-1] not in (value, *case.truth[0][name][key]):
            yield "order", with_arguments({**arguments, key: value[::-1]})


@pytest.mark.slow
def test_every_wrong_call_is_refused(board: Leaderboard, cases: dict[str, list[Case]]) -> None:
    tried: Counter[str] = Counter()
    for case in (case for category in AST for case in cases[category]):
        calls = right_calls(case)
        if mistake(board, case, calls):
            continue
        for kind, wrong in wrong_calls(case, calls):
            tried[kind] += 1
            assert mistake(board, case, wrong), (case.name, kind, wrong)
    assert tried == {
        "name": 2492, "additional argument": 2492, "text": 2492, "one call too many": 2492, "one call too few": 438,
        "no arguments": 2259, "missing argument": 4436, "required argument empty": 4436, "type": 7955, "null": 7578,
        "value": 6835, "order": 167,
    }  # fmt: skip


def test_no_arguments_are_refused_where_one_is_required(board: Leaderboard, cases: dict[str, list[Case]]) -> None:
    case = cases["simple_python"][0]
    assert mistake(board, case, [ToolCall("calculate_triangle_area", {})]) == (
        "the call of calculate_triangle_area has no arguments, and 'base' is required"
    )
    free = 0
    for case in (case for category in AST for case in cases[category]):
        empty = [ToolCall(call.name, {}) for call in right_calls(case)]
        if mistake(board, case, empty) is None:
            free += 1
            names = {call.name for call in empty}
            assert not any(each["parameters"]["required"] for each in case.functions if each["name"] in names)
    assert free == 32  # where every argument may be left out


def test_an_undeclared_name_is_text(cases: dict[str, list[Case]]) -> None:
    case = cases["simple_python"][0]
    assert not parsed(case, written([ToolCall("calculate_triangle_area_2", {"base": 10, "height": 5})]))


def test_irrelevance_wants_no_call_and_relevance_one(board: Leaderboard, cases: dict[str, list[Case]]) -> None:
    for category, right in (("irrelevance", False), ("live_irrelevance", False), ("live_relevance", True)):
        case = cases[category][0]
        call = ToolCall(case.functions[0]["name"], {})
        assert (mistake(board, case, [call]) is None) is right
        assert (mistake(board, case, []) is None) is not right
        undeclared = written([ToolCall("zzqx", {})])  # which the parser leaves in the text
        assert not parsed(case, undeclared) and mistake(board, case, [], undeclared)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("params", 'new HashMap<String, Object>() {{ put("limit", 50); put("schemaFilter", "public"); }} and more'),
        ("params", "new HashMap<a>() {{" + " " * 380 + ")"),  # hours in the checker's pattern
        ("params", "x" * 401),
    ],
)
def test_a_value_that_the_checker_cannot_read_is_refused(
    argument: str, value: str, board: Leaderboard, cases: dict[str, list[Case]]
) -> None:
    case = cases["simple_java"][1]
    (call,) = right_calls(case)
    assert mistake(board, case, [call]) is None
    wrong = mistake(board, case, [ToolCall(call.name, {**call.arguments, argument: value})])
    assert wrong is not None and wrong.startswith(f"the value of '{argument}' of")


def test_the_packages_of_providers_are_not_imported(board: Leaderboard) -> None:
    assert not [name for name in sys.modules if name.startswith("bfcl_eval.model_handler")]
    assert "bfcl_eval.constants.model_config" not in sys.modules


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(RequestError, match="pip install --no-deps bfcl-eval==") as caught:
        Leaderboard()
    assert INSTALL in str(caught.value)


def test_the_makefile_installs_the_same_package() -> None:
    found = re.search(r"^LEADERBOARD = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None and f"pip install --no-deps {found[1]}" == INSTALL


@pytest.mark.parametrize("line", ['{"id": "simple_java_0"}', '{"id": "simple_java_0", "question": [], "function": []}'])
def test_damaged_data_is_named(line: str, board: Leaderboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "possible_answer").mkdir()
    for folder in (tmp_path, tmp_path / "possible_answer"):
        (folder / "BFCL_v4_simple_java.json").write_text(line)
    monkeypatch.setitem(vars(board), "_folder", tmp_path)
    with pytest.raises(RequestError, match=r"the data of bfcl-eval 2026.* on simple_java is not as expected"):
        board.cases("simple_java")


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfcl_eval.eval_checker.ast_eval.ast_checker", None)
    with pytest.raises(RequestError, match="the installed bfcl-eval 2026") as caught:
        Leaderboard()
    assert INSTALL in str(caught.value)


def test_calls_at_once_have_no_order(board: Leaderboard, cases: dict[str, list[Case]]) -> None:
    """But where a right value of one call is also one of another: the checker gives a call to the first that fits."""
    refused = [case.name for case in cases["parallel"] if mistake(board, case, right_calls(case)[::-1])]
    assert refused == ["parallel_178"]


def test_importing_makes_no_folders(board: Leaderboard) -> None:
    """The package's own settings would make `result`, `score` and `.file_locks` beside it."""
    assert "bfcl_eval.constants.eval_config" not in sys.modules
