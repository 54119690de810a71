"""OpenAI's /v1/audio/transcriptions and /v1/audio/translations: parses their forms, and formats answers and streams.

Source: https://platform.openai.com/docs/api-reference/audio
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.apis.fields import Fields
from phi4_mlx.server.apis.wire import Ask, WireError, error_body, sse
from phi4_mlx.server.limits import FORM_VALUE_BYTES, NAME_CHARS_LIMIT
from phi4_mlx.transcription.formats import FORMATS, Format, Segment, plain_text, render
from phi4_mlx.transcription.tasks import TRANSCRIBE, language_name, translate_to

Task = Literal["transcribe", "translate"]
TARGET = "English"  # of a translation

# Fields that have an effect on other servers' models alone.
_ONLY_ELSEWHERE = ("prompt", "include", "keywords", "known_speaker_names", "known_speaker_references", "languages")


@dataclass(frozen=True)
class SpeechAsk:
    """A request for a transcript.

    Attributes:
        ask: the model, the sampling settings, `stream`, and what has no effect.
        task: "transcribe", or "translate" into English.
        words: the task in the words that the model knows.
        form: of the answer.
        language: of the text, as an English name; None if it is unknown.
    """

    ask: Ask
    task: Task
    words: str
    form: Format
    language: str | None


def parse(given: Sequence[tuple[str, str]], task: Task) -> SpeechAsk:
    """Parses the fields of a form.

    Args:
        given: (name, text) of each field but the file.
        task: of the route.

    Raises:
        WireError: a field is malformed; names it.
    """
    fields = Fields(_values(given))
    form = fields.one_of("response_format", FORMATS, "json")
    for each in fields.texts("timestamp_granularities", 8, NAME_CHARS_LIMIT):
        if each != "segment":
            why = "has 'word'; times are those of segments" if each == "word" else "must be segment"
            fields.refuse("timestamp_granularities", why)
    language = _language(fields) if task == "transcribe" else TARGET
    if fields.get("chunking_strategy") != "auto" and fields.has("chunking_strategy"):
        fields.ignore("chunking_strategy")
    for name in _ONLY_ELSEWHERE:
        if fields.has(name):
            fields.ignore(name)
    ask = Ask(
        model=fields.text("model", "", 0, NAME_CHARS_LIMIT),
        sampling=Sampling(temp=_number(fields, "temperature")),
        stream=_boolean(fields, "stream"),
        ignored=fields.ignored.paths(),  # last, when all else is read
    )
    known = next(each for each in FORMATS if each == form)
    return SpeechAsk(ask, task, TRANSCRIBE if task == "transcribe" else translate_to(TARGET), known, language)


def _values(given: Sequence[tuple[str, str]]) -> JsonObject:
    """The fields as an object; lists are sent as repeated fields, whose names may end with brackets."""
    values: dict[str, Any] = {}
    for name, text in given:
        name = name.removesuffix("[]")
        if name in ("timestamp_granularities", *_ONLY_ELSEWHERE[1:]):
            values.setdefault(name, []).append(text)
        elif name in values:
            raise WireError(400, f"the form has {name!r:.80} twice", name)
        elif text:
            values[name] = text
    return values


def _language(fields: Fields) -> str | None:
    """The language that a client names; the model finds it out by itself, and hears a few."""
    given = fields.text("language", "", 0, NAME_CHARS_LIMIT)
    try:
        return language_name(given.partition("-")[0]) if given else None  # "en-GB"
    except RequestError:
        fields.ignore("language")
        return None


def _number(fields: Fields, name: str) -> float:
    text = fields.text(name, "0", 0, NAME_CHARS_LIMIT)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        fields.refuse(name, f"must be a number from 0 to 1, not {text!r:.60}")
    return value


def _boolean(fields: Fields, name: str) -> bool:
    text = fields.text(name, "false", 0, FORM_VALUE_BYTES).lower()
    if text not in ("true", "false", "1", "0"):
        fields.refuse(name, f"must be true or false, not {text!r:.60}")
    return text in ("true", "1")


@dataclass
class Transcript:
    """The answer to a request, which grows by pieces of text.

    Attributes:
        speech: the request.
        seconds: the duration of the sound.
        segments: that are complete.
        audio_tokens, prompt_tokens, answer_tokens: of all parts so far.
    """

    speech: SpeechAsk
    seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    audio_tokens: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    _sent: str = ""

    def body(self) -> tuple[bytes, str]:
        """(the whole answer, its content type)."""
        speech = self.speech
        text = render(self.segments, speech.form, duration=self.seconds, language=speech.language, task=speech.task)
        if speech.form not in ("json", "verbose_json"):
            return text.encode(), "text/plain; charset=utf-8"
        seconds = {"type": "duration", "seconds": round(self.seconds, 3)}
        usage = self._usage() if speech.form == "json" else seconds
        return json.dumps({**json.loads(text), "usage": usage}, ensure_ascii=False).encode(), "application/json"

    @property
    def heartbeat(self) -> bytes:
        """A comment, which keeps the connection open while a sound is read."""
        return b": \n\n"

    def opening(self) -> bytes:
        """Nothing: a stream begins with its first text."""
        return b""

    def chunk(self, open_text: str) -> bytes:
        """The event for what has come since the last one.

        Args:
            open_text: of the first part that is not complete.
        """
        whole = plain_text([*self.segments, Segment(0.0, 0.0, open_text.strip())])
        new, self._sent = whole[len(self._sent) :], whole
        return sse({"type": "transcript.text.delta", "delta": new}) if new else b""

    def closing(self) -> bytes:
        """The last event of a stream."""
        return sse({"type": "transcript.text.done", "text": plain_text(self.segments), "usage": self._usage()})

    def failure(self, error: WireError) -> bytes:
        """The event that ends a stream which failed."""
        return sse(error_body(error))

    def _usage(self) -> JsonObject:
        return {
            "type": "tokens",
            "input_tokens": self.prompt_tokens,
            "input_token_details": {
                "audio_tokens": self.audio_tokens,
                "text_tokens": self.prompt_tokens - self.audio_tokens,
            },
            "output_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
        }
