"""The texts of each language keep the rules that marks and depths depend on."""

from __future__ import annotations

import string
import unicodedata

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.long_context.language import CODES, DEMO, load_language
from phi4_mlx.evaluation.long_context.mark import normalised
from phi4_mlx.evaluation.long_context.problem import KINDS

FIELDS = {
    "frame": {"text", "question"},
    "needle": {"key", "value"},
    "another": {"key", "value"},
    "ask_value": {"key"},
    "ask_values": {"key"},
    "ask_keys": {"keys"},
    "set": {"name", "value"},
    "copy": {"name", "other"},
    "ask_last": {"name"},
    "ask_names": {"value"},
    "item": {"word"},
    "ask_count": {"word"},
    "ask_common": set(),
}
# A letter of each script that is not Latin.
SCRIPTS = {
    "ar": "ARABIC", "he": "HEBREW", "ja": "HIRAGANA", "ko": "HANGUL", "ru": "CYRILLIC", "th": "THAI", "uk": "CYRILLIC",
    "zh": "CJK",
}  # fmt: skip


def test_there_are_22_languages_and_english() -> None:
    assert len(set(CODES)) == 23 and "en" in CODES


@pytest.mark.parametrize("code", [*CODES, DEMO])
def test_nothing_in_the_filler_can_be_taken_for_a_needle(code: str) -> None:
    language = load_language(code)
    templates = " ".join(language.texts.values())
    for text in (*language.filler, *language.short, templates):
        assert not any(unicodedata.decimal(char, "") != "" for char in text), text
        plain = normalised(text, code)
        for hidden in (*language.keys, *language.words):
            assert normalised(hidden, code) not in plain, (hidden, text)
    for values in (language.words, language.keys):
        plains = [normalised(value, code) for value in values]
        assert len(set(plains)) == len(values)
        assert not [(a, b) for a in plains for b in plains if a != b and a in b]
    assert not [(word, key) for word in language.words for key in language.keys if word.casefold() in key.casefold()]


@pytest.mark.parametrize("code", [*CODES, DEMO])
def test_texts_are_whole_normalised_and_in_their_script(code: str) -> None:
    language = load_language(code)
    for name, text in language.texts.items():
        assert {field for _, field, _, _ in string.Formatter().parse(text) if field} == FIELDS[name], name
    everything = [*language.filler, *language.short, *language.keys, *language.words, *language.texts.values()]
    assert all(text == unicodedata.normalize("NFC", text).strip() for text in everything)
    assert len(set(language.filler)) == len(language.filler) >= 16
    script = SCRIPTS.get(code, "LATIN")
    for text in (*language.filler, *language.short):
        assert any(unicodedata.name(char, "").startswith(script) for char in text), text
    if code != DEMO:
        assert set(language.texts) == set(FIELDS)
        assert all(kind.forms_in(language) for kind in KINDS.values())


def test_an_unknown_language_gets_the_nearest_names() -> None:
    with pytest.raises(RequestError, match=r"'us'.*has en, ar, zh.*; did you mean"):
        load_language("us")
