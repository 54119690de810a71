"""Messages of a conversation, checked before a chat format renders them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.tokens.prompt import READS_ONLY_TEXT, AbsentMedium, MediaSettings, Medium
from phi4_mlx.tools.json_text import json_text

ROLES = ("system", "user", "assistant", "tool")
MAX_IMAGES = 64  # of a prompt; the model card's limit
_SOURCES = ("path", "url", "base64")  # of a part, beside the name of its type


def check_messages(messages: Any, media: MediaSettings | None = None) -> list[JsonObject]:
    """Checks that each message has a role and a content, and reads its media.

    Args:
        messages: a list or tuple, each {"role": "system" | "user" | "assistant" | "tool", "content": text or parts};
            an assistant's may have "tool_calls" in OpenAI's form. A part is {"type": "text", "text": text},
            {"type": "image", "image": source} or {"type": "audio", "audio": source}, where a source is anything that
            `read_image` or `read_audio` takes; or, in place of "image" and "audio", "path", "base64" or "url" with a
            data: URL. URLs of the web are never fetched.
        media: what the model reads beside text; None for text alone.

    Returns:
        Copies whose "content" is a string, or a list of strings and media where there are media, and whose "tool_calls"
        are in the model's own form.

    Raises:
        RequestError: there is no message, or one is malformed, or a medium cannot be read; names it and the reason.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages must be a list with at least one message, not {messages!r:.100}")
    if media is not None:
        _check_image_parts(messages)  # before any is read
    return [_checked_message(index, message, media) for index, message in enumerate(messages)]


def check_media_count(media: Iterable[Medium]) -> None:
    """Raises RequestError for more than `MAX_IMAGES` pictures."""
    _check_image_count(sum(medium.kind == "image" for medium in media))


def _check_image_parts(messages: Iterable[Any]) -> None:
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    kinds = [part.get("type") if isinstance(part, Mapping) else getattr(part, "kind", None) for part in parts]
    _check_image_count(kinds.count("image"))


def _check_image_count(count: int) -> None:
    if count > MAX_IMAGES:
        raise RequestError(f"the prompt has {count} pictures, and the model reads at most {MAX_IMAGES}; leave some out")


def _checked_message(index: int, message: Any, media: MediaSettings | None) -> JsonObject:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {index} must be an object with role and content, not {message!r:.100}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise RequestError(f"message {index} has role {role!r:.100}; the roles are {', '.join(ROLES)}")
    if "content" not in message and not calls:
        raise RequestError(f"message {index} ({role}) has no content")
    if isinstance(content, (list, tuple)):
        content = _joined([_piece(index, part, media) for part in content])
        if role == "assistant" and not isinstance(content, str):
            raise RequestError(f"message {index} (assistant) has media; the model writes only text")
    elif content is not None and not isinstance(content, str):
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


def _joined(pieces: list[str | Medium]) -> str | list[str | Medium]:
    """One text if there are no media, else texts and media, with texts in a row as one."""
    content: list[str | Medium] = []
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        run = [*group]
        content += ["".join(map(str, run))] if is_text else run
    return "".join(map(str, content)) if all(isinstance(piece, str) for piece in content) else content


def _piece(index: int, part: Any, media: MediaSettings | None) -> str | Medium:
    """The text or the medium of a part, which may have been checked before."""
    if isinstance(part, str):
        return part
    if hasattr(part, "digest"):
        part = {"type": part.kind, part.kind: part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if media is None:
        raise RequestError(f"message {index} has a part that is not text: {part!r:.100}; this model {READS_ONLY_TEXT}")
    if kind not in ("image", "audio"):
        raise RequestError(
            f"message {index} has a part that is neither text, image nor audio: {part!r:.100}; a part is an object "
            'like {"type": "text", "text": "..."} or {"type": "image", "path": "..."}'
        )
    given = [name for name in (kind, *_SOURCES) if part.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RequestError(
            f"message {index}: a part of type {kind} has one of {kind}, path, url, base64; it has {found}"
        )
    try:
        return _read(kind, given[0], part[given[0]], media)
    except RequestError as error:
        raise RequestError(f"message {index}: {error}") from None


def _read(kind: str, name: str, source: Any, media: MediaSettings) -> Medium:
    """The medium at a source, given under that name."""
    if isinstance(source, AbsentMedium) and source.kind == kind:
        return source
    if name in _SOURCES and not isinstance(source, str) and not (name == "path" and hasattr(source, "__fspath__")):
        raise RequestError(f"the {name} of an {kind} part must be a text, not {source!r:.60}")
    if name in ("url", "base64"):
        from phi4_mlx.tokens.media.data_url import base64_bytes, url_bytes

        source = url_bytes(source) if name == "url" else base64_bytes(source)
    if kind == "image":
        from phi4_mlx.tokens.media.image import read_image

        return read_image(source, crop_size=media.crop_size, max_crops=media.max_crops)
    from phi4_mlx.tokens.media.audio import read_audio

    return read_audio(source)


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
