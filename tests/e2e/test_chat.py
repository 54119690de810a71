"""`python -m phi4_mlx.chat` as a process: through a pipe, with --prompt, and in a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pexpect
import PIL.Image
import pytest

from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.e2e.server_process import hear_hangups
from tests.tiny_multimodal import write_tiny_multimodal

CHAT = [sys.executable, "-m", "phi4_mlx.chat"]
Checkpoint = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> str:
    """A model whose answers never end by themselves: the end markers have zero weights, and the context is long."""
    folder = tiny_checkpoint(max_position_embeddings=2**17, original_max_position_embeddings=2**16)
    weights = dict(mx.load(str(folder / "model.safetensors")).items())
    for end in load_tokenizer(folder).eos_ids:
        weights["model.embed_tokens.weight"][end] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return str(folder)


def chat(*arguments: str, stdin: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*CHAT, *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def test_a_pipe_is_answered_line_by_line_in_one_conversation(model: str) -> None:
    options = ["--model", model, "--max-tokens", "10"]
    alone = chat(*options, stdin=b"one").stdout
    both = chat(*options, stdin=b"one\r\n\n/help\n").stdout  # a pipe has no commands
    assert both.startswith(alone) and len(both) > len(alone)
    assert both != alone + chat(*options, stdin=b"/help\n").stdout  # the second was asked after the first
    assert chat(*options, stdin=b"").stdout == b""


def test_a_line_of_a_pipe_has_a_limit() -> None:
    done = chat("--model", "demo", "--max-tokens", "3", stdin=b"one\n" + b"a" * (2**24 + 1), code=2)
    assert b"line 2 of standard input has more than 16,777,216 bytes" in done.stderr


def test_prompt_answers_once(model: str) -> None:
    options = ["--model", model, "--max-tokens", "10"]
    once = chat(*options, "--prompt", "one")
    assert once.stdout == chat(*options, stdin=b"one").stdout and once.stderr == b""
    assert chat(*options, "--prompt", "-", stdin=b"one").stdout == once.stdout
    both = chat(*options, "--prompt", "-", stdin=b"one\n\ntwo").stdout
    assert both == chat(*options, "--prompt", "one", stdin=b"two\n").stdout != once.stdout
    assert chat(*options, "--prompt", "one", "--system-prompt", "be brief").stdout != once.stdout


def test_without_a_terminal_nothing_is_imported_that_only_a_terminal_needs(model: str) -> None:
    code = (
        "import sys; from phi4_mlx.chat.__main__ import main;"
        f"main(['--model', {model!r}, '--max-tokens', '2', *sys.argv[1:]]); print(*sys.modules)"
    )
    for arguments, stdin in ((["--prompt", "x"], ""), ([], "x\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], input=stdin, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        loaded = {name.partition(".")[0] for name in done.stdout.split()}
        assert "phi4_mlx" in loaded, done.stderr
        assert not loaded & {"prompt_toolkit", "rich", "mlx_lm", "transformers", "numpy", "huggingface_hub"}


@pytest.mark.parametrize(
    ("arguments", "stdin", "complaint"),
    [
        (["--prompt", ""], b"", "the prompt is empty"),
        (["--prompt", "-"], b"\xff", "standard input is not UTF-8: byte 0xff at offset 0"),
        (["--temp", "nan"], b"", "--temp: 'nan' is not a number"),
        (["--max-tokens", "-1"], b"", "--max-tokens: '-1' is not a whole number"),
        (["--chat-format", "nope"], b"", "chat format 'nope' is unknown"),
        (["--nope"], b"", "unrecognized arguments"),
        ([], b"x" * 2**18, "the context holds 131,072; shorten the question"),
        (["--tools", __file__], b"x", "--allow-tools runs all calls"),
        (["--mcp", "true", "-p", "x"], b"", "--allow-tools runs all calls"),
        (["--tools", "no.py", "--allow-tools"], b"", "no.py cannot be read: No such file"),
        (["--schema", "no.json"], b"", "no.json cannot be read: No such file"),
        (["--schema", __file__], b"", "is not JSON"),
        (["--schema", "x", "--tools", "y", "--allow-tools"], b"", "--schema leaves no room for calls"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], stdin: bytes, complaint: str, model: str) -> None:
    done = chat("--model", model, *arguments, stdin=stdin, code=2)
    assert complaint in done.stderr.decode() and done.stderr.count(b"\n") == 1 and done.stdout == b""


def test_what_was_answered_before_a_bad_line_stays(model: str) -> None:
    options = ["--model", model, "--max-tokens", "10"]
    good = chat(*options, stdin=b"one\n").stdout
    done = chat(*options, stdin=b"one\ntw\xff\nthree\n", code=2)
    assert done.stdout == good
    assert b"line 2 of standard input is not UTF-8: byte 0xff at offset 2" in done.stderr


CALCULATOR = '''
from pathlib import Path

def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    Path(__file__).with_name("ran").write_text(expression)
    return str(eval(expression, {"__builtins__": {}}))
'''


@pytest.fixture
def calculator(tmp_path: Path) -> Path:
    path = tmp_path / "calculator.py"
    path.write_text(CALCULATOR)
    return path


def test_tools_in_a_pipe(calculator: Path) -> None:
    done = chat("--model", "demo", "--tools", str(calculator), "--allow-tools", stdin=b"what is 12 * 31?\nhello\n")
    assert done.stdout.startswith(b"The answer is 372.\nHello!") and done.stderr == b""
    assert calculator.with_name("ran").read_text() == "12 * 31"


def test_tools_with_a_chat_format_without_a_place_for_them(calculator: Path, model: str) -> None:
    options = ["--tools", str(calculator), "--allow-tools", "--chat-format", "phi3.5-mini"]  # refused before a question
    assert b"the chat format phi3.5-mini does not support tools" in chat("--model", model, *options, code=2).stderr


def test_answers_obey_a_schema(model: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}')
    options = ["--model", model, "--schema", str(path), "--temp", "1", "--seed", "1"]
    lines = chat(*options, stdin=b"one\ntwo\n").stdout.decode().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["colour"] in ("red", "blue") for line in lines)


# In a terminal.


class Terminal:
    """The chat in a pseudo-terminal, with its own home folder; standard error goes to a file."""

    def __init__(self, model: str, state: Path, *arguments: str, **environment: str) -> None:
        self.state = state
        self.errors = state / "stderr.txt"
        state.mkdir(exist_ok=True)
        self.child = pexpect.spawn(
            "/bin/sh",
            ["-c", f'exec "$@" 2>"{self.errors}"', "sh", *CHAT, "--model", model, *arguments],
            cwd=str(state),
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "HOME": str(state), "TERM": "xterm-256color"}
            | {"HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}  # no reply to cursor queries
            | environment,
            dimensions=(40, 100),
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
        )
        self.child.delaybeforesend = 0.1
        self.wait_for("Ctrl-D leaves")

    def wait_for(self, text: str) -> str:
        """Waits for a text; returns everything up to its end."""
        self.child.expect_exact(text)
        before: str = self.child.before + text
        return before

    def type(self, text: str) -> None:
        self.child.send(text)

    def leave(self) -> int:
        """Waits for the chat to end; returns its exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus is not None
        return int(self.child.exitstatus)

    def hang_up(self) -> int:
        """Closes the terminal; returns the exit code."""
        os.close(self.child.child_fd)
        self.child.closed, self.child.child_fd = True, -1
        for _ in range(600):
            pid, status = os.waitpid(self.child.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.child.pid, 9)
        raise AssertionError("still running 60 s after its terminal was closed")

    def history(self) -> list[str]:
        """The entries of the history file, each with all its lines."""
        text = (self.state / "phi4_mlx" / "history").read_text(encoding="utf-8")
        entries = re.split(r"^# .*\n", text, flags=re.MULTILINE)
        return ["\n".join(line[1:] for line in entry.splitlines() if line) for entry in entries if entry.strip()]


@pytest.fixture
def terminal(model: str, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(model, tmp_path / "state", *arguments, **environment))
        return opened[-1]

    yield start
    for each in opened:
        if not each.child.closed:
            each.child.close(force=True)


def test_a_conversation_with_commands(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--max-tokens", "5")
    screen.type("hello\r")
    screen.wait_for("cut at 5 tokens")
    screen.type("two\\\rlines\x1b\rthree\r")
    screen.wait_for("cut at 5 tokens")
    screen.type("\x1b[200~pasted\nlines\x1b[201~\r")
    screen.wait_for("cut at 5 tokens")
    screen.type("/stats\r")
    assert "from the cache" in screen.wait_for("tokens/s")
    screen.type("/save talk\r")
    screen.wait_for("saved 3 turns")
    screen.type("/quit\r")
    assert screen.leave() == 0
    assert screen.errors.read_text() == ""
    messages = json.loads((screen.state / "talk.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["hello", "two\nlines\nthree", "pasted\nlines"]

    assert screen.history() == ["hello", "two\nlines\nthree", "pasted\nlines", "/stats", "/save talk", "/quit"]
    assert (screen.state / "phi4_mlx" / "history").stat().st_mode & 0o777 == 0o600
    again = terminal("--max-tokens", "5")
    again.type("\x1b[A" * 3 + "\r")  # three times up in the history of the first chat
    again.wait_for("in 0 turns")
    again.type("\x04")
    assert again.leave() == 0
    assert again.history()[-2:] == ["/quit", "/stats"]


def test_a_picture_is_dragged_into_the_line(tmp_path: Path) -> None:
    write_tiny_multimodal(tmp_path / "model")
    PIL.Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "my picture.png")
    screen = Terminal(str(tmp_path / "model"), tmp_path / "state", "--max-tokens", "5")
    screen.wait_for("Drag a picture")
    dragged = str(tmp_path / "my picture.png").replace(" ", "\\ ")
    screen.type(f"\x1b[200~{dragged} \x1b[201~\r")
    screen.wait_for("my picture.png: 36 tokens; goes with the next question")
    screen.type("what is it?\r")
    screen.wait_for("cut at 5 tokens")
    screen.type("/undo\r")
    screen.wait_for("taken back: [my picture.png] what is it?")
    screen.type("\x04")
    assert screen.leave() == 0
    assert screen.errors.read_text() == ""


def test_tab_completes_a_command_and_the_name_of_a_file(terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.type("/sa\t")
    screen.wait_for("/save")
    screen.type("my talk\r")
    screen.wait_for("saved 0 turns")
    screen.wait_for("talk.json")
    screen.type("/load m\t")
    screen.wait_for("talk.json")
    screen.type("\r")
    screen.wait_for("loaded 0 turns")
    screen.type("/quit\r")
    assert screen.leave() == 0


def test_a_person_is_asked_before_a_tool_is_run(calculator: Path, tmp_path: Path) -> None:
    screen = Terminal("demo", tmp_path / "state", "--tools", str(calculator))
    ran = calculator.with_name("ran")
    screen.type("what is 12 * 31?\r")
    assert 'calculate(expression="12 * 31")' in screen.wait_for("run it? [y/N/always]")
    screen.type("n\r")
    screen.wait_for("= error: refused by the user")
    assert not ran.exists()
    time.sleep(1)
    screen.type("what is 7 * 3?\r")
    screen.wait_for("run it? [y/N/always]")
    screen.type("\x03")
    screen.wait_for("stopped")
    screen.type("what is 7 * 3?\r")
    screen.wait_for("run it? [y/N/always]")
    screen.type("always\r")
    screen.wait_for("= 21")
    screen.wait_for("The answer is 21.")
    screen.type("/save talk\r")
    screen.wait_for("saved 3 turns")
    screen.type("\x04")
    assert screen.leave() == 0
    assert screen.errors.read_text() == "" and ran.read_text() == "7 * 3"
    roles = [message["role"] for message in json.loads((screen.state / "talk.json").read_text())["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"] * 3


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--max-tokens", "100000")
    screen.type("hello\r")
    screen.wait_for("hello")
    time.sleep(1)
    screen.type("typed ahead")
    screen.type("\x03")
    answer = screen.wait_for("stopped")
    assert "typed ahead" not in answer and "^C" not in answer  # keys are not echoed into the answer
    screen.type("\x03")
    screen.wait_for("Ctrl-D leaves")
    screen.type("/set max-tokens 5\r")
    screen.wait_for("max-tokens is 5")
    screen.type("more\r")
    screen.wait_for("cut at 5 tokens")
    screen.type("/save talk\r")
    screen.wait_for("saved 2 turns")
    screen.type("\x04")
    assert screen.leave() == 0
    assert not (screen.state / "phi4_mlx" / "rescued.json").exists()


def test_a_terminal_closed_mid_answer_loses_nothing(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--max-tokens", "100000")
    screen.type("tell me\r")
    screen.wait_for("tell me")
    time.sleep(1)
    assert screen.hang_up() == 2
    line = screen.errors.read_text()
    assert line.startswith("python -m phi4_mlx.chat: the terminal was closed; /load in the next chat")
    assert line.count("\n") == 1
    assert screen.history() == ["tell me"]

    again = terminal("--max-tokens", "5")
    again.wait_for("/load brings it back")
    again.type("/load\r")
    again.wait_for("the last question was: tell me")
    again.type("go on\r")
    again.wait_for("cut at 5 tokens")
    again.type("\x04")
    assert again.leave() == 0


def test_a_terminal_closed_between_two_questions_loses_nothing(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--max-tokens", "5")
    screen.type("hello\r")
    screen.wait_for("cut at 5 tokens")
    time.sleep(0.5)
    assert screen.hang_up() == 2
    line = screen.errors.read_text()
    assert line.startswith("python -m phi4_mlx.chat: the terminal was closed") and line.count("\n") == 1
    rescued = json.loads((screen.state / "phi4_mlx" / "rescued.json").read_text())
    assert rescued["messages"][0]["content"] == "hello"


def test_a_plain_terminal_gets_no_styles_from_us(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--max-tokens", "200", NO_COLOR="1")
    screen.type("/help\r")
    assert "\x1b[2m" not in screen.wait_for("/quit")
    screen.type("hello\r")
    shown = screen.wait_for("cut at 200 tokens")
    assert not re.search(r"\x1b\[(1;)?3\dm|\x1b\[2m", shown.rpartition("hello")[2])
    screen.type("\x04")
    assert screen.leave() == 0


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file"])
def test_a_history_that_cannot_be_kept_does_not_stop_the_chat(
    obstacle: str, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "phi4_mlx"
    if obstacle == "a file for a folder":
        folder.parent.mkdir()
        folder.touch()
    else:
        (folder / "history").mkdir(parents=True)
    screen = terminal("--max-tokens", "5")
    screen.type("hello\r")
    assert "xception" not in screen.wait_for("cut at 5 tokens")
    screen.type("\x04")
    assert screen.leave() == 0
    assert screen.errors.read_text() == ""


DEAF = """
import json, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(__import__("os").getpid()))
for line in sys.stdin:
    message = json.loads(line)
    info = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
    tools = {"tools": [{"name": "add", "inputSchema": {"type": "object"}}]}
    result = tools if message["method"] == "tools/list" else info
    if "id" in message:
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
    if message["method"] == "tools/list":
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_no_mcp_server_behind(number: signal.Signals, model: str, tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    server = f"{sys.executable} {tmp_path / 'deaf.py'} {tmp_path / 'pid'}"
    words = [sys.executable, "-m", "phi4_mlx.chat", "--model", model, "--allow-tools", "--mcp", server]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "preexec_fn": hear_hangups}
    with subprocess.Popen([*words, "--max-tokens", "3"], **options) as chat:  # type: ignore[call-overload]
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)  # it answers, so that the server has started
        chat.send_signal(number)
        assert chat.wait(60) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
