"""The tools of a command's options: files and MCP servers together, and signals while a server runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.sources import opened_tools
from phi4_mlx.tools.toolbox import Toolbox
from tests.unit.tools.test_hostile_mcp import SERVER

NUMBERS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mcp")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "server.py").write_text(SERVER % "")
    return f"{sys.executable} '{tmp_path / 'server.py'}'"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "tools.py").write_text('def double(n: int) -> int:\n    """Doubles."""\n    return 2 * n\n')
    return str(tmp_path / "tools.py")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.signal(number, signal.SIG_DFL) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_files_and_servers_make_one_list(file: str, command: str) -> None:
    with opened_tools([file], [command], pytest.fail) as tools:
        box = Toolbox(tools)
        assert [each["function"]["name"] for each in box.declarations] == ["double", "add"]
        assert box.run(ToolCall("double", {"n": 4})) == "8" and box.run(ToolCall("add", {"a": 4})) == "5"
    with opened_tools([], [], pytest.fail) as tools:
        assert tools == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_servers_and_then_the_program(number: signal.Signals, command: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as leaving, opened_tools([], [command], pytest.fail):
        signal.raise_signal(number)
    assert leaving.value.code == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pids").read_text()), 0)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signals_are_left_alone_without_a_server_or_under_nohup(file: str, command: str) -> None:
    with opened_tools([file], [], pytest.fail):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with opened_tools([], [command], pytest.fail) as tools:
        signal.raise_signal(signal.SIGHUP)
        assert Toolbox(tools).run(ToolCall("add", {"a": 1})) == "2"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_source_that_fails_ends_the_first(command: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be started"), opened_tools([], [command, "false"], pytest.fail):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pids").read_text()), 0)
