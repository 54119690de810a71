"""JSON objects on disk, read with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi4_mlx.errors import ConfigError
from phi4_mlx.files.regular_file import SMALL_BYTES, read_regular

JsonObject = dict[str, Any]
"""A parsed JSON object: any JSON value by name."""


MAX_NESTING = 100  # JSON levels of a config; printing a value that is nested deeper could exhaust the stack


def read_json(path: Path, if_missing: str = "") -> JsonObject:
    """Reads a JSON object from a file.

    Args:
        path: the file.
        if_missing: advice that ends the message when the file does not exist; empty for no advice.

    Raises:
        ConfigError: the file is missing, cannot be read, has over `SMALL_BYTES` bytes, or does not hold a JSON object.
    """
    try:
        value = json.loads(read_regular(path, SMALL_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist" + (f"; {if_missing}" if if_missing else "")) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    if is_deeper(value, MAX_NESTING):
        raise ConfigError(f"{path} is nested more than {MAX_NESTING} levels deep; such files have a few")
    return value


def is_deeper(value: object, levels: int) -> bool:
    """True if JSON is nested more than `levels` deep."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in inner)
