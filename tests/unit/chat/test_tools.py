"""Tool calls in the chat: shown, approved by the person, stopped, and kept as turns."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from phi4_mlx.chat.__main__ import take_turn
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.session import Chat
from phi4_mlx.chat.tools import Doorkeeper, shown_call, toolbox_of
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Toolbox
from tests.unit.chat.scripted import Script, questions, shown, type_lines

CALL = '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2}}]<|/tool_call|>'


@pytest.fixture
def ran(chat: Chat, script: Script) -> list[int]:
    """The sums that were computed, in a chat with a tool that adds and a script that calls it."""
    sums: list[int] = []

    def add(a: int, b: int) -> int:
        """Adds two numbers.

        With great care.
        """
        sums.append(a + b)
        return sums[-1]

    chat.conversation.toolbox = Toolbox([add], strict=False)
    script.replies = [f"well{CALL}", "3 it is"]
    return sums


def answering(chat: Chat, *answers: str) -> list[str]:
    """Scripts the person's answers; returns the list of questions that they are asked."""
    asked: list[str] = []
    waiting = iter(answers)

    def ask(question: str) -> str:
        asked.append(question)
        return next(waiting)

    chat.approve = Doorkeeper(ask)
    return asked


def test_calls_and_results_are_shown_and_kept(chat: Chat, script: Script, ran: list[int]) -> None:
    take_turn(chat, type_lines("how much?"))
    assert shown(chat) == "well\nadd(a=1, b=2)\n= 3\n3 it is\n\n" and ran == [3]
    chat.screen.colour = True
    script.replies = [CALL, "3"]
    take_turn(chat, type_lines("again"))
    assert "\x1b[2madd(a=1, b=2)\x1b[0m\n\x1b[2m= 3\x1b[0m\n" in shown(chat)
    (each,) = chat.conversation.turns[0].rounds
    assert each.text == "well" and each.results == ["3"] and chat.conversation.turns[0].answer == "3 it is"
    assert chat.conversation.usage.finish_reason == "stop"


@pytest.mark.parametrize(
    ("answer", "runs"), [("y\n", True), (" YES\n", True), ("n\n", False), ("\n", False), ("", False), ("yo\n", False)]
)
def test_the_person_is_asked_before_a_call(answer: str, runs: bool, chat: Chat, script: Script, ran: list[int]) -> None:
    asked = answering(chat, answer)
    take_turn(chat, type_lines("how much?"))
    assert asked == ["run it? [y/N/always] "] and bool(ran) == runs
    assert chat.conversation.turns[0].rounds[0].results == ["3" if runs else "error: refused by the user"]
    assert chat.conversation.turns[0].answer == "3 it is"


@pytest.mark.parametrize("reply", [CALL, CALL.removesuffix("]<|/tool_call|>"), f"{CALL} and then"])
def test_no_call_of_a_cut_answer_is_run_or_asked_about(
    reply: str, chat: Chat, script: Script, ran: list[int]
) -> None:
    asked = answering(chat)
    script.replies, script.finish_reason = [reply], "length"
    take_turn(chat, type_lines("how much?"))
    assert asked == ran == [] and "cut at" in shown(chat)
    assert chat.conversation.usage.finish_reason == "length"


def test_what_was_typed_before_the_question_is_no_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    person, terminal = os.openpty()
    monkeypatch.setattr("sys.stdin", os.fdopen(terminal))
    os.write(person, b"y\n")
    threading.Timer(0.5, os.write, (person, b"n\n")).start()
    assert chat.screen.ask("run it? ") == "n\n" and shown(chat) == "run it? "


def test_always_is_asked_for_each_tool_once(chat: Chat, script: Script, ran: list[int]) -> None:
    asked = answering(chat, "always\n", "n\n")
    script.replies = [CALL, CALL, "done"]
    take_turn(chat, type_lines("how much?"))
    assert len(asked) == 1 and ran == [3, 3]
    assert chat.approve is not None and not chat.approve(ToolCall("other", {}))


def test_nothing_in_a_call_is_hidden_from_the_person_who_is_asked() -> None:
    call = ToolCall("add", {"a\u202e": "x\x1b[8m\x9b\u2028", "b": ["é", "z" * 2_000]})
    line = shown_call(call)
    assert line.startswith('add(a\\u202e="x\\u001b[8m\\u009b\\u2028", b=["é", "zz') and line.endswith('zz"])')
    assert line.isprintable() and line.count("z") == 2_000


def test_ctrl_c_stops_a_tool_and_keeps_the_turn(chat: Chat, script: Script) -> None:
    def hang(x: int) -> str:
        """Hangs."""
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(500):
            time.sleep(0.01)
        return "slept"

    chat.conversation.toolbox = Toolbox([hang], strict=False)
    script.replies = ['a<|tool_call|>{"name": "hang", "arguments": {"x": 1}}', "unheard"]
    before = signal.getsignal(signal.SIGINT)
    take_turn(chat, type_lines("one"))
    assert shown(chat) == "a\nhang(x=1)\nstopped\n\n" and signal.getsignal(signal.SIGINT) is before
    (turn,) = chat.conversation.turns
    assert turn.rounds[0].results == ["error: not run: stopped"] and turn.answer == ""
    script.replies = ["next"]
    take_turn(chat, type_lines("two"))
    assert questions(chat) == ["one", "two"] and "next" in shown(chat)


def test_undo_retry_save_and_load_with_calls(chat: Chat, script: Script, ran: list[int]) -> None:
    chat.answer("how much?")
    before = list(chat.conversation.turns)
    obey(chat, "/save talk")
    obey(chat, "/reset")
    obey(chat, "/load talk")
    (turn,) = chat.conversation.turns
    assert (turn.question, turn.answer, turn.rounds[0].results) == ("how much?", "3 it is", ["3"])
    assert turn.rounds[0].calls == before[0].rounds[0].calls
    script.replies = [CALL, "three"]
    obey(chat, "/retry")
    assert [turn.answer for turn in chat.conversation.turns] == ["three"] and ran == [3, 3]
    obey(chat, "/undo")
    assert questions(chat) == []


def test_tools_are_listed(chat: Chat, ran: list[int]) -> None:
    obey(chat, "/tools")
    assert shown(chat) == "add(a, b)  Adds two numbers.\n\n"
    chat.conversation.toolbox = Toolbox()
    obey(chat, "/tools")
    assert "there are none; --tools FILE.py" in shown(chat)


def test_a_model_that_only_calls_is_stopped(chat: Chat, script: Script, ran: list[int]) -> None:
    script.replies = [CALL] * 10
    take_turn(chat, type_lines("how much?"))
    assert len(ran) == 7 and "the last calls were not run" in shown(chat)


def test_what_calls_may_break_is_said_once_on_standard_error(tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    unique = {"n": {"type": "array", "uniqueItems": True}}
    tool = {"name": "search", "inputSchema": {"type": "object", "properties": unique}}
    info = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
    server = tmp_path / "server.py"
    server.write_text(f"""
import json, sys
answers = {{"initialize": {info}, "tools/list": {{"tools": [{tool}, {{**{tool}, "name": "a b"}}]}}}}
for line in sys.stdin:
    message = json.loads(line)
    if message.get("method") in answers:
        answer = {{"jsonrpc": "2.0", "id": message["id"], "result": answers[message["method"]]}}
        print(json.dumps(answer), flush=True)
""")
    args = argparse.Namespace(tools=[], mcp=[f"{sys.executable} {server}"], allow_tools=True)
    said: list[str] = []
    with toolbox_of(args, False, said.append) as toolbox:
        assert [each["function"]["name"] for each in toolbox.declarations] == ["search"] and toolbox.strict
    left_out, loosened = said
    assert "left out tool 'a b': a name is" in left_out
    assert "tool 'search'" in loosened and "uniqueItems" in loosened and "\n" not in loosened
