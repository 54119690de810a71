"""The tasks of lm-eval by name, without its own index, which reads 14,000 YAML files in 5 to 6 s."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from phi4_mlx.errors import RequestError

_KEY = re.compile(rb"^[\"']?(task|group|tag|class)[\"']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", re.M)
_NAME = re.compile(rb"[^\s\"'\[\],#]+")

MISSING = "lm-eval is not installed; install it: pip install 'lm-eval>=0.4.13'"


def tasks_folder() -> Path:
    """The folder of lm-eval's tasks.

    Raises:
        RequestError: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise RequestError(MISSING)
    return Path(spec.origin).parent / "tasks"


class Known(NamedTuple):
    """The meaning of a name of lm-eval: a "task", a "group" or a "tag"; its YAML file, None for a tag."""

    kind: str
    path: Path | None


@cache
def known_tasks() -> dict[str, Known]:
    """Every name that lm-eval has."""
    found: dict[str, Known] = {}
    for folder, _, files in os.walk(tasks_folder()):
        for file in files:
            if file.endswith((".py", ".pyc", ".md", ".json", ".txt")):
                continue
            path = Path(folder, file)
            keys = dict(_KEY.findall(path.read_bytes()))
            for name in _NAME.findall(re.sub(rb"\n[ \t]*-[ \t]*", b" ", keys.get(b"tag", b""))):
                found.setdefault(name.decode(), Known("tag", None))
            kind = "group" if b"group" in keys and b"class" not in keys else "task"
            name = _NAME.match(keys.get(kind.encode(), b"").lstrip(b"\"'"))
            if file.endswith(".yaml") and name:
                found[name[0].decode()] = Known(kind, path)
    return found
