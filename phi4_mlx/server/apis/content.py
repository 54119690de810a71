"""The content of messages: the parts that this model can read, and those of other models and servers.

A message has all the text of its parts, results of other servers' tools included, and its pictures and sounds if the
model takes them. Thoughts are left out. A part that cannot be read (a file, or an image for a text-only model) makes
every answer wrong where the user asks about it, in the messages after the assistant's last one, and is refused there;
in older messages and in results of tools a placeholder stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeAlias, TypeVar

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.server.apis.fields import Fields, shown
from phi4_mlx.server.apis.media_part import FORMS, attachment
from phi4_mlx.server.apis.wire import WireError
from phi4_mlx.server.limits import NAME_CHARS_LIMIT, PARTS_LIMIT

D = TypeVar("D")
Content: TypeAlias = str | list[JsonObject]  # a text, or parts of the types text, image and audio

READS_TEXT = "only text"
READS_MEDIA = "only text, images and audio"

THOUGHTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text", "summary_text")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = (
    "image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file",
    "input_file", "container_upload",
)  # fmt: skip
# The fields of a part that contain text or parts with text, in reading order. What is encrypted or an id is not there.
_TEXTS = (
    "title", "url", "source", "tool_name", "query", "text", "content", "output", "stdout", "stderr", "error_code",
)  # fmt: skip


def read_content(
    fields: Fields, name: str = "content", default: D | None = None, placeholders: bool = False, media: bool = False
) -> Content | D | None:
    """The content of a field that is a string or a list of parts; texts that follow each other are joined.

    Args:
        fields: the message, or another object with content.
        name: the field.
        default: the result if the field is absent.
        placeholders: puts a placeholder for a part that cannot be read, instead of refusing it.
        media: True if pictures and sounds can be read.

    Returns:
        A text; where there are pictures or sounds, parts, as `joined` returns them.
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
    return joined(part_content(part, placeholders, media) for part in fields.children(name, PARTS_LIMIT))


def joined(contents: Iterable[Content]) -> Content:
    """Contents one behind the other: a text, or parts if there is a picture or a sound among them."""
    parts: list[JsonObject] = []
    for content in contents:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return [part for part in parts if part.get("text") != ""] or ""


def part_content(part: Fields, placeholders: bool = False, media: bool = False) -> Content:
    """One part: its text, or a list with its picture or sound, whose bytes are an `Attachment`."""
    kind = part.text("type", "text" if part.has("text") else "")
    if not media or kind not in FORMS or not _is_media(kind, part):
        return part_text(part, placeholders, READS_MEDIA if media else READS_TEXT)
    try:
        found = attachment(part, kind)
    except WireError:
        if not placeholders:
            raise
        part.ignore()
        return f"[{kind} left out: it cannot be read here]"
    return [{"type": found.kind, found.kind: found}]


def part_text(part: Fields, placeholders: bool = False, reads: str = READS_TEXT) -> str:
    """The text of one part; empty for a thought.

    Args:
        part: the part.
        placeholders: as for `read_content`.
        reads: the kinds of parts that the model reads, for messages.
    """
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
            part.refuse("type", f"is {shown(kind)}; this model reads {reads}")
        text = f"[{kind[:NAME_CHARS_LIMIT] or 'part'} left out: this model reads {reads}]"
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


def result_content(fields: Fields, name: str = "content", media: bool = False) -> Content:
    """A tool's result: a text, parts, or any other JSON as it is."""
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, list) and all(map(_is_part, value))):
        return read_content(fields, name, placeholders=True, media=media) or ""
    if _is_part(value):
        return part_content(fields.child(name), placeholders=True, media=media)
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
