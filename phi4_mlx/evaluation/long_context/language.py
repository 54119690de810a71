"""The texts of one language: filler sentences, needles and questions, from `languages/<code>.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.terminal.suggestion import suggestion

CODES = (
    "en", "ar", "zh", "cs", "da", "nl", "fi", "fr", "de", "he", "hu", "it", "ja", "ko", "no", "pl", "pt", "ru", "es",
    "sv", "th", "tr", "uk",
)  # fmt: skip
DEMO = "demo"  # the world that the embedded demo was trained on: English facts of one pattern
_FOLDER = Path(__file__).parent / "languages"


@dataclass(frozen=True)
class Language:
    """Texts of one language.

    Attributes:
        code: ISO 639-1, or `DEMO`.
        name: in English.
        joiner: what stands between two sentences.
        separator: what stands between two items of a list.
        quoted: quotation marks around "{}".
        filler: sentences without digits, keys and words.
        short: short filler sentences, which fill up to a length.
        keys: what a needle is about.
        words: values and items; none contains another.
        digits: of a number as a value.
        forms: of the values: "word", "number", "uuid".
        texts: templates of the prompt (`frame`), the needles and the questions; a kind whose templates are missing is
            not asked in this language.
    """

    code: str
    name: str
    joiner: str
    separator: str
    quoted: str
    filler: tuple[str, ...]
    short: tuple[str, ...]
    keys: tuple[str, ...]
    words: tuple[str, ...]
    digits: int
    forms: tuple[str, ...]
    texts: Mapping[str, str]


def load_language(code: str) -> Language:
    """The texts of a language.

    Args:
        code: one of `CODES`, or `DEMO`.

    Raises:
        RequestError: there is no such language; names the nearest.
    """
    if code not in (*CODES, DEMO):
        raise RequestError(
            f"--languages {code!r:.40} is not a language of long-context, which has {', '.join(CODES)}"
            f"{suggestion(code, CODES)}"
        )
    raw = read_json(_FOLDER / f"{code}.json")
    return Language(
        code=code,
        name=raw["name"],
        joiner=raw["joiner"],
        separator=raw.get("separator", ", "),
        quoted=raw.get("quoted", "{}"),
        filler=tuple(raw["filler"]),
        short=tuple(raw["short"]),
        keys=tuple(raw["keys"]),
        words=tuple(raw.get("words", ())),
        digits=raw.get("digits", 5),
        forms=tuple(raw.get("forms", ("word", "number", "uuid"))),
        texts=raw["texts"],
    )
