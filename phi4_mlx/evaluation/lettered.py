"""Questions with lettered options: the documents of public data sets in one form, and their text.

The YAML of the suites names these functions. The form is that of the appendix of Phi-3's report (arXiv:2404.14219).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

Document = Mapping[str, Any]
Documents = Any
"""A `datasets.Dataset`."""

LETTERS = "ABCDEFGHIJ"


def question(document: Document) -> str:
    """The text of a question; the answer follows it."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, document["options"], strict=False))
    return f"Question: {document['query']}\nOptions:\n{options}\nAnswer:"


def letters(document: Document) -> list[str]:
    """The letters of a question's options."""
    return list(LETTERS[: len(document["options"])])


def answer(document: Document) -> int:
    """The place of the right option."""
    place: int = document["right"]
    return place


def answer_letter(document: Document) -> str:
    """The letter of the right option."""
    return LETTERS[answer(document)]


def arc(documents: Documents) -> Documents:
    """ARC's questions (allenai/ai2_arc)."""
    return _as_questions(documents, lambda each: _labelled(each, each["question"]))


def openbookqa(documents: Documents) -> Documents:
    """OpenBookQA's questions (allenai/openbookqa)."""
    return _as_questions(documents, lambda each: _labelled(each, each["question_stem"]))


def hellaswag(documents: Documents) -> Documents:
    """HellaSwag's beginnings and endings (Rowan/hellaswag)."""
    return _as_questions(
        documents, lambda each: (f"{each['activity_label']}: {each['ctx']}", each["endings"], int(each["label"]))
    )


def piqa(documents: Documents) -> Documents:
    """PIQA's goals and solutions (baber/piqa)."""
    return _as_questions(documents, lambda each: (each["goal"], [each["sol1"], each["sol2"]], int(each["label"])))


def social_iqa(documents: Documents) -> Documents:
    """Social IQa's questions (lighteval/siqa)."""
    return _as_questions(
        documents,
        lambda each: (
            f"{each['context']} {each['question']}",
            [each["answerA"], each["answerB"], each["answerC"]],
            int(each["label"]) - 1,
        ),
    )


def winogrande(documents: Documents) -> Documents:
    """Winogrande's sentences with a gap (allenai/winogrande)."""
    return _as_questions(
        documents,
        lambda each: (
            f"Which option fills the gap? {each['sentence']}",
            [each["option1"], each["option2"]],
            int(each["answer"]) - 1,
        ),
    )


def gpqa(documents: Documents) -> Documents:
    """GPQA's questions (Idavidrein/gpqa), with options in an order that depends on the question alone."""
    return _as_questions(documents, _shuffled)


def _shuffled(document: Document) -> tuple[str, list[str], int]:
    options = [str(document["Correct Answer"]), *(str(document[f"Incorrect Answer {number}"]) for number in (1, 2, 3))]
    order = list(range(len(options)))
    random.Random(str(document["Question"])).shuffle(order)
    return str(document["Question"]), [options[place].strip() for place in order], order.index(0)


def _labelled(document: Document, query: str) -> tuple[str, list[str], int]:
    """A question whose options have labels: A to E in most, 1 to 4 in some."""
    choices = document["choices"]
    return query, list(choices["text"]), list(choices["label"]).index(document["answerKey"].strip())


def _as_questions(documents: Documents, parts: Callable[[Document], tuple[str, list[str], int]]) -> Documents:
    def convert(document: Document) -> dict[str, Any]:
        query, options, right = parts(document)
        return {"query": query.strip(), "options": options, "right": right}

    return documents.map(convert, remove_columns=documents.column_names)
