"""The chat without a terminal: commands, notes, what Ctrl-C does, what a closed terminal leaves behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import agent
from phi4_mlx.chat import conversation, transcript
from phi4_mlx.chat.__main__ import HungUp, _take_turn, _talk
from phi4_mlx.chat.commands import COMMANDS, Leave, is_command, obey
from phi4_mlx.chat.session import Chat, rescued_file
from phi4_mlx.chat.tools import Doorkeeper, shown_call
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse
from phi4_mlx.models.cache import PromptCache
from phi4_mlx.terminal.options import SAMPLING
from phi4_mlx.terminal.screen import Screen
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Toolbox
from tests.char_tokenizer import FIRST_CHAR, CharTokenizer


class Recorder(Screen):
    """A screen that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = True
        self.shown = ""

    def write(self, text: str) -> None:
        self.shown += text


class Script:
    """Stands in for `stream`: the replies to give, one a question, and what happens on the way."""

    def __init__(self) -> None:
        self.replies: list[str] = []
        self.finish_reason = "stop"
        self.at_token: Callable[[int], None] = lambda number: None
        self.options = DecodeOptions()
        self.prompt_length = 0

    def __call__(
        self, model: Any, tokenizer: Any, prompt: list[int], cache: PromptCache, options: DecodeOptions
    ) -> Iterator[GenerationResponse]:
        self.options = options
        self.progress(0, self.prompt_length or len(prompt))
        reply = self.replies.pop(0) if self.replies else "reply"
        for number, char in enumerate(reply, 1):
            self.at_token(number)
            reason = self.finish_reason if number == len(reply) else None
            token = FIRST_CHAR + ord(char)
            yield GenerationResponse(char, token, mx.zeros(1), len(prompt), 1.0, number, 1.0, 0.1, 0, reason)

    def progress(self, done: int, total: int) -> None:
        """Reports the progress of a prefill, as generation does."""
        assert self.options.prompt_progress_callback is not None
        self.options.prompt_progress_callback(done, total)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(agent, "stream", made)
    return made


@pytest.fixture
def chat(tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    settings = {name: default for name, (_, default, _) in SAMPLING.items()} | {"max-tokens": 100}
    made = Chat(Recorder(), settings, person=True)
    made.conversation = conversation.Conversation(tiny_model(), CharTokenizer())  # type: ignore[arg-type]
    made.model_name = "demo"
    return made


def shown(chat: Chat) -> str:
    assert isinstance(chat.screen, Recorder)
    text, chat.screen.shown = chat.screen.shown, ""
    return text


def type_lines(*lines: str | type[BaseException]) -> Callable[[], str]:
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    return read


def questions(chat: Chat) -> list[str]:
    return [turn.question for turn in chat.conversation.turns]


@pytest.mark.parametrize("line", ["/help", "/", "/nope", "/set temp 1"])
def test_a_word_after_a_slash_is_a_command(line: str) -> None:
    assert is_command(line)


@pytest.mark.parametrize("line", ["/etc/hosts is what?", " /help", "//", "1/2", "", "hello /help", "/Users"])
def test_other_slashes_are_text(line: str) -> None:
    assert not is_command(line)


def test_help_lists_every_command(chat: Chat) -> None:
    obey(chat, "/help")
    text = shown(chat)
    assert all(f"/{name}" in text for name in COMMANDS)


def test_an_unknown_command_costs_a_line(chat: Chat, script: Script) -> None:
    _take_turn(chat, type_lines("/hlep"))
    assert shown(chat) == "/hlep is not a command; /help lists them; a space before the slash makes it a message\n\n"
    assert questions(chat) == []


def test_a_question_is_answered_and_kept(chat: Chat, script: Script) -> None:
    script.replies = ["Good day."]
    _take_turn(chat, type_lines("hello"))
    assert shown(chat).startswith("Good day.\n")
    assert questions(chat) == ["hello"] and chat.conversation.turns[0].answer == "Good day."
    _take_turn(chat, type_lines("  \n"))  # nothing was asked
    assert questions(chat) == ["hello"]


def test_a_cut_answer_says_how_to_get_more(chat: Chat, script: Script) -> None:
    script.finish_reason = "length"
    _take_turn(chat, type_lines("hello"))
    assert "cut at 5 tokens; /set max-tokens N" in shown(chat)


@pytest.mark.parametrize("colour", [False, True])
def test_the_model_cannot_steer_the_terminal(colour: bool, chat: Chat, script: Script) -> None:
    chat.screen.colour = colour
    script.replies = ["a\x1b[2Jb\x07\x9bc\rd"]
    _take_turn(chat, type_lines("hello"))
    assert shown(chat).removeprefix("\x1b[0m").startswith("a[2Jbcd\n")


def test_system_reset_undo_retry(chat: Chat, script: Script) -> None:
    read = type_lines("/system be brief", "one", "two", "/undo", "/retry", "/system", "/system -", "/reset", "/undo")
    for _ in range(3):
        _take_turn(chat, read)
    assert chat.conversation.system == "be brief" and questions(chat) == ["one", "two"]
    _take_turn(chat, read)
    assert questions(chat) == ["one"]
    script.replies = ["second thoughts"]
    _take_turn(chat, read)
    assert questions(chat) == ["one"] and chat.conversation.turns[0].answer == "second thoughts"
    assert "temp is 0" in shown(chat)
    _take_turn(chat, read)
    assert "be brief" in shown(chat)
    _take_turn(chat, read)
    assert chat.conversation.system is None
    _take_turn(chat, read)
    assert questions(chat) == []
    _take_turn(chat, read)
    assert "there is no turn yet" in shown(chat)


def test_a_retry_stopped_before_its_first_token_keeps_the_old_answer(chat: Chat, script: Script) -> None:
    chat.answer("one")
    script.replies = [""]  # no token came
    obey(chat, "/retry")
    assert [turn.answer for turn in chat.conversation.turns] == ["reply"]


def test_save_and_load(chat: Chat, script: Script, tmp_path: Path) -> None:
    obey(chat, "/system be brief")
    chat.answer("one")
    obey(chat, "/save talk")
    saved = (tmp_path / "talk.json").read_text()
    chat.answer("two")
    obey(chat, "/save talk")  # the same conversation, gone on
    assert (tmp_path / "talk.json").read_text() != saved
    obey(chat, "/reset")
    with pytest.raises(RequestError, match="exists"):  # another conversation
        obey(chat, "/save talk")
    (tmp_path / "talk.json").rename(tmp_path / "renamed")
    obey(chat, "/load renamed")
    assert questions(chat) == ["one", "two"] and chat.conversation.system == "be brief"
    chat.answer("three")


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("/ reset", "is not a command"),
        ("/save", "needs the name of a file"),
        ("/save ~nobody/talk", "No such file"),
        ("/save no/such/folder/x", "No such file or directory"),
        ("/save a\0b", "null"),
        ("/load", "needs the name of a file"),
        ("/load nothing", "No such file or directory"),
        ("/load broken.json", "is not JSON"),
        ("/set temp nan", "temp: 'nan' is not a number from 0 to 100"),
        ("/set max-tokens 0", "max-tokens: '0' is not a whole number from 1 to"),
        ("/set seed -1", "seed: '-1' is not a whole number from 0 to"),
        ("/set top-p 1.5", "top-p: '1.5' is not a number from 0 to 1"),
        ("/set temp", "/set temp needs a value"),
        ("/set colour blue", "'colour' cannot be set; these can: temp, top-p"),
        ("/model no-such-folder", "neither a folder nor a Hub id"),
    ],
)
def test_a_mistake_costs_a_line_and_nothing_else(
    typed: str, complaint: str, chat: Chat, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("{")
    chat.answer("one")
    settings, shown_before = dict(chat.settings), shown(chat)
    assert shown_before
    _take_turn(chat, type_lines(typed))
    line = shown(chat)
    assert complaint in line and "\n" not in line.strip()
    assert questions(chat) == ["one"] and chat.settings == settings and chat.model_name == "demo"


def test_set_shows_and_changes_and_goes_back(chat: Chat, script: Script) -> None:
    obey(chat, "/set\tmax-tokens  7 ")
    chat.answer("one")
    assert script.options.max_tokens == 7
    obey(chat, "/set max-tokens -")
    assert chat.settings["max-tokens"] == 100
    sampler = chat.decode_options().sampler
    assert chat.decode_options().sampler is sampler  # a seed goes on from answer to answer
    obey(chat, "/set temp 0.5")
    assert chat.decode_options().sampler is not sampler
    shown(chat)
    obey(chat, "/set")
    listed = shown(chat)
    assert all(name in listed for name in SAMPLING)


def test_stats_tell_what_an_answer_cost(chat: Chat, script: Script) -> None:
    obey(chat, "/stats")
    assert "in 0 turns" in shown(chat)
    chat.answer("one")
    shown(chat)
    chat.conversation.usage.reprefilled = 4097
    obey(chat, "/stats")
    text = shown(chat)
    assert "in 1 turn\n" in text and "from the cache" in text and "tokens/s" in text and "RoPE table" in text
    assert "4,097 tokens were run again" in text


def test_another_model_goes_on_with_the_conversation(
    chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
) -> None:
    import phi4_mlx.checkpoint

    chat.answer("one")
    other = tiny_model(seed=1)
    monkeypatch.setattr(phi4_mlx.checkpoint, "load", lambda name, **options: (other, CharTokenizer()))
    obey(chat, "/model other")
    assert chat.conversation.model is other and questions(chat) == ["one"] and chat.model_name == "other"


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat: Chat, script: Script) -> None:
    script.replies = ["a long answer", "next"]
    script.at_token = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 3 else None
    before = signal.getsignal(signal.SIGINT)
    _take_turn(chat, type_lines("one"))
    assert chat.conversation.turns[0].answer == "a l"
    assert shown(chat) == "a l\nstopped\n\n"
    assert signal.getsignal(signal.SIGINT) is before
    script.at_token = lambda number: None
    _take_turn(chat, type_lines("two"))
    assert questions(chat) == ["one", "two"]


def test_ctrl_c_twice_does_not_wait_for_a_token(chat: Chat, script: Script) -> None:
    def press_twice(number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    script.at_token = press_twice
    _take_turn(chat, type_lines("one"))
    assert "Ctrl-D leaves" in shown(chat)


def test_ctrl_c_while_the_prompt_is_read(chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    reuse = chat.conversation.cache.reuse

    def press(ids: list[int]) -> list[int]:
        os.kill(os.getpid(), signal.SIGINT)
        return reuse(ids)

    monkeypatch.setattr(chat.conversation.cache, "reuse", press)
    _take_turn(chat, type_lines("one"))
    assert questions(chat) == [] and shown(chat) == "stopped\n\n"


def test_a_long_prompt_tells_how_far_it_is(chat: Chat, script: Script) -> None:
    chat.screen.colour = True
    script.prompt_length = 5000
    script.at_token = lambda number: script.progress(5000 if number == 1 else 100, 5000)
    chat.answer("one")
    before, after = shown(chat).split("\x1b[0m\r\x1b[K")  # the line is cleared again
    assert before == "\r\x1b[K\x1b[2mreading 0 of 5,000 tokens ..."
    assert "\r" not in after and "reply" in after  # a re-prefill in mid-answer does not write over it


def test_ctrl_c_at_the_prompt_says_how_to_leave(chat: Chat) -> None:
    _take_turn(chat, type_lines(KeyboardInterrupt))
    assert shown(chat) == "Ctrl-D leaves\n"


def test_the_ways_to_leave(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Leave):
        obey(chat, "/quit")
    monkeypatch.setattr("sys.stdin", os.fdopen(os.openpty()[1]))
    with pytest.raises(Leave):
        _take_turn(chat, type_lines(EOFError))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(HungUp):  # the end of input, and the terminal is not there any more
        _take_turn(chat, type_lines(EOFError))


@pytest.mark.parametrize("ending", [HungUp, OSError, ZeroDivisionError])
def test_a_closed_terminal_or_a_crash_keeps_the_conversation(
    ending: type[BaseException], chat: Chat, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Editor:
        def __init__(self, words: list[str], colour: bool) -> None:
            self.read = type_lines("one", ending)

    monkeypatch.setattr("phi4_mlx.terminal.line_editor.LineEditor", Editor)
    with pytest.raises(ZeroDivisionError if ending is ZeroDivisionError else RequestError):
        _talk(chat)
    rescued = rescued_file()
    assert transcript.load(rescued, chat.conversation.tokenizer)[1] == chat.conversation.turns

    chat.conversation.turns.clear()
    chat.greet()
    assert "/load brings it back" in shown(chat)
    obey(chat, "/load")
    assert questions(chat) == ["one"]
    chat.leave()  # on purpose, this time
    assert not rescued.exists()


# Tools.

CALL = '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2}}]<|/tool_call|>'


@pytest.fixture
def ran(chat: Chat, script: Script) -> list[int]:
    """The sums that were really computed; the chat has a tool for them, and a model that calls it."""
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
    """Lays the person's answers in their mouth; returns what they were asked."""
    asked: list[str] = []
    waiting = iter(answers)

    def ask(question: str) -> str:
        asked.append(question)
        return next(waiting)

    chat.approve = Doorkeeper(ask)
    return asked


def test_calls_and_results_are_shown_and_kept(chat: Chat, script: Script, ran: list[int]) -> None:
    _take_turn(chat, type_lines("how much?"))
    assert shown(chat) == "well\nadd(a=1, b=2)\n= 3\n3 it is\n\n" and ran == [3]
    chat.screen.colour = True
    script.replies = [CALL, "3"]
    _take_turn(chat, type_lines("again"))
    assert "\x1b[2madd(a=1, b=2)\x1b[0m\n\x1b[2m= 3\x1b[0m\n" in shown(chat)
    (each,) = chat.conversation.turns[0].rounds
    assert each.text == "well" and each.results == ["3"] and chat.conversation.turns[0].answer == "3 it is"
    assert chat.conversation.usage.finish_reason == "stop"


@pytest.mark.parametrize(
    ("answer", "runs"), [("y\n", True), (" YES\n", True), ("n\n", False), ("\n", False), ("", False), ("yo\n", False)]
)
def test_the_person_is_asked_before_a_call(
    answer: str, runs: bool, chat: Chat, script: Script, ran: list[int]
) -> None:
    asked = answering(chat, answer)
    _take_turn(chat, type_lines("how much?"))
    assert asked == ["run it? [y/N/always] "] and bool(ran) == runs
    assert chat.conversation.turns[0].rounds[0].results == ["3" if runs else "error: refused by the user"]
    assert chat.conversation.turns[0].answer == "3 it is"


def test_what_was_typed_before_the_question_is_no_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    person, terminal = os.openpty()
    monkeypatch.setattr("sys.stdin", os.fdopen(terminal))
    os.write(person, b"y\n")
    threading.Timer(0.5, os.write, (person, b"n\n")).start()
    assert chat.screen.ask("run it? ") == "n\n" and shown(chat) == "run it? "


def test_always_is_asked_for_each_tool_once(chat: Chat, script: Script, ran: list[int]) -> None:
    asked = answering(chat, "always\n", "n\n")
    script.replies = [CALL, CALL, "done"]
    _take_turn(chat, type_lines("how much?"))
    assert len(asked) == 1 and ran == [3, 3]
    assert chat.approve is not None and not chat.approve(ToolCall("other", {}))


def test_nothing_in_a_call_is_hidden_from_the_person_who_is_asked() -> None:
    call = ToolCall("add", {"a\u202e": "x\x1b[8m\x9b\u2028", "b": ["é", "z" * 2_000]})
    line = shown_call(call)
    assert line.startswith('add(a\\u202e="x\\u001b[8m\\u009b\\u2028", b=["é", "zz') and line.endswith('zz"])')
    assert line.isprintable() and line.count("z") == 2_000


def test_ctrl_c_stops_a_tool_and_keeps_what_was_said(chat: Chat, script: Script) -> None:
    def hang(x: int) -> str:
        """Hangs."""
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(500):
            time.sleep(0.01)
        return "slept"

    chat.conversation.toolbox = Toolbox([hang], strict=False)
    script.replies = ['a<|tool_call|>{"name": "hang", "arguments": {"x": 1}}', "unheard"]
    before = signal.getsignal(signal.SIGINT)
    _take_turn(chat, type_lines("one"))
    assert shown(chat) == "a\nhang(x=1)\nstopped\n\n" and signal.getsignal(signal.SIGINT) is before
    (turn,) = chat.conversation.turns
    assert turn.rounds[0].results == ["error: not run: stopped"] and turn.answer == ""
    script.replies = ["next"]
    _take_turn(chat, type_lines("two"))
    assert questions(chat) == ["one", "two"] and "next" in shown(chat)


def test_undo_retry_save_and_load_with_calls(chat: Chat, script: Script, ran: list[int], tmp_path: Path) -> None:
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
    _take_turn(chat, type_lines("how much?"))
    assert len(ran) == 7 and "the last calls were not run" in shown(chat)
