"""JSON objects on disk, read with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi4_mlx.errors import ConfigError

JsonObject = dict[str, Any]
"""A parsed JSON object: any JSON value by name."""


def read_json(path: Path, if_missing: str = "") -> JsonObject:
    """Reads a JSON object from a file.

    Args:
        path: the file.
        if_missing: advice that ends the message when the file does not exist; empty for no advice.

    Raises:
        ConfigError: the file is missing, cannot be read, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist" + (f"; {if_missing}" if if_missing else "")) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
