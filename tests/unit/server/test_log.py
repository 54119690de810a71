"""The server's log: no text in a line forges another or steers a terminal, and writing makes nobody wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from phi4_mlx.server import log as log_module
from phi4_mlx.server.log import LOG, LogFormatter, LogHandler, logging_to

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    loggers = [LOG, logging.getLogger("uvicorn")]
    before = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, before, strict=True):
        each.setLevel(level)


def formatted(text: str, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (text,), info)  # type: ignore[arg-type]
    return LogFormatter("%(levelname)s %(message)s").format(record)


@pytest.mark.parametrize("text", ["a\n", "a\r\nb", "a\x1b[2J", "a\x9b", "a\u2028b", "a\u202eb", "a\x7f", "a\ud800"])
def test_no_text_steers_a_terminal_or_begins_a_line(text: str) -> None:
    first, *more = formatted(text).split("\n")
    assert first.startswith("WARNING a") and all(line.startswith("    ") for line in more)
    assert "".join([first, *more]).isprintable()


def test_a_traceback_is_indented() -> None:
    try:
        raise ValueError("x\n2026-11-28 00:00:00 INFO forged\x1b[31m")
    except ValueError as error:
        first, *more = formatted("broken", error).split("\n")
    assert first == "WARNING broken" and more and all(line.startswith("    ") for line in more)
    assert "".join(more).isprintable()


def lines_of(read: int) -> list[str]:
    with os.fdopen(read, encoding="utf-8") as file:
        return file.read().splitlines()


@pytest.mark.parametrize(
    ("level", "own", "others"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error", "info of uvicorn", "warning of uvicorn"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["warning", "error"]),
    ],
)
def test_levels(level: str, own: list[str], others: list[str]) -> None:
    for name in ("uvicorn", "uvicorn.error"):  # as in a new process: a server in a test may have set them
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).propagate = True
    read, write = os.pipe()
    with logging_to(write, level):
        for name in ("debug", "info", "warning", "error"):
            LOG.log(logging.getLevelName(name.upper()), "own %s", name)
            logging.getLogger("some.library").log(logging.getLevelName(name.upper()), "other %s", name)
        logging.getLogger("uvicorn.error").info("other info of uvicorn")
        logging.getLogger("uvicorn.error").warning("other warning of uvicorn")
    LOG.error("own too late")
    os.close(write)
    told = [line.split(" ", 3)[3] for line in lines_of(read)]
    assert [line.removeprefix("own ") for line in told if line.startswith("own")] == own
    assert sorted(line.removeprefix("other ") for line in told if line.startswith("other")) == sorted(others)


def test_a_reader_that_does_not_read_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LINES_LIMIT", 10)
    read, write = os.pipe()
    with logging_to(write, "info"):
        for number in range(500):
            LOG.info("%d %s", number, "x" * 2_000)
        written, left_out = [], 0
        with os.fdopen(read, encoding="utf-8") as file:
            while len(written) + left_out < 500:
                words = file.readline().split()
                if words[0] == "(then":
                    left_out += int(words[1].replace(",", ""))
                else:
                    written.append(int(words[3]))
    assert written == sorted(written) and written[0] == 0 and left_out > 400
    os.close(write)


def test_a_reader_that_is_gone_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with logging_to(write, "info"):
        LOG.info("one")
        LOG.info("two")
    os.close(write)
    with logging_to(write, "info"):  # closed
        LOG.info("three")
    assert capfd.readouterr() == ("", "")


def test_a_record_that_cannot_be_formatted_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    handler = LogHandler(write)
    for arguments in (("text",), (5,)):
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%d", arguments, None))  # type: ignore[arg-type]
    handler.close()
    os.close(write)
    assert [line.split()[-1] for line in lines_of(read)] == ["5"] and "TypeError" in capsys.readouterr().err


def test_the_last_lines_are_written() -> None:
    read, write = os.pipe()
    handler = LogHandler(write)
    for number in range(300):
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%d", (number,), None))
    handler.close()
    os.close(write)
    assert [line.split()[-1] for line in lines_of(read)] == [str(number) for number in range(300)]
