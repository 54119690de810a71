"""The detector of languages on all texts of the package that are in a known one, and on mixtures of them."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

import phi4_mlx.convert
from phi4_mlx.evaluation.languages.detector import UNKNOWN, detect, language_shares
from phi4_mlx.evaluation.languages.texts import LANGUAGES
from phi4_mlx.evaluation.long_context.language import load_language

CALIBRATION = Path(phi4_mlx.convert.__path__[-1]) / "calibration.jsonl"


def _conversations() -> dict[str, list[str]]:
    """Language -> the texts of its chats in the calibration set, questions and answers."""
    found: dict[str, list[str]] = {}
    for line in CALIBRATION.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "chat":
            found.setdefault(record["language"], []).extend(message["content"] for message in record["messages"])
        elif record["kind"] == "text":
            found.setdefault(record["language"], []).append(record["text"])
    return found


CONVERSATIONS = _conversations()
ANSWERS = {code: max(texts, key=len) for code, texts in CONVERSATIONS.items()}


@pytest.mark.parametrize("code", LANGUAGES)
def test_questions_and_sentences_are_in_their_language(code: str) -> None:
    language = LANGUAGES[code]
    assert len(language.questions) == 5 and len(language.sentences) == 3  # the same content in each language
    found = {text: detect(text) for text in (*language.questions, *language.sentences)}
    assert {text: each for text, each in found.items() if each != code} == {}


@pytest.mark.parametrize("code", LANGUAGES)
def test_chats_are_in_their_language_throughout(code: str) -> None:
    for text in CONVERSATIONS[code]:
        if len(text.split()) > 1 or code in ("ja", "th", "zh"):
            assert detect(text) == code, text
            assert language_shares(text)[code] > 0.9, text


@pytest.mark.parametrize("code", LANGUAGES)
def test_texts_by_another_hand_are_in_their_language(code: str) -> None:
    """The sentences of long-context, which the lists of words were not made for."""
    sentences = load_language(code).filler
    for part in (sentences, sentences[:12], sentences[12:]):
        assert language_shares(" ".join(part)).get(code, 0) > 0.95


@pytest.mark.slow
def test_two_languages_in_turn_are_both_found() -> None:
    """Every pair; close ones, such as Danish and Norwegian, are told apart sentence by sentence."""
    missed = []
    for one, two in permutations(ANSWERS, 2):
        shares = language_shares(f"{ANSWERS[one]}\n{ANSWERS[two]}")
        if min(shares.get(one, 0), shares.get(two, 0)) < 0.05 or shares[one] + shares[two] < 0.8:
            missed.append((one, two, shares))
    assert missed == []


@pytest.mark.parametrize(
    ("one", "two"), [("da", "no"), ("da", "sv"), ("no", "sv"), ("cs", "pl"), ("es", "pt"), ("ru", "uk"), ("ja", "zh")]
)
def test_close_languages_are_told_apart(one: str, two: str) -> None:
    for code, other in ((one, two), (two, one)):
        for text in (ANSWERS[code], LANGUAGES[code].sample):
            assert language_shares(text).get(other, 0) < 0.05, (code, other)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", UNKNOWN),
        ("12 + 30 = 42 ✓", UNKNOWN),
        ("Xqzt vrrm plkj wwfg hhtr.", UNKNOWN),
        ("```python\nfor each in the_list: print(each)\n```", UNKNOWN),
        ("Siehe https://example.com/the/and/of/to. Das ist die Seite, die ich meine.", "de"),
        ("Saya tidak tahu apa yang harus saya lakukan dengan buku ini karena bahasanya sulit.", UNKNOWN),
        (
            "Biblioteca se deschide la ora nouă și rămâne deschisă până seara târziu. Oricine poate împrumuta cărți, "
            "chiar și cei care abia s-au mutat aici, dacă știu ce să caute.",
            UNKNOWN,
        ),
        ("Hotel Bristol, Grand Plaza, Park Inn, Savoy, Ritz und Adlon, Marriott, Hilton, Sheraton, Kempinski", UNKNOWN),
        ("Ich heiße Łukasz und komme aus Århus, wo ich als Kind gelebt habe.", "de"),
        ("ＴＨＥ ＬＩＢＲＡＲＹ ＩＳ ＯＰＥＮ ＡＮＤ ＴＨＥ ＤＯＯＲ ＩＳ ＮＯＴ", "en"),
        ("営業部　田中様\nお世話になっております。", "ja"),
        ("住居環境・交通利便性・生活費\n引っ越す前に、これらを確かめてください。", "ja"),
        ("USBとSSDのどちらにも対応しています。", "ja"),
        ("圖書館早上九點開門，任何人都可以借書。", "zh"),
    ],
)
def test_texts_at_the_edge(text: str, language: str) -> None:
    assert detect(text) == language


def test_a_chinese_sentence_in_a_japanese_text_is_chinese() -> None:
    shares = language_shares("図書館は九時に開きます。任何人都可以在这里免费借书和看报。夜遅くまで開いています。")
    assert shares["zh"] > 0.2 and shares["ja"] > 0.5


def test_long_texts_without_a_space_take_no_longer_for_it() -> None:
    """Regular expressions would run in the square of the length."""
    assert detect("任何人都可以借书" * 5000) == "zh"
    assert detect("a" * 40_000) == detect("a.b-" * 10_000) == UNKNOWN


def test_shares_add_up() -> None:
    for text in ANSWERS.values():
        assert sum(language_shares(text).values()) == pytest.approx(1)
