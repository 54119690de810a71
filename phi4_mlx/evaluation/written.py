"""Answers in writing: the documents of public data sets, and the answer found in what the model wrote.

The YAML of the suites names these functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from phi4_mlx.evaluation import lettered

_NUMBER = re.compile(r"-?\d[\d,.\u066b\u066c]*")
_LETTER = re.compile(r"answer(?:\s+is)?\W*\(?([A-J])\b", re.IGNORECASE)


def question(document: Mapping[str, Any]) -> str:
    """A question with lettered options that is to be answered after steps."""
    asked = lettered.question(document).removesuffix("\nAnswer:")
    return f'Reason step by step, then end with a line that has "Answer: " and the letter of the option.\n\n{asked}'


def math(documents: lettered.Documents) -> lettered.Documents:
    """MATH's problems (EleutherAI/hendrycks_math); the answer is the solution's last \\boxed{}."""
    return documents.map(lambda each: {"answer": last_boxed(each["solution"]) or ""})


def aime(documents: lettered.Documents) -> lettered.Documents:
    """AIME's problems (Maxwell-Jia/AIME_2024)."""
    return documents.map(
        lambda each: {"problem": each["Problem"], "answer": str(each["Answer"])}, remove_columns=documents.column_names
    )


def boxed(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if the last \\boxed{} of an answer equals the document's, after the normalisation of MATH's authors."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    found, right = last_boxed(results[0]), document["answer"]
    if found is None:
        return {"exact_match": 0}
    return {
        "exact_match": int(_as_int(found) == _as_int(right) if _as_int(right) is not None else is_equiv(found, right))
    }


def number(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if the last number of an answer is the document's, in the digits of any script."""
    found = _NUMBER.findall(unicodedata.normalize("NFKC", results[0]))
    return {"exact_match": int(bool(found) and _value(found[-1]) == float(document["answer_number"]))}


def letter(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if the last letter that an answer names as its own, or its last \\boxed{} one, is the document's."""
    found = _LETTER.findall(results[0]) or re.findall(r"\(?([A-J])\b", last_boxed(results[0]) or "")
    return {"exact_match": int(bool(found) and found[-1].upper() == lettered.answer_letter(document))}


def last_boxed(text: str) -> str | None:
    """The inside of the last \\boxed{} of a text with TeX; None if there is none that ends."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place]
    return None


def _as_int(text: str) -> int | None:
    plain = re.sub(r"\\!|\{,\}|,", "", text.strip().strip("$"))
    return int(plain) if re.fullmatch(r"[+-]?\d{1,30}", plain) else None


def _value(text: str) -> float | None:
    """The value of a number with separators: a dot or comma before three digits is one of thousands."""
    digits = "".join(str(unicodedata.digit(char)) if char.isdigit() else char for char in text).rstrip(".,")
    digits = re.sub(r"[,.\u066c](?=\d{3}(?!\d))", "", digits.replace("\u066b", "."))
    try:
        return float(digits.replace(",", "."))
    except ValueError:
        return None
