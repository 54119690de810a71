"""Files that the user names: Python functions as tools, and a JSON schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.grammars import schema_grammar
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.python_file import tool_functions
from phi4_mlx.tools.toolbox import Toolbox

TOOLS = '''
from __future__ import annotations
from dataclasses import dataclass
from math import sqrt
from textwrap import dedent

@dataclass
class Point:
    x: int

def shift(point: Point, by: int = 1) -> int:
    """Moves a point."""
    return point.x + by + _nothing()

def _nothing() -> int:
    return 0

alias = sqrt
'''


def test_the_public_functions_of_a_file_are_tools(tmp_path: Path) -> None:
    path = tmp_path / "my tools.txt"
    path.write_text(TOOLS)
    functions = tool_functions(str(path))
    assert [each.__name__ for each in functions] == ["shift"]  # not the imported function, nor the private one
    box = Toolbox(functions)
    assert box.run(ToolCall("shift", {"point": {"x": 2}, "by": 5})) == "7"
    assert [each.name for each in tmp_path.iterdir()] == ["my tools.txt"]  # no __pycache__


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"x = 1\n1 / 0\n", r"tools.py, line 2: ZeroDivisionError: division by zero"),
        (b"def f(:\n", r"tools.py, line 1: SyntaxError: invalid syntax"),
        (b"import sys\n\nsys.exit('no')\n", r"tools.py, line 3: SystemExit: no"),
        (b"import no_such_module\n", r"line 1: ModuleNotFoundError"),
        (b"\xff\xfe", r"tools.py.*(SyntaxError|UnicodeDecodeError)"),
        (b"a\0b", r"tools.py.*(SyntaxError|ValueError)"),
        (b"from math import sqrt\n_f = lambda x: x\n", r"defines no function whose name begins without _"),
        (b"", r"defines no function"),
    ],
)
def test_a_broken_file_is_one_line(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=complaint) as refused:
        tool_functions(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["none.py", ".", "a\0b"])
def test_a_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (tool_functions, schema_grammar):
        with pytest.raises(RequestError, match="cannot be read"):
            read(name)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"type": 5}', "schema.json: "),
        ('{"$ref": "https://example.com/x"}', "schema.json: "),
    ],
)
def test_a_broken_schema_is_one_line(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=complaint) as refused:
        schema_grammar(str(path))
    assert "\n" not in str(refused.value)


def test_a_schema_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    assert '"integer"' in schema_grammar(str(path)).text
