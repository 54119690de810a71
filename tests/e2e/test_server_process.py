"""The server's processes: restarts, signals, mistakes on the command line, and adapters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import mlx.core as mx
import pytest

from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.checkpoint import load
from tests.adapters import save_adapter
from tests.conftest import ROOT
from tests.e2e.server_process import ENDLESS, HANG_S, Server, alive, chat, events, send, serving, until


def test_a_killed_engine_is_replaced_while_the_server_serves() -> None:
    with serving("--decode-concurrency", "4") as server:
        body = chat(stream=True, **ENDLESS)
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=HANG_S) as stream:
            told = events(stream)
            next(told)
            next(told)
            old = server.engine
            os.kill(old, signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: server.get("/health").json()["status"] == "restarting")
            assert server.get("/health").status_code in (200, 503)
            assert server.ask().status_code == 200  # after a wait for the new engine
            assert time.monotonic() - killed < 5 * server.start_s  # no pause before the first restart
            last = list(told)[-1]
        assert last["error"]["type"] == "overloaded_error" and "ask again" in last["error"]["message"]
        health = server.get("/health")
        assert health.status_code == 200 and health.json() == {"status": "ok", "restarts": 1, "jobs": 0}
        assert server.engine != old and server.metrics()["engine_restarts_total"] == 1


def test_sigterm_lets_running_answers_end() -> None:
    server = Server()
    engine = server.engine
    with httpx.stream(
        "POST",
        server.url + "/v1/chat/completions",
        json=chat(stream=True, **(ENDLESS | {"max_tokens": 150})),
        timeout=HANG_S,
    ) as stream:
        told = events(stream)
        for _ in range(3):
            next(told)
        server.process.send_signal(signal.SIGTERM)
        rest = list(told)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(HANG_S) == 0  # systemd and launchd take this for a clean stop
    until(lambda: not alive(engine))
    with pytest.raises(httpx.ConnectError):
        server.get("/health")
    assert not any("Traceback" in line for line in server.lines)


def test_no_engine_is_left_behind_by_a_server_that_is_killed() -> None:
    server = Server()
    engine = server.engine
    connection = server.raw()
    send(connection, "/v1/chat/completions", json.dumps(chat(**ENDLESS)))
    until(lambda: server.metrics()["answers_under_way"] == 1)
    server.process.kill()
    server.process.wait()
    until(lambda: not alive(engine))
    connection.close()


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = (sys.executable, "-m", "phi4_mlx.server", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG_S, env=env)


def broken_model(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((ROOT / "phi4_mlx" / "demo" / name).read_bytes())
    return folder


@pytest.mark.slow
def test_mistakes_are_one_line_and_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in [
            (["--model", "demo", "--port", str(port)], "choose another --port"),
            (["--model", "none/such", "--port", "0"], "none/such"),
            (["--model", str(broken_model(tmp_path)), "--port", "0"], "model.safetensors"),
            (["--model", "demo", "--port", "0", "--adapters", str(tmp_path / "nowhere")], "nowhere"),
            (["--model", "demo", "--port", "0", "--adapters", str(tmp_path)], "adapter_config.json"),
            (["--model", "demo", "--host", "0.0.0.0"], "--api-key"),
            (["--model", "demo", "--port", "70000"], "--port"),
            (["--model", "demo-flash", "--port", "0", "--kv-bits", "8"], "phi4flash"),
            (["--model", "demo-flash", "--port", "0", "--speculate", "lookup"], "phi4flash"),
            (["--model", "demo", "--port", "0", "--speculate", "off", "--draft-model", "demo"], "--draft-model"),
        ]:
            done = run_command(*words)
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert message in done.stderr.splitlines()[-1], done.stderr


def test_adapters_are_those_of_one_folder_by_name(tmp_path: Path) -> None:
    model, _ = load("demo")
    add_adapter(model, rank=2)
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    for folder in ("allowed/mine", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        save_adapter(model, tmp_path / folder, {})
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "allowed" / "empty").mkdir()
    with serving("--adapters", str(tmp_path / "allowed")) as server:
        assert [it["id"] for it in server.get("/v1/models").json()["data"]] == ["demo", "mine"]
        asked = {"temperature": 0, "max_tokens": 20}
        base, mine = (server.ask(model=name, **asked).json()["choices"][0]["message"] for name in ("demo", "mine"))
        assert base["content"] != mine["content"]
        for name in ("link", "empty", "../outside", "mine/../mine", str(tmp_path / "outside"), "mine\0"):
            assert server.ask(model=name, **asked).status_code == 404
