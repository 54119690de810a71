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


class Parser(argparse.ArgumentParser):
    """An argument parser with `--debug`, whose errors are one line.

    Attributes:
        idle: the options without effect that `run` names on standard error.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.idle: list[Idle] = []
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2; argparse would print its usage block too."""
        complain(self.prog, f"{message}; see --help")
        raise SystemExit(USER_MISTAKE)


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
            args = parser.parse_args(argv)
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
    checkout = Path(__file__).parents[2]
    missing = f"{library} is not installed for {sys.executable}"
    if not (checkout / "Makefile").is_file():
        return f"{missing}; install phi4_mlx again, from its checkout: pip install ."
    make = "" if (checkout / ".venv" / "bin" / "activate").exists() else f"make -C {checkout} chat, then "
    return f"{missing}; {make}source {checkout}/.venv/bin/activate"


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
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar, called with (bytes done, total bytes); None where standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
