"""The frame of every command: one-line errors, exit codes, option types and standard input.

Imports only the standard library, so that `--help` and a mistyped option cost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import stat
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from phi4_mlx.errors import Phi4Error, RequestError, message_of
from phi4_mlx.files.regular_file import SMALL_BYTES
from phi4_mlx.terminal.printable import one_line
from phi4_mlx.terminal.suggestion import DASHES, is_slip, suggestion

Number = TypeVar("Number", int, float)

SILENT_S = 0.5  # until an open pipe counts as silent

USER_MISTAKE = 2
OUR_MISTAKE = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count
READER_LEFT = 141  # 128 + SIGPIPE


class Idle(NamedTuple):
    """Options that have no effect beside others.

    Attributes:
        names: the options, as attributes of the parsed options.
        when: called with the parsed options; True if those of `names` have no effect.
        why: completes "--top-k has no effect ...".
    """

    names: tuple[str, ...]
    when: Callable[[Any], bool]
    why: str


def idle_options(table: Iterable[Idle], given: Collection[str], options: object) -> Iterator[str]:
    """A line for each entry of the table of which an option is given without effect.

    Args:
        table: the entries.
        given: the names of the options that were given.
        options: for `Idle.when`.
    """
    for idle in table:
        found = [f"--{name.replace('_', '-')}" for name in idle.names if name in given]
        if found and idle.when(options):
            yield f"{' and '.join(found)} {'has' if len(found) == 1 else 'have'} no effect {idle.why}"


def typed(command: str) -> str:
    """A command as the user starts it: `phi4-mlx chat`, or `python -m phi4_mlx.chat` after a start by `python -m`.

    Args:
        command: "chat", for example, or "" for the program itself; the one that runs, or one that a message advises.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = "" if spec is None else spec.name.removesuffix(".__main__")
    if module == f"phi4_mlx.{command}":
        return f"python -m {module}"
    started = "python -m phi4_mlx" if module.partition(".")[0] == "phi4_mlx" else "phi4-mlx"
    return f"{started} {command}".rstrip()


def shown_default(value: object) -> str:
    """The default of an option, as `--help` shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Help(argparse.HelpFormatter):
    """Ends the help of each option with its default; where that is None, the text itself says what happens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        """The lines of a text; names stay whole at their hyphens."""
        import textwrap  # as argparse does, for --help alone

        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or "(default: " in text:
            return text
        if action.required:
            return f"{text} (required)"
        if action.default in (None, argparse.SUPPRESS):
            return text
        return f"{text} (default: {shown_default(action.default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An argument parser with `--debug`, whose help shows every default, and whose errors are one line.

    Attributes:
        idle: the options without effect that `run` names on standard error.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
        self.idle: list[Idle] = []
        self.add_argument(  # no default: a command's would overwrite what is given before its name
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback (default: off)"
        )

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2; argparse would print its usage block too."""
        complain(self.prog, message if message.endswith("?") else f"{message}; see --help")
        raise SystemExit(USER_MISTAKE)

    def refuse(self, word: str, before: str = "") -> NoReturn:
        """Refuses a word that is not an option, with the option that was probably meant.

        Args:
            word: the word.
            before: the word before it.
        """
        name = word.partition("=")[0]
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        options = [each for action in shown for each in action.option_strings]
        near = suggestion(name, options if name[:1] in DASHES else [each for each in options if is_slip(name, each)])
        if not near and self._takes_value(before):
            near = f"; a value that begins with a dash is written {before}={word:.60}"
        self.error(f"unrecognized arguments: {name:.100}{near}")

    # `Any` stands for the overloads of the base class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses words. Refuses unknown options first, where argparse would report missing ones."""
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *words], words, strict=False):
            if word == "--" or (self._subparsers is not None and word[:1] not in DASHES):
                break  # the options that follow are not this parser's
            if self._is_unknown_option(word, before):
                self.refuse(word, before)
        return super().parse_known_args(words, namespace)

    def _is_unknown_option(self, word: str, before: str) -> bool:
        """True for an option that argparse would refuse, and for `-prompt`, which it would read as `-p rompt`."""
        known, name = self._option_string_actions, word.partition("=")[0]
        if name in known or len(name) < 2 or name[0] not in DASHES or " " in word:
            return False
        if name[0] != "-":  # a long dash, as editors make it of two
            return not self._takes_value(before) and any(is_slip(name, each) for each in known)
        if name[1] != "-" and name[:2] in known:
            return any(is_slip(name, each) for each in known if each.startswith("--"))
        return not self._negative_number_matcher.match(word)

    def _takes_value(self, option: str) -> bool:
        return option in self._option_string_actions and self._option_string_actions[option].nargs != 0

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses a value that is not among an option's choices."""
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            near = suggestion(value, known) if isinstance(value, str) else ""
            raise argparse.ArgumentError(action, f"{str(value)!r:.60} is not one of {', '.join(known)}{near}")


def run(parser: Parser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command: parses its options, does its work, and turns an error into one line and an exit code.

    Args:
        parser: the command's options; its `prog` begins the line.
        work: called with the parsed options.
        argv: the words after the command's name; those of the process if None.

    Returns:
        The exit code: 0; 2 for an error that the user can correct; 1 for a defect of the program; 130 for Ctrl-C; 141
        if the reader of standard output has gone.
    """
    args = argparse.Namespace(debug=False)
    if sys.stdin is None or sys.stdout is None:  # closed by the caller: read nothing, discard output
        sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack characters
    try:
        try:
            args, rest = parser.parse_known_args(argv, args)
            if rest:
                parser.refuse(rest[0])
            given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
            for line in idle_options(parser.idle, given, args):
                complain(parser.prog, line)
            work(args)
            code = 0
        except SystemExit as leave:  # --help, or an option refused
            code = leave.code if isinstance(leave.code, int) else 0
        print(end="", flush=True)  # reports a full disk here, not while the interpreter exits
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return READER_LEFT
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message, code = _explain(error)
        complain(parser.prog, message)
        return code
    finally:
        _settle_output()


def _explain(error: Exception) -> tuple[str, int]:
    """(the message for the user, the exit code)"""
    if isinstance(error, Phi4Error):
        return str(error), USER_MISTAKE
    if isinstance(error, OSError):
        reason = error.strerror or message_of(error) or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename else reason, USER_MISTAKE
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("phi4_mlx"):
        return _not_installed(str(error.name)), USER_MISTAKE
    if isinstance(error, MemoryError):
        return "out of memory; a smaller model, prompt or --max-tokens needs less", USER_MISTAKE
    return f"internal error: {type(error).__name__}: {message_of(error)}; --debug shows where", OUR_MISTAKE


def _not_installed(library: str) -> str:
    """The message for a missing library: the Python that has it, or the way to install it."""
    from shlex import quote

    checkout = Path(__file__).parents[2]
    activate = checkout / ".venv" / "bin" / "activate"
    missing = f"{library} is not installed for {sys.executable}"
    if not (checkout / "Makefile").is_file():
        return f"{missing}; install phi4_mlx again, from its checkout: pip install ."
    make = "" if activate.exists() else f"make -C {quote(str(checkout))} chat, then "
    return f"{missing}; {make}source {quote(str(activate))}"


def complain(prog: str, message: str) -> None:
    """Prints one line to standard error; nothing if standard error is closed."""
    try:
        print(f"{prog}: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone
        _point_at_nothing(2)


def _settle_output() -> None:
    """Flushes standard output, to /dev/null if it is closed, so that the interpreter's last flush succeeds."""
    try:
        print(end="", flush=True)
    except OSError:
        _point_at_nothing(1)
        with contextlib.suppress(OSError):
            print(end="", flush=True)


def _point_at_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


@contextlib.contextmanager
def progress_bar(
    label: str, of: Callable[[float], str] | None = None
) -> Iterator[Callable[[float, float], None] | None]:
    """A progress bar, called with (done, total); None where standard error is not a terminal.

    Before the first call, and between two, a spinner and the seconds show that the program runs.

    Args:
        label: before the bar.
        of: the text of an amount; None for bytes.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amounts = DownloadColumn() if of is None else TextColumn("{task.fields[amounts]}")
    columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), BarColumn(20), amounts)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, amounts="")

        def show(done: float, total: float) -> None:
            bar.update(task, completed=done, total=total, amounts="" if of is None else f"{of(done)} of {of(total)}")

        yield show


def number(kind: type[Number], low: Number, high: Number) -> Callable[[str], Number]:
    """An option's type: a number from `low` to `high`, both included; never NaN."""

    def parse(text: str) -> Number:
        try:
            value: Number | None = None if "_" in text else kind(text)  # Python reads 1_0 as ten
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            shown = text if len(text) <= 40 else text[:40] + "..."
            limits = f"a whole number from {low:,} to {high:,}" if kind is int else f"a number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{shown!r} is not {limits}")
        return value

    return parse


def text(given: str) -> str:
    """An option's type: text that is valid UTF-8."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{given!r} is not UTF-8") from None
    return given


def word(given: str) -> str:
    """An option's type: text that is not empty."""
    if not given:
        raise argparse.ArgumentTypeError("'' is empty; it needs at least one character")
    return text(given)


def read_standard_input() -> str:
    """Reads standard input to its end.

    Raises:
        RequestError: it is not UTF-8, or has more than `SMALL_BYTES` bytes.
    """
    data = sys.stdin.buffer.read(SMALL_BYTES + 1)
    if len(data) > SMALL_BYTES:
        raise RequestError(f"standard input has more than {SMALL_BYTES:,} bytes, the limit; shorten it")
    return utf8(data, "standard input")


def standard_input_beside(prompt: str) -> str:
    """The prompt, and after an empty line the text of a file or pipe on standard input, if there is any.

    A pipe that stays open without a byte, as a scheduler may leave one, is not waited for; a line says so.

    Raises:
        RequestError: standard input is not UTF-8.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or replaced by an object without a descriptor
        return prompt
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        return prompt
    if not select.select([sys.stdin], [], [], SILENT_S)[0]:
        print("standard input is an open pipe without text, and is not read", file=sys.stderr, flush=True)
        return prompt
    given = read_standard_input().removesuffix("\n")
    return f"{prompt}\n\n{given}" if given.strip() else prompt


def utf8(data: bytes, where: str) -> str:
    """Decodes UTF-8.

    Args:
        data: the bytes.
        where: their source, which begins the message of an error.

    Raises:
        RequestError: they are not UTF-8; names the first invalid byte and its offset.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it, for example "
            "with iconv"
        ) from None
