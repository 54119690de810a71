"""The server's tools and its log, as a process: a key that tools do not get, MCP servers that die, and the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.server_process import HANG_S, Server, alive, hear_hangups, until

TOOLS = '''
import os

def key(x: int = 0) -> str:
    """Tells the key."""
    return str(os.environ.get("PHI4_MLX_API_KEY"))

def shout(text: str) -> str:
    """Shouts."""
    return text.upper()
'''

# It ignores the end of its input and SIGTERM.
STUBBORN = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
time.sleep(float(os.environ.get("SLOW", 0)))
TOOL = {"name": "next", "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
INFO = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
for line in sys.stdin:
    message = json.loads(line)
    arguments = message.get("params", {}).get("arguments", {})
    if arguments.get("a") == 13:
        sys.exit("broken")
    text = f"{arguments.get('a', 0) + 1} {os.environ.get('PHI4_MLX_API_KEY')}"
    results = {"initialize": INFO, "tools/list": {"tools": [TOOL]}, "tools/call": {"content": [
        {"type": "text", "text": text}]}}
    if message.get("method") in results:
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": results[message["method"]]}), flush=True)
time.sleep(600)
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pytest.importorskip("mcp")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    command = f"{sys.executable} '{tmp_path / 'stubborn.py'}'"
    return ["--tools", str(tmp_path / "tools.py"), "--mcp", command]


def mcp_servers(folder: Path) -> list[int]:
    pids = folder / "pids"
    return [int(line) for line in pids.read_text().split()] if pids.exists() else []


def call(server: Server, name: str, **arguments: object) -> str:
    answer = server.post("/tools/call", {"name": name, "arguments": arguments}, headers={"x-api-key": "k3y"})
    assert answer.status_code == 200, answer.text
    content = answer.json()["content"]
    assert isinstance(content, str) and answer.json()["is_error"] == content.startswith("error: ")
    return content


def test_tools_and_the_log_from_the_start_to_the_end(options: list[str], tmp_path: Path) -> None:
    server = Server(*options, env={"PHI4_MLX_API_KEY": "k3y"})
    engine, (mcp,) = server.engine, mcp_servers(tmp_path)
    listed = server.get("/tools", headers={"x-api-key": "k3y"}).json()["data"]
    assert [tool["function"]["name"] for tool in listed] == ["key", "shout", "next"]
    assert server.get("/tools").status_code == 401 and server.get("/").status_code == 200
    assert call(server, "shout", text="my words") == "MY WORDS"
    assert call(server, "key") == "None" and call(server, "next", a=4) == "5 None"  # the server's key is not theirs
    body = {"messages": [{"role": "user", "content": "my words"}], "max_tokens": 3}
    assert server.post("/v1/chat/completions", body, headers={"x-api-key": "k3y"}).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(HANG_S) == 0 and not alive(mcp)
    until(lambda: not alive(engine))
    server.stop()
    text = "".join(server.lines)
    loading, summary, listening, *requests, stopped = server.lines
    assert loading == "phi4-mlx server: loading demo\n" and stopped == "phi4-mlx server: stopped by SIGTERM\n"
    facts = "demo (demo), context 4,096 tokens; clients must send the key; tools for the page: key, shout, next"
    assert facts in summary
    assert listening.endswith(f" are listening on {server.url}\n") and "k3y" not in text and "words" not in text.lower()
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) 127\.0\.0\.1 (GET|POST) /\S* \d{3} total_s=\d+\.\d{3}.*\n"
    assert len(requests) == 7 and all(re.fullmatch(pattern, line) for line in requests), text
    assert "model=demo stream=no" in requests[-1] and "answer_tokens=" in requests[-1]


def test_an_mcp_server_that_dies_is_an_error_of_its_calls_alone(options: list[str], tmp_path: Path) -> None:
    server = Server(*options)
    try:
        for a in (13, 1):
            content = call(server, "next", a=a)
            assert "the MCP server" in content and "Connection closed" in content and content.startswith("error: ")
        assert call(server, "shout", text="a") == "A" and server.ask().status_code == 200
    finally:
        server.stop()
    assert not any(alive(pid) for pid in mcp_servers(tmp_path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("when", ["starts", "serves"])
def test_a_signal_at_any_time_leaves_no_mcp_server_behind(
    when: str, number: signal.Signals, code: int, options: list[str], tmp_path: Path
) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "SLOW": "600" if when == "starts" else "0"}
    words = [sys.executable, "-m", "phi4_mlx.server", "--model", "demo", "--port", "0", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=hear_hangups) as process:
        assert process.stderr is not None
        until(lambda: mcp_servers(tmp_path))
        if when == "serves":
            while "listening" not in process.stderr.readline():
                pass
        time.sleep(0.2)
        process.send_signal(number)
        told = process.stderr.read()
        assert process.wait(HANG_S) == (0 if when == "serves" and number != signal.SIGINT else code), told
    assert "Traceback" not in told
    until(lambda: not any(alive(pid) for pid in mcp_servers(tmp_path)))


def test_nohup_keeps_the_server_and_its_mcp_servers(options: list[str], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = Server(*options)
    finally:
        signal.signal(signal.SIGHUP, before)
    server.process.send_signal(signal.SIGHUP)
    assert call(server, "next", a=1).startswith("2 ") and server.ask().status_code == 200
    server.stop()
    assert not any(alive(pid) for pid in mcp_servers(tmp_path))


def test_an_engine_knows_nothing_of_tools() -> None:
    """Neither the engine nor the start of the command pays for them."""
    for module, others in (("engine.engine", ("toolbox", "sources", "mcp")), ("__main__", ("toolbox", "sources"))):
        code = f"import sys, phi4_mlx.server.{module}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
        names = done.stdout.split()
        assert f"phi4_mlx.server.{module}" in names, done.stderr
        assert not {"mcp", *(f"phi4_mlx.tools.{other}" for other in others)} & set(names)
        assert module != "__main__" or not {"uvicorn", "starlette", "mlx"} & set(names)
