"""The committed table of tokens, and the tables made of it."""

from __future__ import annotations

import unicodedata

import pytest

from phi4_mlx.evaluation.languages import token_table
from phi4_mlx.evaluation.languages.texts import LANGUAGES
from tests.data import o200k

ABOUT, DECLARATION, SAMPLES = token_table.read()
NAMES = ["o200k", "Llama-3", "Qwen 2.5", "Phi-3.5"]


def ratio(code: str, name: str) -> float:
    tokens = DECLARATION[code].tokens
    return round(tokens[name] / tokens["o200k"], 2)


def test_it_has_every_language_and_tokenizer() -> None:
    assert [*DECLARATION] == [*SAMPLES] == [*LANGUAGES] and len(LANGUAGES) == 23
    assert [*ABOUT["tokenizers"]] == NAMES
    assert all([*count.tokens] == NAMES for counts in (DECLARATION, SAMPLES) for count in counts.values())


def test_the_declaration_costs_what_was_measured_before() -> None:
    """Figures found with other code on the same texts."""
    total = token_table.total(DECLARATION, "o200k")
    assert [round(token_table.total(DECLARATION, name) / total, 2) for name in NAMES] == [1.0, 1.19, 1.19, 1.57]
    assert [ratio(code, "Llama-3") for code in ("ja", "uk", "cs", "tr")] == [0.85, 0.91, 0.95, 0.97]
    assert [ratio(code, "Qwen 2.5") for code in ("zh", "ja", "he")] == [0.76, 0.82, 0.98]
    price = token_table.price(DECLARATION, "o200k")
    assert sorted(price, key=price.__getitem__)[-2:] == ["th", "hu"] and price["th"] > 1.9


def test_sizes_of_the_sentences_are_those_of_the_texts() -> None:
    """The table is out of date after a change of texts.json; run make_token_table.py then."""
    for code, language in LANGUAGES.items():
        text = unicodedata.normalize("NFC", language.sample)
        assert SAMPLES[code].characters == len(text), code
        assert SAMPLES[code].words == (None if code in ("ja", "th", "zh") else len(text.split())), code


@pytest.mark.slow
def test_the_published_tokenizer_counts_as_the_table() -> None:
    tokenizer = o200k.tokenizer()
    counts = token_table.of_own(lambda text: len(tokenizer.encode(text)))
    assert {code: count.tokens["own"] for code, count in counts.items()} == {
        code: count.tokens["o200k"] for code, count in SAMPLES.items()
    }


def test_languages_without_spaces_have_no_words() -> None:
    count = token_table.count("図書館は 九時に開きます。", "ja", {"bytes": lambda text: len(text.encode())})
    assert count.words is None and count.per_word("bytes") is None
    assert count.per_character("bytes") == (12 * 3 + 1) / 13
    assert token_table.count("e\u0301te\u0301 a", "fr", {"letters": len}) == token_table.Count(2, 5, {"letters": 5})


def test_the_markdown_has_a_row_for_each_language() -> None:
    lines = token_table.markdown(token_table.of_own(len)).splitlines()
    assert len(lines) == 2 + 23 + 1 and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| language | own, a word | o200k, a word |")
    japanese = next(line for line in lines if line.startswith("| Japanese"))
    assert japanese.count("–") == 5 and "| 1.000 |" in japanese  # `len` takes a token a character
