"""Python files that the user names, whose functions the model may call."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from phi4_mlx.errors import Interruption, RequestError, message_of
from phi4_mlx.files.user_file import read_file


def tool_functions(name: str) -> list[Callable[..., Any]]:
    """Runs a Python file, and returns the public functions that it defines, in their order.

    Args:
        name: the file's path; `~` is the home folder.

    Raises:
        RequestError: the file cannot be read, fails, or defines no public function.
    """
    path = Path(os.path.expanduser(name)).absolute()
    source = read_file(path)
    module = ModuleType(f"tools of {path.name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and type hints look their names up there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (KeyboardInterrupt, Interruption):
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        reason = str(error.msg) if isinstance(error, SyntaxError) else message_of(error)
        where = f", line {line}" if line else ""
        raise RequestError(f"{path}{where}: {type(error).__name__}: {reason[:300]}") from None
    found = [each for name, each in vars(module).items() if _is_tool(name, each, module.__name__)]
    if not found:
        raise RequestError(f"{path} defines no function whose name begins without _; each such function is a tool")
    return found


def _is_tool(name: str, thing: Any, module: str) -> bool:
    """True for a public function that the module defines under this name; imported functions are not tools."""
    defined = inspect.isfunction(thing) and (thing.__module__, thing.__name__) == (module, name)
    return defined and not name.startswith("_")
