"""`python -m phi4_mlx.bridge --jsonl` as a process: requests and events, cancellation, bad lines, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx import bridge
from tests.conftest import ROOT

BRIDGE = [sys.executable, "-m", "phi4_mlx.bridge", "--jsonl"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
ASK = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": 3_000, "schema": {"type": "string", "minLength": 2_000}}  # long enough to be cancelled
Events = list[dict[str, Any]]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint(max_position_embeddings=2**13, original_max_position_embeddings=2**12))


def answered(*lines: Any, arguments: tuple[str, ...] = (), code: int = 0) -> tuple[Events, str]:
    """The events of a whole session, and its standard error."""
    stdin = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    done = subprocess.run(
        [*BRIDGE, *arguments], input=stdin, capture_output=True, timeout=120, cwd="/", env=ENVIRONMENT
    )
    assert done.returncode == code, done.stderr.decode()
    assert done.stdout.isascii() and (not done.stdout or done.stdout.endswith(b"\n"))
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode()


def of(events: Events, name: Any) -> Events:
    return [event for event in events if event["id"] == name]


def test_requests_wait_for_one_another_and_the_end_of_input_for_them(model: str) -> None:
    events, errors = answered(
        {"id": 1, "do": "load", "name": model},
        {"id": "a", "do": "chat", "messages": ASK, "max_tokens": 8},
        {"id": "b", "do": "complete", "prompt": "once", "max_tokens": 8},
        {"id": 2, "do": "count_tokens", "text": "a"},
        {"id": 3, "do": "use_adapter"},
        {"id": 4, "do": "version"},
        {"id": 5, "do": "unload"},
        {"id": 6, "do": "chat", "messages": ASK},
    )
    assert errors == ""
    order = [event["id"] for event in events]
    assert order == sorted(order, key=[1, "a", "b", 2, 3, 4, 5, 6].index)
    assert of(events, 1) == [{"id": 1, "event": "finish", "model": 1, "context": 2**13}]
    for name in "ab":
        *tokens, finish = of(events, name)
        assert finish["event"] == "finish" and "".join(event["text"] for event in tokens) == finish["text"]
    assert [of(events, name)[0]["event"] for name in (2, 3, 4, 5, 6)] == [*["finish"] * 4, "error"]
    assert of(events, 2)[0]["tokens"] == 1 and isinstance(of(events, 4)[0]["version"], str)

    loaded, _ = answered({"id": "a", "do": "chat", "messages": ASK, "max_tokens": 8}, arguments=("--model", model))
    assert loaded == of(events, "a")


def test_bad_lines_are_answered_and_do_no_harm(model: str) -> None:
    bad = [
        b"{\n", b"\xff\n", b"5\n", b"[]\n", b"null\n", b"[" * 100_000 + b"\n", {}, {"id": None, "do": "version"},
        {"id": True, "do": "version"}, {"id": [], "do": "version"}, {"id": {}, "do": "version"}, {"cancel": []},
        {"cancel": "never heard of"},
    ]  # fmt: skip
    named = [
        {"id": 1}, {"id": 2, "do": "nope"}, {"id": 3, "do": []}, {"id": 4, "do": "next_event"},
        {"id": 5, "do": "chat"}, {"id": 6, "do": "load"}, {"id": 7, "do": "load", "name": "x", "y": 1},
        {"id": 8, "do": "chat", "messages": 5}, {"id": 9, "do": "chat", "model": "x", "messages": ASK},
        {"id": 10, "do": "chat", "messages": ASK, "nope": 1}, {"id": 11, "do": "load", "name": "no/such/folder/x"},
        {"id": 12, "do": "complete", "prompt": None}, {"id": 13, "do": "count_tokens", "text": 5},
    ]  # fmt: skip
    last = {"id": "last \ud800 é", "do": "complete", "prompt": "x", "max_tokens": 1}
    events, _ = answered(*bad, b"\n", *named, last, arguments=("--model", model))
    nameless = of(events, None)
    # The two cancellations have no answer.
    assert len(nameless) == len(bad) - 2 and all(event["event"] == "error" for event in nameless)
    for number in range(1, len(named) + 1):
        (event,) = of(events, number)
        assert event["event"] == "error" and event["code"] and event["message"], number
    assert of(events, "last \ud800 é")[-1]["event"] == "finish"


def test_a_line_that_is_too_long(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from phi4_mlx.bridge import __main__ as bridge_lines; bridge_lines.MAX_LINE = 50;"
        "sys.exit(bridge_lines.main(['--jsonl']))"
    )
    lines = b'{"id": 1, "do": "version", "x": "' + b"y" * 200 + b'"}\n{"id": 2, "do": "version"}\n'
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, timeout=60, env=ENVIRONMENT)
    first, second = map(json.loads, done.stdout.splitlines())
    assert "longer than 50 bytes" in first["message"] and second["id"] == 2 and done.returncode == 0


class Session:
    """A bridge process: requests in, events out, line by line."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [*BRIDGE, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=ENVIRONMENT, text=True, **options,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def send(self, request: dict[str, Any]) -> None:
        self.stdin.write(json.dumps(request) + "\n")
        self.stdin.flush()

    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.stdout.readline())
        return event

    def until(self, name: Any, *kinds: str) -> dict[str, Any]:
        while (event := self.event())["id"] != name or event["event"] not in kinds:
            pass
        return event


@pytest.fixture
def session(model: str) -> Iterator[Session]:
    made = Session("--model", model)
    yield made
    made.process.kill()
    made.process.wait()


def test_cancel_is_heard_while_a_request_runs(session: Session) -> None:
    for name in (1, 2, 3):
        session.send({"id": name, "do": "chat", "messages": ASK, **LONG})
    session.send({"id": 4, "do": "chat", "messages": ASK, "max_tokens": 2})
    assert session.event()["event"] == "token"
    session.send({"id": 2, "do": "version"})  # the id is in use
    assert session.until(2, "error")["message"] == "a request with the id 2 is under way"
    session.send({"cancel": 2})
    session.send({"cancel": 1})
    finish = session.until(1, "finish")
    assert finish["reason"] == "cancelled" and 0 < finish["answer_tokens"] < 3_000
    assert session.until(2, "token", "finish")["reason"] == "cancelled"  # before its first token
    session.until(3, "token")
    session.send({"cancel": 3})
    assert session.until(3, "finish")["reason"] == "cancelled"
    assert session.until(4, "finish")["reason"] in ("stop", "length")
    session.send({"id": 2, "do": "version"})  # the id is free again
    assert session.until(2, "finish")
    session.stdin.close()
    assert session.process.wait(60) == 0


def test_nothing_but_events_is_on_standard_output(model: str) -> None:
    code = (
        "import os, sys; from phi4_mlx import bridge; from phi4_mlx.bridge import __main__ as bridge_lines\n"
        "made = bridge.version\n"
        "def noisy():\n    print('python says'); os.write(1, b'C says\\n'); return made()\n"
        "bridge.version = noisy; sys.exit(bridge_lines.main(['--jsonl']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=b'{"id": 1, "do": "version"}', capture_output=True, timeout=60,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1]
    assert b"python says" in done.stderr and b"C says" in done.stderr


def test_it_ends_when_its_reader_leaves(session: Session) -> None:
    session.send({"id": 1, "do": "chat", "messages": ASK, **LONG})
    session.event()
    session.stdout.close()
    assert session.process.wait(60) == 141  # its standard input is still open


def test_ctrl_c_ends_it(session: Session) -> None:
    session.send({"id": 1, "do": "chat", "messages": ASK, **LONG})
    session.event()
    session.process.send_signal(2)
    assert session.process.wait(60) == 130


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "no-such-folder"), "neither a folder nor a Hub id"),
        (("--adapter-path", "x"), "--adapter-path needs --model"),
        (("--nope",), "unrecognized arguments"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    events, errors = answered(arguments=arguments, code=2)
    assert events == [] and complaint in errors and errors.count("\n") == 1


def test_jsonl_is_required() -> None:
    done = subprocess.run([*BRIDGE[:-1]], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 2 and "--jsonl" in done.stderr


def test_the_examples_run() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "bridge.py"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "finish: stop" in done.stdout and done.stdout.endswith("The answer is 372.\n")
    swift = (ROOT / "examples" / "bridge.swift").read_text()  # type-checked by test_swift.py
    used = set(re.findall(r"\bbridge\.(\w+)\(", swift))
    assert used >= {"load", "start_chat", "next_event", "cancel", "chat_json", "unload"}
    assert all(callable(getattr(bridge, name)) for name in used)
