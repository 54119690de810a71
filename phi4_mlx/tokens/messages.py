"""Messages of a conversation, checked before a chat format renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tools.json_text import json_text

ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Any) -> list[JsonObject]:
    """Checks that each message has a role and a text.

    Args:
        messages: a list or tuple, each as for `ChatFormat.render`.

    Returns:
        Copies whose "content" is a string and whose "tool_calls" are in the model's own form.

    Raises:
        RequestError: there is no message, or one is malformed; names it and the reason.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages must be a list with at least one message, not {messages!r:.100}")
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Any) -> JsonObject:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} must be an object with role and content, not {message!r:.100}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise RequestError(f"message {index} has role {role!r:.100}; the roles are {', '.join(ROLES)}")
    if "content" not in message and not calls:
        raise RequestError(f"message {index} ({role}) has no content")
    if isinstance(content, (list, tuple)):
        content = "".join(_text_part(index, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(f"message {index} ({role}) must have text as content, not {content!r:.100}")
    if calls and role != "assistant":
        raise RequestError(f"message {index} ({role}) has tool_calls; only an assistant message can have them")
    checked = {**message, "content": content or ""}
    if calls:
        try:
            checked["tool_calls"] = [_flat_call(call) for call in calls]
            json_text(checked["tool_calls"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise RequestError(
                f"message {index}: tool_calls must be a list of names with JSON arguments, not {calls!r:.100}"
            ) from None
    return checked


def _text_part(index: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RequestError(f"message {index} has a part that is not text: {part!r:.100}; this model reads only text")
    return text


def _flat_call(call: Mapping[str, Any]) -> JsonObject:
    """A call in OpenAI's form, or in the model's own, as the model writes it."""
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", {})
    if not isinstance(name, str):
        raise TypeError
    return {"name": name, "arguments": _arguments(arguments) if isinstance(arguments, str) else arguments}


def _arguments(text: str) -> Any:
    """Arguments that a model wrote: the value, or the text as it is if that is not JSON, for the model to see."""
    try:
        value = json.loads(text or "{}", strict=False)  # a model writes line breaks in strings
        json_text(value).encode()
    except (ValueError, RecursionError):  # cut, NaN, half a surrogate pair, thousands of digits
        return text
    return value
