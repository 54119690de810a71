"""The frame of every command: one line, the right exit code, a traceback only with --debug."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.errors import ConfigError, RequestError
from phi4_mlx.files.regular_file import SMALL_BYTES
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.terminal import command
from phi4_mlx.terminal.command import Parser, number, read_standard_input, run, standard_input_beside, text, utf8
from phi4_mlx.terminal.options import (
    ADVISED,
    SAMPLING,
    add_decoding_options,
    check_decoding_options,
    sampling_defaults,
)
from phi4_mlx.terminal.printable import one_line, printable
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from tests.conftest import ROOT


def run_with(work: Callable[[argparse.Namespace], None], *argv: str) -> int:
    return run(Parser(prog="phi4-mlx test", description=""), work, argv)


def failing(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def work(args: argparse.Namespace) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("rope type 'x' is not done here"), 2, "phi4-mlx test: rope type 'x' is not done here"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "phi4-mlx test: out: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "phi4-mlx test: out: Permission denied"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 2, "phi4-mlx test: rich is not installed"),
        (MemoryError(), 2, "phi4-mlx test: out of memory"),
        (ZeroDivisionError("division by zero"), 1, "phi4-mlx test: internal error: ZeroDivisionError"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: Exception, code: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_with(failing(error)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(line) and err.count("\n") == 1


def test_a_missing_library_names_the_python_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert run_with(failing(ModuleNotFoundError("No module named 'mlx'", name="mlx"))) == 2
        return capfd.readouterr().err

    checkout = tmp_path / "it's mine"  # a shell reads the advised commands as they are meant
    quoted = shlex.quote(str(checkout))
    checkout.mkdir()
    monkeypatch.setattr(command, "__file__", str(checkout / "phi4_mlx" / "terminal" / "command.py"))
    missing = f"phi4-mlx test: mlx is not installed for {sys.executable}; "
    assert said() == f"{missing}install phi4_mlx again, from its checkout: pip install .\n"
    (checkout / "Makefile").touch()
    activate = shlex.quote(f"{checkout}/.venv/bin/activate")
    assert said() == f"{missing}make -C {quoted} chat, then source {activate}\n"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "activate").touch()
    assert said() == f"{missing}source {activate}\n"


def test_no_message_advises_an_index_that_does_not_have_the_package() -> None:
    texts = [*(ROOT / "phi4_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py"), *ROOT.glob("examples/**/*.*")]
    for path in [ROOT / "README.md", *texts]:
        found = re.search(r"pip install\s+['\"]?phi4|phi4-mlx\[", path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path}: {found and found[0]}"


def test_debug_adds_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_with(failing(RequestError("no")), "--debug") == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.endswith("phi4-mlx test: no\n")


def test_an_unknown_option_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_with(lambda args: None, "--nope\nx") == 2
    assert capfd.readouterr().err == "phi4-mlx test: unrecognized arguments: --nope x; see --help\n"


def test_ctrl_c_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_with(failing(KeyboardInterrupt())) == 130
    assert capfd.readouterr() == ("", "")


def test_success_is_zero() -> None:
    assert run_with(lambda args: None) == 0


# Standard output is buffered, as for most users, even if the tests run unbuffered.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
PRINTS_MUCH = (
    "import sys; from phi4_mlx.terminal.command import Parser, run\n"
    "def work(args):\n"
    "    for _ in range(20000): print('x' * 100)\n"
    "sys.exit(run(Parser(prog='phi4-mlx test', description=''), work, []))"
)


def test_a_reader_that_leaves_gets_no_message() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS_MUCH], cwd=ROOT, env=BUFFERED, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("program", [PRINTS_MUCH, PRINTS_MUCH.replace("20000", "1")], ids=["while", "at the end"])
def test_a_full_disk_is_one_line(program: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=BUFFERED, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr == b"phi4-mlx test: No space left on device\n"


@pytest.mark.parametrize(
    "given_text", ["nan", "inf", "-inf", "-0.1", "2.1", "", "x", "1e999", "0x1", "1_0", "1" * 5000]
)
def test_numbers_outside_their_limits(given_text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 2") as refused:
        number(float, 0.0, 2.0)(given_text)
    assert len(str(refused.value)) < 100


def test_numbers_inside_their_limits() -> None:
    assert number(float, 0.0, 2.0)("2") == 2.0
    assert number(int, 1, 3)("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=r"'1.5' is not a whole number from 1 to 3,000"):
        number(int, 1, 3000)("1.5")


def test_standard_input_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (SMALL_BYTES, SMALL_BYTES + 1, 2 * SMALL_BYTES):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * size)))
        if size == SMALL_BYTES:
            assert len(read_standard_input()) == size
        else:
            with pytest.raises(RequestError, match="standard input has more than 16,777,216 bytes, the limit"):
                read_standard_input()


def test_text_that_is_not_utf8() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="UTF-8"):
        text(b"\xff".decode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match="standard input is not UTF-8: byte 0xff at offset 1"):
        utf8(b"a\xff", "standard input")
    assert utf8("é".encode(), "x") == text("é") == "é"


@given(st.text())
def test_nothing_printed_can_steer_a_terminal(anything: str) -> None:
    shown = printable(anything)
    assert not {c for c in shown if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"}
    assert "\n" not in one_line(anything)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--draft-model", "demo", "--speculate", "off"], "--draft-model guesses tokens, and --speculate off forbids"),
        (["--draft-model", "demo", "--max-kv-size", "512"], "--draft-model may have to take tokens back, and --max"),
        (["--speculate", "lookup", "--max-kv-size", "512"], "--speculate lookup may have to take tokens back, and"),
        (["--max-kv-size", "512"], ""),
        (["--draft-model", "demo"], ""),
        (["--speculate", "off", "--max-kv-size", "512"], ""),
    ],
)
def test_an_option_without_effect_is_refused(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="phi4-mlx test", description="")
    add_decoding_options(parser)
    assert run(parser, check_decoding_options, options) == (2 if complaint else 0)
    assert complaint in capsys.readouterr().err


def test_the_defaults_of_the_command_line_are_those_of_python() -> None:
    assert Sampling.of({name: option.default for name, option in SAMPLING.items()}) == Sampling()


@pytest.mark.parametrize("name", sorted(SAMPLING.keys() - {"max-tokens"}))
def test_the_command_line_and_the_samplers_have_the_same_limits(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        SAMPLING[name].parse("nan")
    low, high = (end.replace(",", "") for end in str(refused.value).rpartition(" from ")[2].split(" to "))
    for end, beyond in ((low, -1), (high, 1)):
        value = SAMPLING[name].parse(end)
        for setting, fits in ((value, True), (value + beyond, False)):
            sampling = Sampling.of({"temp": 1, name: setting})
            with contextlib.nullcontext() if fits else pytest.raises(RequestError):
                sampling.sampler()
                sampling.processors()


@pytest.mark.parametrize(("written", "prompt"), [("text\n", "Sum\n\ntext"), ("", "Sum"), (" \n", "Sum"), (None, "Sum")])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_text_on_standard_input_follows_the_prompt(
    written: str | None, prompt: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a pipe to which nobody writes, and which stays open."""
    if kind == "file":
        (tmp_path / "in").write_text(written or "")
        source = open(tmp_path / "in")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        source = os.fdopen(reader)
        if written is not None:
            os.write(writer, written.encode())
            os.close(writer)
    monkeypatch.setattr("sys.stdin", source)
    assert standard_input_beside("Sum") == prompt
    source.close()
    if kind == "pipe" and written is None:
        os.close(writer)


def test_the_help_names_the_defaults_of_the_models_that_have_their_own() -> None:
    for module in ("chat.__main__", "commands.generate", "server.__main__"):
        parser: Parser = importlib.import_module(f"phi4_mlx.{module}")._parser()
        shown = " ".join(parser.format_help().split())
        for name, values in ADVISED.items():
            for option, value in values.items():
                assert f"{value:g} for {name}" in shown or (module == "server.__main__" and option != "max-tokens")


def test_what_authors_advise_is_for_known_formats_and_allowed_values() -> None:
    assert ADVISED.keys() <= CHAT_FORMATS.keys() and all(CHAT_FORMATS[name].reasons for name in ADVISED)
    for name, values in ADVISED.items():
        assert all(SAMPLING[option].parse(str(value)) == value for option, value in values.items())
        assert sampling_defaults(name, 5) == sampling_defaults("phi4-mini", 5) | values
