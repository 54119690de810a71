"""Files that the user names for a command: functions that the model may call, a schema that it must obey."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    pass


def tool_functions(name: str) -> list[Callable[..., Any]]:
    """The public functions that a Python file defines, in its order; the file is run for them, and no other is.

    Raises:
        RequestError: it cannot be read, fails, or defines none.
    """
    path = Path(os.path.expanduser(name)).absolute()
    source = _read(path)
    module = ModuleType(f"tools of {path.name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and type hints look their names up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        where = f", line {line}" if line else ""
        raise RequestError(f"{path}{where}: {type(error).__name__}: {' '.join(said.split())}") from None
    found = [each for name, each in vars(module).items() if _is_tool(name, each, module.__name__)]
    if not found:
        raise RequestError(f"{path} defines no function whose name begins without _; each such function is a tool")
    return found


def _is_tool(name: str, thing: Any, module: str) -> bool:
    """Whether it is a function that the module defines under this name; one that it imports is not for the model."""
    defined = inspect.isfunction(thing) and (thing.__module__, thing.__name__) == (module, name)
    return defined and not name.startswith("_")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in its name
        raise RequestError(f"{str(path)!r} cannot be read: {error}") from None
