"""Events, the values that the bridge returns: dicts of plain types, as they go into JSON.

"event" names the kind: "thought", "token", "tool_call", "wait", or one of `LAST`, which ends a stream.
"""

from __future__ import annotations

from typing import Any

BridgeEvent = dict[str, Any]

LAST = ("finish", "error")


def error_event(error: BaseException) -> BridgeEvent:
    """The event of an exception.

    Its "code" is "request", "config", "checkpoint", "tokenizer", "file", "memory", "missing" (a package) or "internal".
    """
    from phi4_mlx.errors import Phi4Error, message_of

    text = message_of(error)
    if isinstance(error, Phi4Error):
        return _error(type(error).__name__.removesuffix("Error").lower(), text)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _error("file", f"{where}{error.strerror or text}")
    if isinstance(error, MemoryError):
        return _error("memory", "out of memory; a smaller model or prompt needs less")
    if isinstance(error, ModuleNotFoundError):
        return _error("missing", f"{error.name} is not installed")
    return _error("internal", f"{type(error).__name__}: {text}")


def refusal(message: str) -> BridgeEvent:
    """The error event of a malformed request."""
    return _error("request", " ".join(message.split()))


def _error(code: str, message: str) -> BridgeEvent:
    return {"event": "error", "code": code, "message": message}
