"""`python -m phi4_mlx.chat`: a conversation in a terminal or through a pipe, or one question and its answer."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from phi4_mlx.chat.attachments import attach_file, attach_typed
from phi4_mlx.chat.commands import COMPLETED_PATHS, COMPLETED_WORDS, Leave, is_command, obey
from phi4_mlx.chat.session import MAX_TOKENS, Chat, load_shown
from phi4_mlx.chat.tools import Doorkeeper, add_chat_tool_options, toolbox_of
from phi4_mlx.errors import Interruption, Phi4Error, RequestError
from phi4_mlx.files.regular_file import SMALL_BYTES
from phi4_mlx.terminal.command import (
    Idle,
    Parser,
    complain,
    read_standard_input,
    run,
    standard_input_beside,
    text,
    typed,
    utf8,
    word,
)
from phi4_mlx.terminal.options import (
    add_decoding_options,
    add_media_options,
    add_model_options,
    add_overflow_option,
    add_parallel_option,
    add_prompt_cache_options,
    add_sampling_options,
    cache_options,
    check_decoding_options,
    complain_of_cuts,
    given_sampling,
    load_options,
)
from phi4_mlx.terminal.screen import Screen, keys

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.ranks.session import Session
    from phi4_mlx.tools.toolbox import Toolbox


PROG = typed("chat")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _chat, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Chat with a model. Input from a pipe is answered line by line, as one conversation.",
    )
    add_model_options(parser)
    add_parallel_option(parser)
    parser.add_argument(
        "--system-prompt", type=text, help="instructions to the model, before the conversation (default: none)"
    )
    parser.add_argument(
        "--prompt", "-p", type=text,
        help="answer this prompt and exit; text on standard input follows it, after an empty line; - reads that alone "
        "(default: a conversation)",
    )  # fmt: skip
    add_media_options(parser, "the first question")
    add_chat_tool_options(parser)
    parser.add_argument(
        "--schema", type=word, metavar="FILE.json", help="answers are JSON that obeys this JSON schema (default: none)"
    )
    add_sampling_options(parser, MAX_TOKENS)
    add_decoding_options(parser)
    add_overflow_option(parser)
    add_prompt_cache_options(parser)
    parser.idle.append(Idle(("context_overflow",), lambda args: args.prompt is not None, "with --prompt: one question"))
    return parser


def _chat(args: argparse.Namespace) -> None:
    check_decoding_options(args)
    from phi4_mlx.hub import DEFAULT_MODEL
    from phi4_mlx.ranks.session import ModelOptions, check_over_ranks, command_options, open_session

    check_over_ranks(args, "prompt_cache_dir")
    name = DEFAULT_MODEL if args.model is None else args.model
    options = ModelOptions(name, args.parallel, **load_options(args), command=command_options("chat", args))
    with open_session(options, partial(complain, PROG)) as session:
        _chat_in(session, args)


def _chat_in(session: Session, args: argparse.Namespace) -> None:
    prompt = args.prompt
    if prompt is not None:
        prompt = read_standard_input() if prompt == "-" else standard_input_beside(prompt)
    if prompt is not None and not prompt.strip() and not args.image and not args.audio:
        raise RequestError("the prompt is empty; it needs at least one character that is not white space")
    person = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    screen, grammar = Screen(), None if args.schema is None else _grammar(args)
    with toolbox_of(args, person, partial(complain, PROG)) as toolbox:
        chat = _open(session, args, screen, person, toolbox, grammar)
        with contextlib.closing(chat.conversation):
            for path in args.image:
                attach_file(chat, path, "image")
            for path in args.audio:
                attach_file(chat, path, "audio")
            if prompt is not None:
                chat.answer(prompt)
            elif person:
                talk(chat)
            else:
                _answer_lines(chat)


def _grammar(args: argparse.Namespace) -> Grammar:
    from phi4_mlx.grammar.grammars import schema_grammar

    if args.tools or args.mcp:
        raise RequestError("--schema leaves no room for calls of tools; drop it, or --tools and --mcp")
    return schema_grammar(args.schema)


def _open(
    session: Session, args: argparse.Namespace, screen: Screen, person: bool, toolbox: Toolbox, grammar: Grammar | None
) -> Chat:
    """Loads the models of the options, and begins a chat with them."""
    from phi4_mlx.chat.conversation import Conversation
    from phi4_mlx.chat.stored_caches import StoredCaches
    from phi4_mlx.checkpoint import load
    from phi4_mlx.models.cache import CacheOptions
    from phi4_mlx.models.safe import notice

    if switched_off := notice():
        complain(PROG, switched_off)
    settings = None
    if args.prompt_cache_dir is not None:
        from phi4_mlx.generation.cache_store.store import store_settings

        settings = store_settings(args.prompt_cache_dir, args.prompt_cache_disk_bytes)
    name, warn = session.options.name, partial(complain, PROG)
    model, tokenizer = load_shown(screen, name, session.load)
    draft = None if args.draft_model is None else load(args.draft_model)[0]
    conversation = Conversation(
        model, tokenizer, args.system_prompt, toolbox,
        cache_options=CacheOptions(**cache_options(args)), overflow=args.context_overflow,
        store=StoredCaches(None if settings is None else settings.make_store(model, tokenizer, warn)),
    )  # fmt: skip
    conversation.check_tools()
    chat = Chat(
        screen,
        conversation,
        name,
        given_sampling(args),
        person=person,
        speculate=args.speculate,
        draft=draft,
        grammar=grammar,
        approve=None if args.allow_tools else Doorkeeper(screen.ask),
        warn=warn,
    )
    complain_of_cuts(PROG, args, chat.settings["temp"])
    return chat


def _answer_lines(chat: Chat) -> None:
    """Answers each line of standard input. Every line is a question: there are no commands."""
    lines = iter(lambda: sys.stdin.buffer.readline(SMALL_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > SMALL_BYTES:
            raise RequestError(f"line {number} of standard input has more than {SMALL_BYTES:,} bytes, the limit")
        question = utf8(line, f"line {number} of standard input").rstrip("\r\n")
        if question.strip():
            chat.answer(question)


def talk(chat: Chat) -> None:
    """Reads and answers until the person leaves or the terminal is closed."""
    from phi4_mlx.terminal.line_editor import LineEditor

    editor = LineEditor(COMPLETED_WORDS, COMPLETED_PATHS, chat.screen.colour)
    chat.greet()

    def hang_up(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not editor.abandon(HungUp()):
            raise HungUp

    signal.signal(signal.SIGHUP, hang_up)
    try:
        with contextlib.suppress(Leave):
            while True:
                take_turn(chat, editor.read)
    except (HungUp, OSError, termios.error):
        where = chat.rescue()
        raise RequestError(f"the terminal was closed; {where}") from None
    except Exception:
        chat.rescue()
        raise
    chat.leave()


def take_turn(chat: Chat, read: Callable[[], str]) -> None:
    """Serves one command or question of the person; a mistake prints a line."""
    try:
        typed = read()
        with keys(echo=False):
            if is_command(typed):
                obey(chat, typed)
            else:
                _ask(chat, typed)
    except EOFError:
        raise (Leave if sys.stdin.isatty() else HungUp) from None
    except KeyboardInterrupt:
        chat.screen.note("Ctrl-D leaves")
    except Phi4Error as error:
        chat.screen.error(str(error))


def _ask(chat: Chat, typed: str) -> None:
    """Asks the question of a line, with the files whose paths are in it; files alone wait for a question."""
    question = attach_typed(chat, typed)
    if question.strip() or (chat.pending and not typed.strip()):  # Enter alone asks about what is attached
        chat.answer(question)


class HungUp(Interruption):
    """The terminal was closed."""


if __name__ == "__main__":
    raise SystemExit(main())
