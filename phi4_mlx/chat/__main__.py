"""`python -m phi4_mlx.chat`: a conversation in the terminal, through a pipe, or one question and its answer."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from phi4_mlx.chat.commands import COMMANDS, Leave, is_command, obey
from phi4_mlx.chat.session import Chat
from phi4_mlx.chat.tools import Doorkeeper, add_tool_options, toolbox_of
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.terminal.command import Parser, read_standard_input, run, text, utf8, word
from phi4_mlx.terminal.options import (
    SAMPLING,
    add_decoding_options,
    add_model_options,
    add_sampling_options,
    cache_options,
    check_decoding_options,
    load_options,
)
from phi4_mlx.terminal.screen import Screen, keys

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar


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
    check_decoding_options(args)
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
    from phi4_mlx.grammar.grammars import schema_grammar

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
    from phi4_mlx.terminal.line_editor import LineEditor

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
        with keys(echo=False):
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


if __name__ == "__main__":
    raise SystemExit(main())
