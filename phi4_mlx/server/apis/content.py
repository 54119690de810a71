"""The content of messages as text: the parts that this model can read, and those of other models and servers.

A message has all the text of its parts, results of other servers' tools included. Thoughts are left out. A part that is
not text (an image, a sound, a file) makes every answer wrong where the user asks about it, in the messages after the
assistant's last one, and is refused there; in older messages and in results of tools a placeholder stands for it.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from phi4_mlx.server.apis.fields import Fields, shown
from phi4_mlx.server.limits import NAME_CHARS_LIMIT, PARTS_LIMIT

D = TypeVar("D")

THOUGHTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text", "summary_text")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = (
    "image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file",
    "container_upload",
)  # fmt: skip
# The fields of a part that contain text or parts with text, in reading order. What is encrypted or an id is not there.
_TEXTS = (
    "title", "url", "source", "tool_name", "query", "text", "content", "output", "stdout", "stderr", "error_code",
)  # fmt: skip


def read_text(
    fields: Fields, name: str = "content", default: D | None = None, placeholders: bool = False
) -> str | D | None:
    """The text of a field that is a string or a list of parts; the parts are joined.

    Args:
        fields: the message, or another object with content.
        name: the field.
        default: the result if the field is absent.
        placeholders: puts a placeholder for a part that is not text, instead of refusing it.
    """
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.refuse(name, f"must be text or a list of parts, not {shown(value)}")
    if all(isinstance(part, str) for part in value[:PARTS_LIMIT]):
        return "".join(fields.items(name, PARTS_LIMIT))
    return "".join(part_text(part, placeholders) for part in fields.children(name, PARTS_LIMIT))


def part_text(part: Fields, placeholders: bool = False) -> str:
    """The text of one part; empty for a thought."""
    kind = part.text("type", "text" if part.has("text") else "")
    if kind in TEXT_PARTS:
        return part.text("text", "") if placeholders else part.needed_text("text")
    if kind == "refusal":
        return part.text("refusal", "")
    if kind in THOUGHTS:
        part.ignore()
        return ""
    text = "" if _is_media(kind, part) else plain_text(part.values)
    if not text:
        if not placeholders:
            part.refuse("type", f"is {shown(kind)}; this model reads only text")
        text = f"[{kind[:NAME_CHARS_LIMIT] or 'part'} left out: this model reads only text]"
        part.ignore()
    for name in _TEXTS:
        part.get(name)  # read
    return text


def plain_text(value: Any) -> str:
    """The text in a part of any kind, such as a tool's result or a document; empty if there is none.

    Args:
        value: JSON.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(plain_text, value)))
    if not isinstance(value, dict) or value.get("type") in MEDIA:
        return ""
    if value.get("type") == "text" and isinstance(value.get("data"), str):  # the source of a document
        return str(value["data"])
    return "\n".join(filter(None, (plain_text(value.get(name)) for name in _TEXTS)))


def result_text(fields: Fields, name: str = "content") -> str:
    """The text of a tool's result: a text, parts, or any other JSON as it is."""
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, list) and all(map(_is_part, value))):
        return read_text(fields, name, placeholders=True) or ""
    if _is_part(value):
        return part_text(fields.child(name), placeholders=True)
    return json.dumps(value, ensure_ascii=False)


def read_arguments(fields: Fields, name: str = "arguments") -> str:
    """The arguments of an earlier call as the model wrote them, which need not be JSON."""
    value = fields.get(name)
    if value is None:
        return "{}"
    return (value or "{}") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("type"), str))


def _is_media(kind: str, part: Fields) -> bool:
    source = part.get("source")
    kind_of_source = source.get("type") if isinstance(source, dict) else "text"
    return kind in MEDIA or (kind == "document" and kind_of_source not in ("text", "content"))
