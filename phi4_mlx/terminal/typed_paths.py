"""Paths of files in a line that a person typed: dragged into the terminal, pasted, or written in a sentence."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import unquote

_LONGEST = 4096  # characters of a path: PATH_MAX on Linux; macOS has 1024
_END_MARKS = "?!.,;:)"  # of a sentence, right behind a path in it

# A dragged file is pasted in quotes, with ' as '\'', or with a backslash before each special character.
_QUOTED = r"""(?:'[^'\n]*'(?:\\.'[^'\n]*')*|"(?:\\.|[^"\\\n])*")(?![^\s?!.,;:)])"""
_WORD = re.compile(rf"(?<![^\s(])(?:{_QUOTED}|(?:\\[^\n]|[^\s\\(])(?:\\[^\n]|[^\s\\])*)")


class TypedPath(NamedTuple):
    """A path in a text.

    Attributes:
        start, end: of its characters in the text, quotes included.
        path: without quotes, escapes and `file://`, with ~ expanded.
    """

    start: int
    end: int
    path: str


def find_paths(text: str, accepts: Callable[[str], bool]) -> list[TypedPath]:
    """The absolute paths in a text that `accepts` is true for, in order: a whole line, or words.

    Args:
        text: as typed.
        accepts: called with a path.
    """
    found = []
    for line in re.finditer(r"[^\n]+", text):
        whole = line.group().strip()
        start = line.start() + line.group().index(whole) if whole else 0
        spans = [(start, start + len(whole))]  # a path with spaces, as file managers copy it
        if not any(accepts(path) for path in _readings(whole)):
            spans = [(line.start() + word.start(), line.start() + word.end()) for word in _WORD.finditer(line.group())]
        found += [each for span in spans for each in _accepted(text, *span, accepts)]
    return found


def _accepted(text: str, start: int, end: int, accepts: Callable[[str], bool]) -> Iterator[TypedPath]:
    """The path between two places of a text, with or without the marks at its end; or nothing."""
    word = text[start:end]
    for written in dict.fromkeys((word, word.rstrip(_END_MARKS))):
        for path in _readings(written):
            if accepts(path):
                yield TypedPath(start, start + len(written), path)
                return


def _readings(word: str) -> Iterator[str]:
    """The absolute paths that a word may mean."""
    if len(word) > _LONGEST or not word.startswith(("/", "~", "file://", "'", '"')):
        return
    plain = re.sub(r"\\(.)", r"\1", word)
    if word[0] in "'\"":
        try:
            (plain,) = shlex.split(word)
        except ValueError:  # no closing quote, or more words than one
            return
    for path in map(local_path, dict.fromkeys((plain, word))):
        if os.path.isabs(path) and "\0" not in path:
            yield path


def local_path(written: str) -> str:
    """A path as it was written: also as a file:// URL, or with ~ for the home folder."""
    if written.startswith("file://"):
        written = unquote(written.removeprefix("file://").removeprefix("localhost"))
    return os.path.expanduser(written)
