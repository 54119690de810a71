"""Hostile and broken MCP servers: one line each, nothing waits beyond its limit, and no process is left."""

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
from phi4_mlx.tools import json_rpc
from phi4_mlx.tools import mcp as ours
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.declarations import tools_text
from phi4_mlx.tools.mcp import mcp_tools
from phi4_mlx.tools.toolbox import Toolbox

# A server without a library; each test replaces some of its functions.
SERVER = """
import json, os, signal, subprocess, sys, time
open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
ADD = {"name": "add", "inputSchema": {"properties": {"a": {"type": "integer"}}}}

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
    monkeypatch.setattr(json_rpc, "EXIT_S", 0.5)

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
    "hangs in initialize": (
        "def initialize(message): time.sleep(600)",
        r"cannot be started within 1 s: 'initialize' had no answer in time; check its command, or leave it out",
    ),
    "hangs in tools/list": ("def tools(message): time.sleep(600)", "'tools/list' had no answer in time"),
    "prints garbage alone": (
        "def initialize(message):\n    put('Listening on port 80'); time.sleep(600)",
        "it writes 'Listening on port 80'",
    ),
    "dies at start": ("def initialize(message): sys.exit('no key')", r"no key \(it ended with exit code 1\)"),
    "is killed in tools/list": ("def tools(message): os.kill(os.getpid(), 9)", "it ended with exit code -9"),
    "closes stdout": ("def tools(message):\n    os.close(1); time.sleep(600)", "it closed its standard output"),
    "refuses": (
        "def initialize(message): put(json.dumps({'id': message['id'], 'error': {'message': 'go\\naway'}}))",
        "go away",
    ),
    "an error of no object": (
        "def tools(message): put(json.dumps({'id': message['id'], 'error': [1]}))",
        r"cannot be started: \[1\]",
    ),
    "a result of no object": (
        "def tools(message): answer(message, [ADD])",
        "the result of tools/list is not an object",
    ),
    "tools that are no list": (
        "def tools(message): answer(message, {'tools': ADD})",
        "its list of tools is not a list",
    ),
    "an endless line": (
        "def initialize(message):\n    while True: sys.stdout.write('x' * 65536)",
        "wrote a line of over 16,777,216 bytes",
    ),
    "megabytes of tools": (
        "def tools(message): answer(message, {'tools': [{**ADD, 'name': f't{n}', 'description': 'x' * 9999}"
        " for n in range(200)]})",
        "its tools have over 1,048,576 bytes",
    ),
    "wrong ids": (
        "def initialize(message):\n"
        "    for each in (0, '1', True, 1.5, None, [1], {}, 2**70): answer({'id': each}, {})\n"
        "    time.sleep(600)",
        "'initialize' had no answer in time",
    ),
    "reads nothing": ("time.sleep(600)", "'initialize' had no answer in time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_cannot_be_used_is_one_line(case: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, complaint = REFUSED[case]
    monkeypatch.setattr(ours, "START_TIMEOUT_S", 1.0 if "in time" in complaint or "writes" in complaint else 60.0)
    command = server(functions)
    with pytest.raises(RequestError, match=complaint) as refused, mcp_tools(command):
        pass
    line = str(refused.value)
    assert line.startswith(f"the MCP server {command!r:.200} cannot be started") and "\n" not in line


USED = {
    "garbage between the messages": (
        "def call(message):\n"
        "    for line in ('', 'log', '{', '[]', '1', 'null', '{}', '\\udcff', '[' * 100000, '9' * 5000, '[[1], 2]'):\n"
        "        sys.stdout.buffer.write(line.encode(errors='surrogateescape') + b'\\r\\n')\n"
        "    sys.stdout.flush(); text(message, '8')"
    ),
    "notifications and requests of its own": (
        "got = []\n"
        "def call(message):\n"
        "    put(json.dumps({'method': 'notifications/message', 'params': 3}))\n"
        "    put(json.dumps({'id': 'p', 'method': 'ping'}))\n"
        "    put(json.dumps({'id': 1, 'method': 'sampling/createMessage', 'params': {}}))\n"
        "    pong, refused = (json.loads(sys.stdin.readline()) for _ in range(2))\n"
        "    assert pong == {'jsonrpc': '2.0', 'id': 'p', 'result': {}}, pong\n"
        "    assert refused['id'] == 1 and refused['error']['code'] == -32601\n"
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
    "messages in a list": (
        "def call(message): put(json.dumps([3, {'id': message['id'], 'result': {'content': [{'text': '8'}]}}]))"
    ),
    "odd parts": (
        "def call(message): answer(message, {'content': [{'type': 'text', 'text': '8'}], 'isError': None, 'x': 1})"
    ),
    "structured content alone": ("def call(message): answer(message, {'content': [], 'structuredContent': 8})"),
    "ignores the end of its input": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef at_end(): time.sleep(600)"),
    "leaves children": (
        "child = subprocess.Popen(['sleep', '600'], stdout=sys.stderr)\n"
        "open(os.environ['PIDS'], 'a').write(f'{child.pid}\\n')"
    ),
}


@pytest.mark.parametrize("case", USED)
def test_a_server_with_bad_manners_is_used(case: str, server: Server) -> None:
    said: list[str] = []
    with mcp_tools(server(USED[case]), said.append) as tools:
        box = Toolbox(tools)
        assert box.run(ToolCall("add", {"a": 7})) == "8"
    assert said == []


FAILS = {
    "dies": ("def call(message): sys.exit('broken')", ": broken (it ended with exit code 1)"),
    "closes stdout": ("def call(message):\n    os.close(1); time.sleep(600)", "closed its standard output"),
    "hangs": ("def call(message): time.sleep(600)", ": 'tools/call' had no answer in time, 1 s"),
    "reads no more": (
        "def tools(message):\n    answer(message, {'tools': [ADD]}); time.sleep(600)",
        "had no answer in time",
    ),
    "a line too long": (
        "def call(message):\n    while True: sys.stdout.write('x' * 65536)",
        "a line of over 16,777,216 bytes",
    ),
    "content of no list": ("def call(message): answer(message, {'content': 3})", ""),
    "parts of no object": (
        "def call(message): answer(message, {'content': [1, {'type': [], 'text': 4}]})",
        "[None, which is not text]\n[[], which is not text]",
    ),
    "an error of the tool": (
        "def call(message): answer(message, {'content': [{'text': 'no'}], 'isError': 1})",
        "error: no",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_call_that_fails_is_an_error_for_the_model(
    case: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions, complaint = FAILS[case]
    monkeypatch.setattr(ours, "CALL_TIMEOUT_S", 1.0 if "in time" in complaint else 60.0)
    with mcp_tools(server(functions)) as tools:
        box = Toolbox(tools)
        for argument in (1, "x" * 300_000):  # more than a pipe holds
            result = box.run(ToolCall("add", {"a": argument}))
            assert complaint in result and (not complaint.startswith(":") or ": the MCP server " in result)
            assert result.count("\n") == complaint.count("\n")


TOOLS = {
    "a schema that is no object": (
        "[ADD, {'name': 'odd', 'inputSchema': [1]}]",
        "tool 'odd': its inputSchema is not an",
    ),
    "a tool that is no object": ("[ADD, 3]", "a tool that is not an object: 3"),
    "a tool without a name": ("[{}, ADD]", "a tool needs a name"),
    "a name with spaces": ("[ADD, {'name': 'a b\\x1b'}]", "a name is 1 to 128 of the characters"),
    "two of one name": ("[ADD, ADD]", "a second tool 'add'"),
    "half a surrogate pair": ("[ADD, {'name': 'odd', 'description': '\\ud800'}]", "half a surrogate pair"),
    "not a number": ("[ADD, {'name': 'odd', 'inputSchema': {'default': float('nan')}}]", "'odd': it must be JSON"),
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
    "{'type': 'object', 'properties': [1]}", "{'type': 'object', 'properties': {}, 'required': 7}",
    "{'type': 'string'}", "{'type': 3}", "{'properties': [1]}", "{'properties': {'a': 3}}", "{'properties': None}",
    "{'required': 'a', 'properties': {'a': {}}}", "{'required': [1, None, ['a']], 'properties': {'a': {}}}",
    "{'additionalProperties': []}", "{'properties': {'a': {'enum': 3, 'type': [3]}}}", "{'$ref': '#'}", "{'enum': [1]}",
    "{'properties': {'a': {'minimum': -2**63, 'type': 'integer', 'maximum': -2**63}}}", "{'anyOf': 'x'}",
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


@pytest.mark.parametrize(
    ("page", "count", "complaint"),
    [
        ("{'tools': [tool], **({'nextCursor': str(at + 1)} if at < 4 else {})}", 5, None),
        (
            "{'tools': [tool], 'nextCursor': str(at + 1)}",
            100,
            "left out the pages of tools after 100, which have no end",
        ),
        ("{'tools': [tool], 'nextCursor': 'same'}", 2, "left out the pages of tools after 2, which have no end"),
        ("{'tools': [tool], 'nextCursor': 7}", 1, "left out the pages of tools after 1"),
        ("{'tools': [tool], 'nextCursor': ''}", 1, None),
    ],
)
def test_pages_of_tools(page: str, count: int, complaint: str | None, server: Server) -> None:
    said: list[str] = []
    functions = f"""
at = -1
def tools(message):
    global at
    at += 1
    tool = {{**ADD, "name": f"t{{at}}"}}
    assert message["params"].get("cursor", "same") in (str(at), "same")
    answer(message, {page})
"""
    with mcp_tools(server(functions), said.append) as tools:
        assert len(tools) == count
    assert [complaint is not None and complaint in line for line in said] == [True] * (complaint is not None)
