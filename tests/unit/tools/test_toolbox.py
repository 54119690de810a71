"""Errors and values of tools, which become a text for the model whatever they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.bridge.events import error_event
from phi4_mlx.errors import Interruption, RequestError
from phi4_mlx.terminal.command import Parser, run
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.python_file import tool_functions
from phi4_mlx.tools.toolbox import MAX_RESULT_CHARS, Toolbox


def failing(kind: type[BaseException]) -> type[BaseException]:
    """An exception class whose text raises `kind`."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise kind("no text")

    return Mute


class NoText(BaseException):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class Text(str):
    def __len__(self) -> int:
        raise SystemExit

    def __str__(self) -> str:
        raise ValueError

    def __getitem__(self, at: Any) -> str:
        raise ValueError


def box(function: Callable[[], Any]) -> Toolbox:
    def tool() -> Any:
        """A tool."""
        return function()

    return Toolbox([tool])


def cyclic() -> list[Any]:
    found: list[Any] = []
    found.append({"again": found})
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(3), SystemExit(), GeneratorExit(), StopIteration(4), asyncio.CancelledError(), BaseException("x"),
        MemoryError(), RecursionError("deep"), NoText(), Exception("a\nb"),
        failing(ValueError)(), failing(SystemExit)(), failing(GeneratorExit)(), failing(RecursionError)(),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), OSError("\ud800"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_tool_raises_is_an_error_on_one_line(raised: BaseException) -> None:
    def fail() -> None:
        raise raised

    result = box(fail).run(ToolCall("tool", {}))
    assert result.startswith(f"error: {type(raised).__name__}") and "\n" not in result and result.encode()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, type("HungUp", (Interruption,), {})])
def test_a_person_stops_a_tool(kind: type[BaseException]) -> None:
    def stop() -> None:
        raise kind

    with pytest.raises(kind):
        box(stop).run(ToolCall("tool", {}))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (cyclic, "ValueError"), (deep, "RecursionError"), (lambda: float("nan"), "ValueError"), (object, "TypeError"),
        (lambda: {1, 2}, "TypeError"), (lambda: b"x", "TypeError"), (lambda: {(1, 2): 3}, "TypeError"),
        (lambda: 10**5000, "ValueError"), (lambda: (n for n in "x"), "TypeError"),
        (lambda: failing(ValueError), "TypeError"),
    ],
)  # fmt: skip
def test_values_that_are_not_json_are_errors(make: Callable[[], Any], error: str) -> None:
    result = box(make).run(ToolCall("tool", {}))
    assert result.startswith(f"error: {error}: ") and "\n" not in result


@pytest.mark.parametrize(
    ("value", "length"),
    [("x" * 50_000_000, 50_000_000), (["x" * 99] * 100_000, 10_300_000), ("\ud800" * 20_000, 20_000)],
)
def test_a_huge_value_is_cut(value: Any, length: int) -> None:
    result = box(lambda: value).run(ToolCall("tool", {}))
    assert result.endswith(f" ... (cut after {MAX_RESULT_CHARS:,} of {length:,})") and result.encode()
    assert len(result) < MAX_RESULT_CHARS + 60


def test_a_text_of_a_class_of_its_own_is_text() -> None:
    assert box(lambda: Text("as it is")).run(ToolCall("tool", {})) == "as it is"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            "class Mute(Exception):\n    def __str__(self): raise SystemExit\nraise Mute",
            "line 3: Mute: its text cannot be",
        ),
        ("raise GeneratorExit", "line 1: GeneratorExit: "),
        ("raise BaseException('a\\nb')", "line 1: BaseException: a b"),
        ("raise SyntaxError(3)", "SyntaxError: 3"),
        ("import sys\nsys.exit('no')", "line 2: SystemExit: no"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
    ],
)
def test_whatever_a_file_of_tools_raises_is_one_line(source: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    path.write_text(source)
    with pytest.raises(RequestError, match=complaint) as refused:
        tool_functions(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_an_exception_without_a_text_is_an_event_and_a_line(
    kind: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    error = failing(kind)()
    assert error_event(error) == {
        "event": "error", "code": "internal", "message": "Mute: its text cannot be read",
    }  # fmt: skip

    def work(args: object) -> None:
        raise error

    assert run(Parser("phi4-mlx", ""), work, []) == 1
    assert capsys.readouterr().err == ("phi4-mlx: internal error: Mute: its text cannot be read; --debug shows where\n")
