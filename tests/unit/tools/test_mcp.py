"""An MCP server as a command: its tools, their results and errors, and the end of its process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.answer import tool_grammar
from phi4_mlx.tools import mcp as ours
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.mcp import mcp_tools
from phi4_mlx.tools.toolbox import Toolbox

SERVER = '''
import os, time
try:
    from mcp.server import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server
server = Server("small")

@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b

@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("no luck")

@server.tool()
def sleep() -> str:
    """Sleeps."""
    time.sleep(120)
    open(os.environ["SLEPT"], "w").close()
    return "slept"

@server.tool()
def whoami() -> str:
    """Returns its process id and a secret."""
    return f"{os.getpid()} {os.environ.get('SECRET_OF_MINE')}"

server.run()
'''


@pytest.fixture
def command(tmp_path: Path) -> str:
    pytest.importorskip("mcp")
    path = tmp_path / "a server.py"
    path.write_text(SERVER)
    return f"{sys.executable} '{path}'"


def test_tools_of_a_server(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "key")
    with mcp_tools(command) as tools:
        box = Toolbox(tools)
        names = [declared["function"]["name"] for declared in box.declarations]
        assert names == ["add", "fail", "sleep", "whoami"]
        assert box.declarations[0]["function"]["description"] == "Adds."
        assert box.run(ToolCall("add", {"a": 2, "b": 3})) == "5" and box.run(ToolCall("add", {"a": 2})) == "3"
        assert box.problem(ToolCall("add", {})) == "add needs the argument 'a'"
        assert tool_grammar(box.declarations, "auto", box.strict) is not None
        assert box.run(ToolCall("fail", {})).startswith("error: ")
        process, secret = box.run(ToolCall("whoami", {})).split()
        assert secret == "key"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_neither_a_slow_call_nor_an_error_in_the_block_waits_for_the_server(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setenv("SLEPT", str(tmp_path / "slept"))
    with pytest.raises(ZeroDivisionError), mcp_tools(command) as tools:  # not a group of exceptions
        assert Toolbox(tools).run(ToolCall("sleep", {})).endswith("it did not answer within 0.3 s")
        raise ZeroDivisionError
    assert not (tmp_path / "slept").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("no-such-program x", "cannot be started: .*No such file"),
        ("false", "cannot be started"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"bad weather\")'", "cannot be started: bad weather"),
        ("'", "is not a command: No closing quotation"),
        (" ", "is empty"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(words: str, complaint: str) -> None:
    pytest.importorskip("mcp")
    with pytest.raises(RequestError, match=complaint) as refused, mcp_tools(words):
        pass
    assert "\n" not in str(refused.value)


def test_without_the_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(RequestError, match=r"-m pip install 'mcp>=2'"), mcp_tools("true"):
        pass
