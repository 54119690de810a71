"""A page of Markdown: answers with a fault, and the tokens of each language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.evaluation.languages import token_table
from phi4_mlx.evaluation.languages.chat_check import FAULTS
from phi4_mlx.files.atomic import replacing

NAME = "languages.md"
_SHOWN = 80  # characters of an answer


def write_page(samples: Sequence[Mapping[str, Any]], tokens: Mapping[str, token_table.Count], folder: Path) -> None:
    """Writes `languages.md`.

    Args:
        samples: of the task.
        tokens: of each language, with the model's tokenizer as "own".
        folder: made if it does not exist.
    """
    about, declaration, _ = token_table.read()
    sources = "".join(f"- {name}: {source}\n" for name, source in about["tokenizers"].items())
    folder.mkdir(parents=True, exist_ok=True)
    text = f"""# Languages

## Answers with a fault

{_faults(samples)}
## Tokens of the questions and sentences of this task

They say the same in each language. "own" is the tokenizer of this model.

{token_table.markdown(tokens)}
## Tokens of the {about["declaration"]}

{token_table.markdown(declaration)}
Words are what white space separates; – where it does not. Characters include white space.

{sources}"""
    with replacing(folder / NAME) as path:
        path.write_text(text, encoding="utf-8")


def _faults(samples: Sequence[Mapping[str, Any]]) -> str:
    """A table of the answers with a fault, and the meaning of each fault."""
    answers = [(sample["id"], answer) for sample in samples for answer in sample["answers"]]
    rows = [
        f"| {name} | {answer['fault']} | {answer['found']} | {_cell(answer['content'])} |\n"
        for name, answer in answers
        if answer["fault"]
    ]
    if not rows:
        return f"None of {len(answers)}.\n"
    head = "| question | fault | language found | answer |\n| --- | --- | --- | --- |\n"
    return head + "".join(rows) + "\n" + "".join(f"- {fault}: {meaning}\n" for fault, meaning in FAULTS.items())


def _cell(answer: str) -> str:
    """The beginning of an answer, in one line that a table can hold."""
    text = " ".join(answer.split())
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    for mark in ("\\", "|", "`", "<", "*", "_"):
        text = text.replace(mark, f"\\{mark}")
    return text
