"""The languages of Phi-4-mini, each with the same sentences and questions, written for this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.suggestion import suggestion


@dataclass(frozen=True)
class Language:
    """A language.

    Attributes:
        code: of ISO 639-1.
        name: in English.
        sentences: a short text.
        questions: that are easy to answer at some length.
    """

    code: str
    name: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def sample(self) -> str:
        """The sentences and questions, one a line: the same content in each language."""
        return "\n".join([*self.sentences, *self.questions])


def _read() -> dict[str, Language]:
    entries = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
    return {
        code: Language(code, entry["name"], tuple(entry["sentences"]), tuple(entry["questions"]))
        for code, entry in entries.items()
    }


# By code, in its order. Source: the list of languages on Phi-4-mini-instruct's model card.
LANGUAGES = _read()


def chosen(codes: Sequence[str]) -> list[Language]:
    """The languages of some codes.

    Args:
        codes: codes or English names, in any case; none for all languages.

    Returns:
        The languages, each once, in the order of `LANGUAGES`.

    Raises:
        RequestError: a language is unknown; names the nearest.
    """
    by_name = {language.name.lower(): code for code, language in LANGUAGES.items()}
    wanted = set()
    for given in codes:
        code = by_name.get(given.strip().lower(), given.strip().lower())
        if code not in LANGUAGES:
            near = suggestion(code, [*by_name]) if len(code) > 3 else suggestion(code, [*LANGUAGES])
            raise RequestError(f"language {given!r:.40} is unknown; known are {', '.join(LANGUAGES)}{near}")
        wanted.add(code)
    return [language for code, language in LANGUAGES.items() if not wanted or code in wanted]
