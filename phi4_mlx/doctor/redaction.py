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
    for known in (folder, Path.home()):
        if known is not None:
            names = sorted({str(known), os.path.abspath(known), os.path.realpath(known)}, key=len, reverse=True)
            for name in names:
                text = text.replace(name, "/(path)")
    return _PATH.sub("(path)", text)[:MAX_CHARACTERS]
