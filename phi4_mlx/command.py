"""What every command shares: a parser that answers in one line, numbers with limits, one door for errors.

Only the standard library is imported here: `--help` and a mistyped option must cost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from phi4_mlx.errors import Phi4Error, RequestError

Number = TypeVar("Number", int, float)

USER_MISTAKE = 2
OUR_MISTAKE = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count
READER_LEFT = 141  # 128 + SIGPIPE

MAX_TOKENS_LIMIT = 1_000_000
TEMPERATURE_LIMIT = 100.0
SEED_LIMIT = 2**64 - 1  # mlx seeds its generator with 64 bits


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, and that knows `--debug`."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2, without argparse's block of usage."""
        complain(self.prog, f"{message}; see --help")
        raise SystemExit(USER_MISTAKE)


def run(parser: Parser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """The door of every command: parses, works, and turns whatever goes wrong into one line and an exit code.

    Args:
        parser: the command's options; its `prog` begins the line.
        work: called with the parsed options.
        argv: the words after the command's name; those of the process if None.

    Returns:
        The exit code: 0, 2 for a mistake that the user can mend, 1 for one of ours, 130 for Ctrl-C.
    """
    args = argparse.Namespace(debug=False)
    if sys.stdin is None or sys.stdout is None:  # closed by the caller: reads as empty, swallows what is written
        sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer outlives a terminal that cannot show all of it
    try:
        try:
            args = parser.parse_args(argv)
            work(args)
            code = 0
        except SystemExit as leave:  # --help, or an option refused
            code = leave.code if isinstance(leave.code, int) else 0
        print(end="", flush=True)  # a full disk speaks up here rather than in the interpreter's last breath
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
    """What to tell the user, and the exit code."""
    if isinstance(error, Phi4Error):
        return str(error), USER_MISTAKE
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        return f"{error.filename}: {what}" if error.filename else what, USER_MISTAKE
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("phi4_mlx"):
        return f"{error.name} is not installed; pip install phi4-mlx brings it along", USER_MISTAKE
    if isinstance(error, MemoryError):
        return "out of memory; a smaller model, prompt or --max-tokens needs less", USER_MISTAKE
    return f"internal error: {type(error).__name__}: {error}; --debug shows where", OUR_MISTAKE


def complain(prog: str, message: str) -> None:
    """Prints one line to standard error, if anyone is still there to read it."""
    try:
        print(f"{prog}: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone
        _point_at_nothing(2)


def one_line(text: str) -> str:
    """The text with line breaks as spaces and without what could steer a terminal."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text without control characters, except line breaks and tabs: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def _settle_output() -> None:
    """Empties the buffer of standard output, into nothing if need be, so that the interpreter's last flush succeeds."""
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
def progress_bar(label: str) -> Iterator[Callable[[int, int], Any] | None]:
    """A bar over bytes, moved by calling it as (bytes done, bytes in all); None where there is no terminal."""
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
    """An option's type: a number from `low` to `high`, both included; NaN and infinity are neither."""

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
    """All of standard input.

    Raises:
        RequestError: it is not UTF-8.
    """
    return utf8(sys.stdin.buffer.read(), "standard input")


def utf8(data: bytes, where: str) -> str:
    """The bytes as text.

    Raises:
        RequestError: they are not UTF-8; says which byte, and where.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it, with iconv say"
        ) from None


SAMPLING: dict[str, tuple[Callable[[str], int | float], int | float | None, str]] = {
    "temp": (number(float, 0.0, TEMPERATURE_LIMIT), 0.0, "temperature; 0 takes the likeliest token"),
    "top-p": (number(float, 0.0, 1.0), 1.0, "keep the likeliest tokens that come to this probability"),
    "min-p": (number(float, 0.0, 1.0), 0.0, "keep tokens this likely, relative to the likeliest"),
    "top-k": (number(int, 0, 2**31 - 1), 0, "keep this many of the likeliest tokens; 0 keeps all"),
    "max-tokens": (number(int, 1, MAX_TOKENS_LIMIT), None, "longest answer, in tokens"),
    "seed": (number(int, 0, SEED_LIMIT), None, "makes sampling repeatable"),
    "repetition-penalty": (number(float, 0.01, 100.0), None, "over 1: makes the last 20 tokens less likely"),
    "presence-penalty": (number(float, -100.0, 100.0), None, "subtracted from the logits of the last 20 tokens"),
    "frequency-penalty": (number(float, -100.0, 100.0), None, "the same, once for each time that a token occurs"),
}
"""The sampling options: type, default, help. `/set` in the chat knows the same ones."""

LONG_PREFILL = 512  # tokens; a prefill longer than this tells how far it is


def add_model_options(parser: Parser) -> None:
    """Adds the options that say which model, and how it is read."""
    parser.add_argument(
        "--model",
        type=word,
        help="a folder, a Hugging Face id, or demo, the model that comes along (default: Phi-4-mini-instruct, 4 bits)",
    )
    parser.add_argument("--adapter-path", type=word, metavar="FOLDER", help="a LoRA adapter to put on the model")
    parser.add_argument("--revision", type=word, help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--verify", action="store_true", help="check every file against the package's hashes")
    parser.add_argument("--chat-format", type=word, metavar="NAME", help="override the recognised chat format")


def add_kv_bits_option(parser: Parser) -> None:
    """Adds `--kv-bits`."""
    parser.add_argument(
        "--kv-bits", type=int, choices=(4, 8), help="keep keys and values in so many bits: less memory, not quite exact"
    )


def add_decoding_options(parser: Parser) -> None:
    """Adds the options that say what is remembered of a text, and how tokens are guessed ahead."""
    add_kv_bits_option(parser)
    parser.add_argument(
        "--max-kv-size",
        type=number(int, 512, 2**31 - 1),
        metavar="N",
        help="remember at most N tokens: the first 4, and the latest; what lies between is forgotten",
    )
    parser.add_argument(
        "--speculate",
        choices=("auto", "off", "lookup"),
        default="auto",
        help="guess tokens from what the text repeats: where it pays, never, or wherever it may (default: %(default)s)",
    )
    parser.add_argument("--draft-model", type=word, metavar="MODEL", help="guess them with this smaller model instead")


def check_decoding_options(args: argparse.Namespace) -> None:
    """Sees to it that no option leaves another one nothing to do.

    Raises:
        RequestError: one does.
    """
    guesses = "--draft-model" if args.draft_model is not None else f"--speculate {args.speculate}"
    if args.draft_model is not None and args.speculate == "off":
        raise RequestError("--draft-model guesses tokens, and --speculate off forbids it; drop one")
    if args.max_kv_size is not None and guesses in ("--draft-model", "--speculate lookup"):
        raise RequestError(f"{guesses} may have to take tokens back, which --max-kv-size forgets; drop one")


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `make_cache` takes for the options."""
    return {"kv_bits": args.kv_bits, "max_kv_size": args.max_kv_size}


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load` takes for the options of `add_model_options`, besides the model's name."""
    return {name: getattr(args, name) for name in ("adapter_path", "revision", "verify", "chat_format")}


def drawing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler and the logits processors, as `generate_step` takes them, for the values of `SAMPLING`."""
    from phi4_mlx.sampling import make_logits_processors, make_sampler

    values = {name.replace("-", "_"): settings[name] for name in SAMPLING if name != "max-tokens"}
    penalties = {name: values.pop(name) for name in list(values) if name.endswith("_penalty")}
    return {"sampler": make_sampler(**values), "logits_processors": make_logits_processors(**penalties)}


def add_sampling_options(parser: Parser, max_tokens: int) -> None:
    """Adds the options of `SAMPLING`."""
    for name, (kind, default, explanation) in SAMPLING.items():
        value = max_tokens if name == "max-tokens" else default
        shown = "" if value is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=value, metavar="N", help=explanation + shown)
