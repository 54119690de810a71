"""Transcripts as json, text, srt, vtt and verbose_json, the formats of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]
FORMATS: tuple[Format, ...] = ("json", "text", "srt", "vtt", "verbose_json")


@dataclass(frozen=True)
class Segment:
    """The text of a part of a sound.

    Attributes:
        start: in seconds from the beginning of the sound.
        end: likewise.
        text: without spaces around it.
    """

    start: float
    end: float
    text: str


def render(
    segments: Sequence[Segment],
    form: Format,
    *,
    duration: float,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
) -> str:
    """Writes a transcript in one of `FORMATS`.

    Args:
        segments: in the order of time.
        form: the format.
        duration: of the sound, in seconds.
        language: of the text, as an English name; None if it is unknown.
        task: what was asked of the model.

    Returns:
        The text of a file, with a line feed at its end.
    """
    if form == "srt":
        return "".join(
            f"{number}\n{_time(each.start, ',')} --> {_time(each.end, ',')}\n{_one_line(each.text)}\n\n"
            for number, each in enumerate(segments, 1)
        )
    if form == "vtt":
        cues = (
            f"{_time(each.start, '.')} --> {_time(each.end, '.')}\n{_escaped(_one_line(each.text))}\n\n"
            for each in segments
        )
        return "WEBVTT\n\n" + "".join(cues)
    text = plain_text(segments)
    if form == "text":
        return f"{text}\n"
    fields: dict[str, object] = {"text": text}
    if form == "verbose_json":
        known = language.lower() if language is not None else None
        fields = {"task": task, "language": known, "duration": round(duration, 3), "text": text}
        fields["segments"] = [
            {"id": number, "start": round(each.start, 3), "end": round(each.end, 3), "text": each.text}
            for number, each in enumerate(segments)
        ]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def plain_text(segments: Sequence[Segment]) -> str:
    """The text of all segments; a language without spaces between words has none between segments."""
    text = ""
    for segment in segments:
        spaced = text and segment.text and not (_is_unspaced(text[-1]) and _is_unspaced(segment.text[0]))
        text += (" " if spaced else "") + segment.text
    return text


def _is_unspaced(letter: str) -> bool:
    """True for letters and punctuation of Chinese and Japanese."""
    return "\u3000" <= letter <= "\u9fff" or "\uff00" <= letter <= "\uffef"


def _time(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}{point}{thousandths:03}"


def _one_line(text: str) -> str:
    """The text without line breaks: an empty line would end a subtitle; nor the arrow between its times."""
    return " ".join(text.split()).replace("-->", "->")


def _escaped(text: str) -> str:
    """The text without the markup of WebVTT."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
