"""Error texts without paths, for a report that others read."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_CHARACTERS = 300

_WORD = r"""[^\s'",;:/\\]"""
# A folder's name may have spaces; a space before a slash begins another path.
_PATH = re.compile(rf"(?<![\w.])(?:~\w*|[A-Za-z]:)?[/\\](?:{_WORD}+(?:[ ]{_WORD}+)*[/\\])*{_WORD}*")


def redacted(text: str, folder: Path | None = None) -> str:
    """A text with "(path)" in place of each path, of at most `MAX_CHARACTERS`.

    Args:
        text: of an error.
        folder: the user's package, whose name may be any text; None for none.
    """
    known = [os.path.expanduser("~"), *([] if folder is None else [str(folder)])]
    names = {name for each in known for name in (each, os.path.abspath(each), os.path.realpath(each))} - {"/", "~"}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "/(path)")
    return _PATH.sub("(path)", text)[:MAX_CHARACTERS]
