"""Hostile and broken MCP servers: one line each, nothing waits beyond its limit, and the process ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phi4_mlx.chat.tools import shown_tool
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.answer import tool_grammar
from phi4_mlx.tools import mcp as ours
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.declarations import tools_text
from phi4_mlx.tools.mcp import mcp_tools
from phi4_mlx.tools.toolbox import Toolbox

# A server without a library; each test replaces some of its functions.
SERVER = """
import json, os, signal, subprocess, sys, time
open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
ADD = {"name": "add", "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}}

def put(text):
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()

def answer(message, result):
    put(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}))

def text(message, given):
    answer(message, {"content": [{"type": "text", "text": given}]})

def initialize(message):
    answer(message, {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}})

def tools(message):
    answer(message, {"tools": [ADD]})

def call(message):
    text(message, str(message["params"]["arguments"]["a"] + 1))

def other(message):
    pass

def at_end():
    pass

%s

for line in sys.stdin:
    message = json.loads(line)
    known = {"initialize": initialize, "tools/list": tools, "tools/call": call}
    known.get(message.get("method"), other)(message)
at_end()
"""

Server = Callable[[str], str]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Makes the command of a server from the functions that it replaces; checks at the end that its process is gone."""
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))

    def command(functions: str) -> str:
        path = tmp_path / "server.py"
        path.write_text(SERVER % functions)
        return f"{sys.executable} '{path}'"

    return command


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path: Path) -> object:
    yield
    for number in (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else ():
        for _ in range(200):  # a killed child of the server is reaped by the system
            try:
                os.kill(int(number), 0)
                state = Path(f"/proc/{number}/stat")
                if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                    break
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"process {number} is left")


REFUSED = {
    "hangs in initialize": ("def initialize(message): time.sleep(600)", "did not list its tools within 1 s"),
    "hangs in tools/list": ("def tools(message): time.sleep(600)", "did not list its tools within 1 s"),
    "prints garbage alone": (
        "def initialize(message):\n    put('Listening on port 80'); time.sleep(600)",
        "did not list its tools within 1 s",
    ),
    "dies at start": ("def initialize(message): sys.exit('no key')", "no key"),
    "is killed in tools/list": ("def tools(message): os.kill(os.getpid(), 9)", "Connection closed"),
    "closes stdout": ("def tools(message):\n    os.close(1); time.sleep(600)", "Connection closed"),
    "refuses": (
        "def initialize(message):\n"
        "    put(json.dumps({'jsonrpc': '2.0', 'id': message['id'], 'error': {'code': 1, 'message': 'go\\naway'}}))",
        "go away",
    ),
    "tools that are no list": (
        "def tools(message): answer(message, {'tools': ADD})",
        "its answer is malformed: tools: Input should be a valid list",
    ),
    "an endless line": (
        "def initialize(message):\n    while True: sys.stdout.write('x' * 65536)",
        "did not list its tools within 1 s",
    ),
    "megabytes of tools": (
        "def tools(message): answer(message, {'tools': [{**ADD, 'name': f't{n}', 'description': 'x' * 9999}"
        " for n in range(200)]})",
        "its tools have over 1,048,576 bytes",
    ),
    "pages without end": (
        "def tools(message): answer(message, {'tools': [], 'nextCursor': 'same'})",
        "its list of tools has over 100 pages",
    ),
    "a schema that is no object": (
        "def tools(message): answer(message, {'tools': [ADD, {'name': 'odd', 'inputSchema': [1]}]})",
        "its answer is malformed: tools.1.inputSchema: Input should be a valid dictionary",
    ),
    "a tool that is no object": (
        "def tools(message): answer(message, {'tools': [3]})",
        "its answer is malformed: tools.0",
    ),
    "wrong ids": (
        "def initialize(message):\n"
        "    for each in ('a', 1.5, None, [1], {}, 2**70): answer({'id': each}, {})\n"
        "    time.sleep(600)",
        "did not list its tools within 1 s",
    ),
    "reads nothing": ("time.sleep(600)", "did not list its tools within 1 s"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_cannot_be_used_is_one_line(case: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, complaint = REFUSED[case]
    monkeypatch.setattr(ours, "START_TIMEOUT_S", 1.0 if "within 1 s" in complaint else 60.0)
    command = server(functions)
    with pytest.raises(RequestError, match=complaint) as refused, mcp_tools(command):
        pass
    line = str(refused.value)
    assert line.startswith(f"the MCP server {command!r:.200} cannot be started") and "\n" not in line


USED = {
    "garbage between the messages": (
        "def call(message):\n"
        "    for line in ('', 'log', '{', '[]', '1', 'null', '{}', '\\udcff', '[' * 100000, '9' * 5000):\n"
        "        sys.stdout.buffer.write(line.encode(errors='surrogateescape') + b'\\r\\n')\n"
        "    sys.stdout.flush(); text(message, '8')"
    ),
    "notifications and requests of its own": (
        "def call(message):\n"
        "    said = {'level': 'info', 'data': 3}\n"
        "    put(json.dumps({'jsonrpc': '2.0', 'method': 'notifications/message', 'params': said}))\n"
        "    put(json.dumps({'jsonrpc': '2.0', 'id': 'p', 'method': 'ping'}))\n"
        "    assert json.loads(sys.stdin.readline())['id'] == 'p'\n"
        "    text(message, '8')"
    ),
    "pings without reading the answers": (
        "def call(message):\n"
        "    for n in range(60000): put(json.dumps({'id': n, 'method': 'ping'}))\n"
        "    text(message, '8')\n"
        "    sys.exit()"
    ),
    "answers twice": ("def call(message):\n    for _ in range(3): text(message, '8')"),
    "other ids first": (
        "def call(message):\n"
        "    for each in (0, 99, 'a', None, [1], {}, True): text({'id': each}, 'wrong')\n"
        "    text(message, '8')"
    ),
    "floods stderr": (
        "def call(message):\n    for _ in range(300): sys.stderr.write('e' * 65536)\n    text(message, '8')"
    ),
    "odd parts": (
        "def call(message): answer(message, {'content': [{'type': 'text', 'text': '8', 'y': 2}], 'x': 1})"
    ),
    "structured content alone": ("def call(message): answer(message, {'content': [], 'structuredContent': {'a': 8}})"),
    "ignores the end of its input": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef at_end(): time.sleep(600)"),
}


@pytest.mark.parametrize("case", USED)
def test_a_server_with_bad_manners_is_used(case: str, server: Server) -> None:
    said: list[str] = []
    with mcp_tools(server(USED[case]), said.append) as tools:
        box = Toolbox(tools)
        assert box.run(ToolCall("add", {"a": 7})) in ("8", '{"a": 8}')
    assert said == []


FAILS = {
    "dies": ("def call(message): sys.exit('broken')", ": Connection closed"),
    "closes stdout": ("def call(message):\n    os.close(1); time.sleep(600)", ": Connection closed"),
    "hangs": ("def call(message): time.sleep(600)", "did not answer within 1 s"),
    "reads no more": (
        "def tools(message):\n    answer(message, {'tools': [ADD]}); time.sleep(600)",
        "did not answer within 1 s",
    ),
    "an endless line": (
        "def call(message):\n    while True: sys.stdout.write('x' * 65536)",
        "did not answer within 1 s",
    ),
    "content of no list": ("def call(message): answer(message, {'content': 3})", "its answer is malformed: content"),
    "an error of the tool": (
        "def call(message): answer(message, {'content': [{'type': 'text', 'text': 'no'}], 'isError': True})",
        "error: no",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_call_that_fails_is_an_error_for_the_model(
    case: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions, complaint = FAILS[case]
    monkeypatch.setattr(ours, "CALL_TIMEOUT_S", 1.0 if "within 1 s" in complaint else 60.0)
    with mcp_tools(server(functions)) as tools:
        box = Toolbox(tools)
        for argument in (1, "x" * 300_000):  # more than a pipe holds
            result = box.run(ToolCall("add", {"a": argument}))
            assert complaint in result and (not complaint.startswith(":") or ": the MCP server " in result)
            assert result.count("\n") == complaint.count("\n")


TOOLS = {
    "a name with spaces": ("[ADD, {**ADD, 'name': 'a b\\x1b'}]", "a name is 1 to 128 of the characters"),
    "two of one name": ("[ADD, ADD]", "a second tool 'add'"),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tools_that_cannot_be_used_are_left_out_and_said(case: str, server: Server) -> None:
    listed, complaint = TOOLS[case]
    said: list[str] = []
    command = server(f"def tools(message): answer(message, {{'tools': {listed}}})")
    with mcp_tools(command, said.append) as tools:
        assert Toolbox(tools).run(ToolCall("add", {"a": 7})) == "8" and len(tools) == 1
    (line,) = said
    assert line.startswith(f"the MCP server {command!r:.200}: left out ") and complaint in line and "\n" not in line


ODD_SCHEMAS = (
    "{'type': 'object', 'additionalProperties': []}", "{'type': 'object', 'anyOf': 'x'}",
    "{'type': 'object', 'properties': {'a': {'enum': 3, 'type': [3]}}}", "{'type': 'object', '$ref': '#'}",
    "{'type': 'object', 'properties': {'a': {'minimum': -2**63, 'type': 'integer', 'maximum': -2**63}}}",
    "{'type': 'object', 'enum': [1]}", "{'type': 'object', 'properties': {'a': {'pattern': '(?=a)b'}}}",
)  # fmt: skip


def test_odd_schemas_end_neither_the_grammar_nor_a_call(server: Server) -> None:
    listed = ", ".join(f"{{'name': 't{n}', 'inputSchema': {schema}}}" for n, schema in enumerate(ODD_SCHEMAS))
    functions = f"def tools(message): answer(message, {{'tools': [{listed}]}})\ndef call(message): text(message, 'ran')"
    said: list[str] = []
    with mcp_tools(server(functions), said.append) as tools:
        box = Toolbox(tools)
        assert tool_grammar(box.declarations, "auto", True) is not None
        for declared in box.declarations:
            call = ToolCall(declared["function"]["name"], {"a": 1})
            assert isinstance(box.problem(call), str) or box.run(call) == "ran"
            assert shown_tool(declared).startswith(declared["function"]["name"])
        assert all(f'"{declared["function"]["name"]}"' in tools_text(box.declarations) for declared in box.declarations)
    assert len(tools) + sum(line.count("tool 't") for line in said) == len(ODD_SCHEMAS)


def test_pages_of_tools(server: Server) -> None:
    functions = """
at = -1
def tools(message):
    global at
    at += 1
    assert message.get("params", {}).get("cursor") == (str(at) if at else None)
    answer(message, {"tools": [{**ADD, "name": f"t{at}"}], **({"nextCursor": str(at + 1)} if at < 4 else {})})
"""
    with mcp_tools(server(functions)) as tools:
        assert [tool["function"]["name"] for tool, _ in tools] == ["t0", "t1", "t2", "t3", "t4"]
