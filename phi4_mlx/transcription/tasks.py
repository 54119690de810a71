"""The speech tasks that the model was trained on, and the languages it hears."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    from phi4_mlx.files.json_file import JsonObject
    from phi4_mlx.tokens.media.audio import Audio

# The words of the model's card, which has none that name the spoken language: the model recognises it itself.
TRANSCRIBE = "Transcribe the audio clip into text."

NO_WORD_TIMES = "the model gives no times of words; times of segments come with srt, vtt and verbose_json"

LANGUAGES = {
    "en": "English", "zh": "Chinese", "de": "German", "fr": "French", "it": "Italian", "ja": "Japanese",
    "es": "Spanish", "pt": "Portuguese",
}  # fmt: skip
"""Languages of speech by ISO 639-1 code. Source: model card of Phi-4-multimodal-instruct."""


def translate_to(language: str) -> str:
    """The request to translate speech into a language, by its English name, in the words of the model's card."""
    return f"Translate the audio to {language}."


def language_name(given: str) -> str:
    """The English name of a language of speech, given as a code or a name.

    Raises:
        RequestError: it is not one that the model hears.
    """
    for code, name in LANGUAGES.items():
        if given.strip().lower() in (code, name.lower()):
            return name
    known = ", ".join(f"{name} ({code})" for code, name in LANGUAGES.items())
    raise RequestError(f"{given!r:.60} is not a language of speech that the model knows; it knows {known}")


def most_tokens(seconds: float) -> int:
    """The most tokens of the text of speech; fast speech has ten a second, and more are a loop of the model."""
    return 64 + round(16 * seconds)


def speech_messages(audio: Audio, task: str) -> list[JsonObject]:
    """The conversation that asks for a speech task: the sound, then the words of the task."""
    return [{"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": task}]}]
