"""`python -m phi4_mlx.chat`: a conversation in the terminal, through a pipe, or one question and its answer."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from phi4_mlx.chat_commands import COMMANDS, Leave, is_command, obey, rescued_file
from phi4_mlx.chat_tools import Doorkeeper, add_tool_options, shown_call, shown_result, toolbox_of
from phi4_mlx.command import (
    LONG_PREFILL,
    SAMPLING,
    Parser,
    add_decoding_options,
    add_model_options,
    add_sampling_options,
    cache_options,
    drawing,
    load_options,
    one_line,
    printable,
    read_standard_input,
    run,
    text,
    utf8,
    word,
)
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.markdown import RESET, MarkdownStream, terminal_width

if TYPE_CHECKING:
    from phi4_mlx.agent import Event
    from phi4_mlx.constrain import Grammar
    from phi4_mlx.conversation import Conversation
    from phi4_mlx.models.text import Model
    from phi4_mlx.speculate import Mode

DIM, RED = "\x1b[2m", "\x1b[31m"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _chat, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="phi4-mlx chat",
        description="Talk with a model. Input from a pipe is answered line by line, as one conversation.",
    )
    add_model_options(parser)
    parser.add_argument("--system-prompt", type=text, help="what the model is told before the conversation")
    parser.add_argument("--prompt", "-p", type=text, help="answer this and leave; - reads all of standard input")
    add_tool_options(parser)
    parser.add_argument("--schema", type=word, metavar="FILE.json", help="answers are JSON that obeys this JSON schema")
    add_sampling_options(parser, max_tokens=2048)
    add_decoding_options(parser)
    return parser


def _chat(args: argparse.Namespace) -> None:
    prompt = read_standard_input() if args.prompt == "-" else args.prompt
    if prompt is not None and not prompt.strip():
        raise RequestError("the prompt is empty; it needs at least one character that is not white space")
    person = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(Screen(), {name: getattr(args, name.replace("-", "_")) for name in SAMPLING}, person)
    chat.cache_options, chat.speculate = cache_options(args), args.speculate
    if args.schema is not None:
        chat.grammar = _grammar(args)
    with toolbox_of(args, person, chat.screen.note) if args.tools or args.mcp else contextlib.nullcontext() as toolbox:
        chat.load_model(args.model, **load_options(args))
        if args.draft_model is not None:
            chat.load_draft(args.draft_model)
        chat.conversation.system = args.system_prompt
        if toolbox is not None:
            chat.conversation.toolbox = toolbox
            chat.conversation.prompt_ids("")  # a format that has no place for tools is refused now
        chat.approve = None if args.allow_tools else Doorkeeper(chat.screen.ask)
        if prompt is not None:
            chat.answer(prompt)
        elif person:
            _talk(chat)
        else:
            _answer_lines(chat)


def _grammar(args: argparse.Namespace) -> Grammar:
    from phi4_mlx.user_files import schema_grammar

    if args.tools or args.mcp:
        raise RequestError("--schema leaves no room for calls of tools; drop it, or --tools and --mcp")
    return schema_grammar(args.schema)


def _answer_lines(chat: Chat) -> None:
    """Answers each line of standard input; a line is a question, whatever it begins with."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        question = utf8(line, f"line {number} of standard input").rstrip("\r\n")
        if question.strip():
            chat.answer(question)


def _talk(chat: Chat) -> None:
    """Reads and answers until the person leaves, or the terminal does."""
    from phi4_mlx.line_editor import LineEditor

    editor = LineEditor([f"/{name}" for name in COMMANDS], chat.screen.colour)
    chat.greet()

    def hang_up(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not editor.abandon(HungUp()):
            raise HungUp

    signal.signal(signal.SIGHUP, hang_up)
    try:
        with contextlib.suppress(Leave):
            while True:
                _take_turn(chat, editor.read)
    except (HungUp, OSError, termios.error):
        where = chat.rescue()
        raise RequestError(f"the terminal was closed; {where}") from None
    except Exception:
        chat.rescue()
        raise
    chat.leave()


def _take_turn(chat: Chat, read: Callable[[], str]) -> None:
    """One command or question of the person; a mistake costs a line and no more."""
    try:
        typed = read()
        with _keys(echo=False):
            if is_command(typed):
                obey(chat, typed)
            elif typed.strip():
                chat.answer(typed)
    except EOFError:
        raise (Leave if sys.stdin.isatty() else HungUp) from None
    except KeyboardInterrupt:
        chat.screen.note("Ctrl-D leaves")
    except Phi4Error as error:
        chat.screen.error(str(error))


class HungUp(BaseException):
    """The terminal was closed."""


class StopButton:
    """Ctrl-C as a question that is asked between two tokens; pressed twice, it is what it always is.

    Attributes:
        pressed: whether it was.
        at_once: while a tool runs: then it is what it always is the first time.
    """

    def __init__(self) -> None:
        self.pressed = self.at_once = False
        self._before: Any = None

    def __enter__(self) -> StopButton:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *raised: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, signal_number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)
        if self.at_once:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _keys(echo: bool) -> Iterator[None]:
    """Shows what is typed, or keeps the terminal from echoing it into the middle of an answer."""
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    flags = before[3] | termios.ECHO if echo else before[3] & ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, [*before[:3], flags, *before[4:]])
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


class Screen:
    """Standard output: a terminal with styles, a plain terminal, or a pipe that takes the text as it is.

    Attributes:
        colour: whether styles may be used; not where NO_COLOR is set.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self.colour = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._status = ""

    def write(self, text: str) -> None:
        """Writes text, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(self) -> tuple[Callable[[str], None], Callable[[], None]]:
        """Begins an answer: (writes a piece of it, ends it)."""
        if self.colour:
            stream = MarkdownStream(self.write)
            return lambda piece: stream.add(printable(piece)), stream.finish
        last = "\n"

        def add(piece: str) -> None:
            nonlocal last
            last = piece or last
            self.write(printable(piece) if self._terminal else piece)

        return add, lambda: self.write("" if last.endswith("\n") else "\n")

    def note(self, text: str) -> None:
        """A line that is ours, not the model's; only a terminal shows it."""
        if self._terminal:
            self._line(DIM, text)

    def error(self, text: str) -> None:
        """A line that says what went wrong, in a chat that goes on."""
        self._line(RED, one_line(text))
        self.end_paragraph()

    def ask(self, question: str) -> str:
        """What the person types in answer, Enter included; nothing that was typed before the question counts."""
        self.write(question)
        with _keys(echo=True):
            if sys.stdin.isatty():
                termios.tcflush(sys.stdin, termios.TCIFLUSH)
            return sys.stdin.readline()

    def end_paragraph(self) -> None:
        """A blank line before the next prompt of a person."""
        if self._terminal:
            self.write("\n")

    def _line(self, style: str, text: str) -> None:
        text = textwrap.fill(text, terminal_width())
        self.write(f"{style}{text}{RESET}\n" if self.colour else f"{text}\n")

    def status(self, text: str) -> None:
        """A line that the next one replaces; an empty one clears it."""
        if self.colour and text != self._status:
            self.write(f"\r\x1b[K{DIM}{text}{RESET}" if text else "\r\x1b[K")
            self._status = text


class Chat:
    """A conversation, how its answers are drawn, and where they are shown.

    Attributes:
        screen: where answers and notes go.
        settings: the sampling options by name; change them with `set`.
        conversation: the turns.
        model_name: what the person called the model.
        saved_as: the file that /save may replace, because it holds this conversation.
        grammar: what every answer must obey, or None.
        approve: asked before a call of a tool is run; None runs all.
        cache_options: those of `make_cache`.
        speculate: how tokens are guessed ahead, as `make_proposer` takes it.
        draft: the model that guesses them, or None.
    """

    conversation: Conversation
    model_name: str
    grammar: Grammar | None = None
    approve: Doorkeeper | None = None
    speculate: Mode = "off"
    draft: Model | None = None

    def __init__(self, screen: Screen, settings: dict[str, Any], person: bool) -> None:
        self.screen = screen
        self.settings = settings
        self.defaults = dict(settings)
        self.saved_as: Path | None = None
        self.cache_options: dict[str, Any] = {}
        self._person = person
        self._drawing: dict[str, Any] | None = None

    def load_model(self, name: str | None, **options: Any) -> None:
        """Loads a model; a conversation that is under way goes on with it.

        Args:
            name: a folder, a Hub id or "demo"; None for the default model.
            options: those of `phi4_mlx.load`.

        Raises:
            Phi4Error: the model cannot be loaded; the one before stays.
        """
        from phi4_mlx.checkpoint import DEFAULT_MODEL, load
        from phi4_mlx.conversation import Conversation

        name = DEFAULT_MODEL if name is None else name
        self.screen.status(f"loading {name} ...")
        try:
            model, tokenizer = load(name, **options)
        finally:
            self.screen.status("")
        if hasattr(self, "conversation"):
            self.conversation.switch(model, tokenizer)
        else:
            self.conversation = Conversation(model, tokenizer, cache_options=self.cache_options)
        self.model_name, self._drawing = name, None

    def load_draft(self, name: str) -> None:
        """Loads the model that guesses tokens, from the next answer on."""
        from phi4_mlx.checkpoint import load

        self.draft, self._drawing = load(name)[0], None

    def set(self, name: str, value: Any) -> None:
        """Changes a sampling option, from the next answer on."""
        self.settings[name] = value
        self._drawing = None

    def greet(self) -> None:
        """Says who is there, and how to find out more."""
        self.screen.write(f"{self.model_name}, context {self.conversation.context:,} tokens\n")
        self.screen.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if rescued_file().exists():
            self.screen.note("A conversation whose terminal was closed is kept: /load brings it back.")
        self.screen.end_paragraph()

    def answer(self, question: str) -> None:
        """Asks the model and shows the answer; a person's Ctrl-C stops it, and what was said stays said.

        Raises:
            RequestError: the question is empty, or the context is full.
        """
        stop = StopButton()
        with stop if self._person else contextlib.nullcontext():
            events = self.conversation.ask(
                question,
                max_tokens=self.settings["max-tokens"],
                progress=lambda done, total: self._show_progress(done, total, stop.pressed),
                grammar=self.grammar,
                approve=self.approve,
                **self._how_to_draw(),
            )
            try:
                with contextlib.closing(events):
                    self._show(events, stop)
            except KeyboardInterrupt:
                if not stop.at_once:
                    raise
            finally:
                self.screen.status("")
        if self._person:
            self._explain_end(stop.pressed)

    def _show(self, events: Iterator[Event], stop: StopButton) -> None:
        """Shows an answer as it comes, and the calls in it, until the person stops it."""
        from phi4_mlx.agent import ToolResult
        from phi4_mlx.generation import GenerationResponse

        add, finish = self.screen.answer()
        try:
            for event in events:
                stop.at_once = not isinstance(event, (GenerationResponse, ToolResult))
                if isinstance(event, GenerationResponse):
                    add(event.text)
                elif isinstance(event, ToolResult):
                    self.screen.note(f"= {shown_result(event.text)}")
                else:
                    finish()
                    add, finish = self.screen.answer()
                    self.screen.note(shown_call(event))
                if stop.pressed:
                    break
        finally:
            finish()

    def _show_progress(self, done: int, total: int, stopped: bool) -> None:
        from phi4_mlx.conversation import Interrupted

        begun = self.conversation.usage.answer_tokens > 0  # a re-prefill, in the middle of a line of the answer
        if total > LONG_PREFILL and not begun:
            self.screen.status(f"reading {done:,} of {total:,} tokens ..." if done < total and not stopped else "")
        if stopped:
            raise Interrupted

    def _how_to_draw(self) -> dict[str, Any]:
        """How tokens are drawn, made once for its settings, so that a seed does not begin anew at each answer."""
        if self._drawing is None:
            from phi4_mlx.speculate import make_proposer

            conversation = self.conversation
            seeded = self.settings["seed"] is not None and self.settings["temp"] > 0
            proposer = make_proposer(
                self.speculate, conversation.model, self.draft, seeded=seeded, bounded=conversation.cache.bounded
            )
            self._drawing = drawing(self.settings) | {"proposer": proposer}
        return self._drawing

    def _explain_end(self, stopped: bool) -> None:
        usage = self.conversation.usage
        if stopped:
            self.screen.note("stopped")
        elif usage.finish_reason == "length":
            self.screen.note(f"cut at {usage.answer_tokens:,} tokens; /set max-tokens N changes the limit")
        elif usage.finish_reason == "max_rounds":
            self.screen.note("the last calls were not run: the model went on calling without an answer")
        if usage.reprefilled:
            self.screen.note(f"{usage.reprefilled:,} tokens were run again, under the RoPE table for long texts")
        self.screen.end_paragraph()

    def rescue(self) -> str:
        """Keeps the conversation where the next chat finds it; says so."""
        from phi4_mlx import transcript

        if not self.conversation.turns:
            return "nothing had been said"
        path = rescued_file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        transcript.save(path, self.model_name, self.conversation.system, self.conversation.turns, replace=True)
        return f"/load in the next chat brings the conversation back, from {path}"

    def leave(self) -> None:
        """The person leaves on purpose: a rescued conversation that was brought back needs no rescue any more."""
        if self.saved_as == rescued_file():
            rescued_file().unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
