"""Tokens a word and a character in each language: a committed table of four tokenizers, and any other beside them.

tokens.json is made by tests/conformance/make_token_table.py, which says what is counted.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.evaluation.languages.texts import LANGUAGES

FILE = Path(__file__).with_name("tokens.json")

# Languages whose words are not separated by white space.
UNSPACED = frozenset({"ja", "th", "zh"})


@dataclass(frozen=True)
class Count:
    """Sizes of a text in one language.

    Attributes:
        words: parts that white space separates; None if the language has no white space between words.
        characters: code points in Unicode's form C, white space included.
        tokens: tokenizer -> number, without control tokens.
    """

    words: int | None
    characters: int
    tokens: Mapping[str, int]

    def per_word(self, tokenizer: str) -> float | None:
        """Tokens a word; None without words."""
        return self.tokens[tokenizer] / self.words if self.words else None

    def per_character(self, tokenizer: str) -> float:
        """Tokens a character."""
        return self.tokens[tokenizer] / self.characters


def count(text: str, language: str, encoders: Mapping[str, Callable[[str], int]]) -> Count:
    """Counts a text.

    Args:
        text: as it is encoded.
        language: its code.
        encoders: tokenizer -> the number of tokens of a text.
    """
    text = unicodedata.normalize("NFC", text)
    words = None if language in UNSPACED else len(text.split())
    return Count(words, len(text), {name: encode(text) for name, encode in encoders.items()})


def read() -> tuple[dict[str, Any], dict[str, Count], dict[str, Count]]:
    """The committed table.

    Returns:
        (what was counted with what, counts of the declaration, counts of `Language.sample`), the counts by language.
    """
    content = json.loads(FILE.read_text(encoding="utf-8"))
    declaration, samples = (
        {code: Count(**entry) for code, entry in content[part].items()} for part in ("declaration", "samples")
    )
    return content["about"], declaration, samples


def of_own(encode: Callable[[str], int]) -> dict[str, Count]:
    """Counts of `Language.sample` by language, with another tokenizer as "own" beside the committed ones.

    Args:
        encode: the number of tokens of a text.
    """
    *_, committed = read()
    return {
        code: Count(each.words, each.characters, {"own": encode(LANGUAGES[code].sample), **each.tokens})
        for code, each in committed.items()
    }


def markdown(counts: Mapping[str, Count]) -> str:
    """A Markdown table: a row for each language, tokens a word and a character for each tokenizer.

    Args:
        counts: by language, with the same tokenizers in each; English is among them.
    """
    names = list(counts["en"].tokens)
    head = ["language", *(f"{name}, a word" for name in names), *(f"{name}, a character" for name in names)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for code, each in counts.items():
        words = [each.per_word(name) for name in names]
        cells = ["–" if value is None else f"{value:.2f}" for value in words]
        lines.append([LANGUAGES[code].name, *cells, *(f"{each.per_character(name):.3f}" for name in names)])
    ratios = [f"{total(counts, name) / total(counts, names[0]):.2f}" for name in names]
    lines.append([f"all, in tokens of {names[0]}", *ratios, *[""] * len(names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def total(counts: Mapping[str, Count], tokenizer: str) -> int:
    """Tokens of all languages together: each says the same, so each counts as it costs."""
    return sum(each.tokens[tokenizer] for each in counts.values())


def price(counts: Mapping[str, Count], tokenizer: str) -> dict[str, float]:
    """Language -> its tokens for one token of the same content in English."""
    english = counts["en"].tokens[tokenizer]
    return {code: each.tokens[tokenizer] / english for code, each in counts.items()}
