"""The task `languages`: questions in each language, whose answers must be in it; and the tokens that it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.languages import token_table
from phi4_mlx.evaluation.languages.chat_check import FAULTS, check
from phi4_mlx.evaluation.languages.picture import draw
from phi4_mlx.evaluation.languages.texts import LANGUAGES, Language, chosen
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import Json, Metric, TaskResult, mean

if TYPE_CHECKING:
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.subject import Subject

NAME = "languages"
MAX_TOKENS = 256
TABLES = "languages.md"
Sample = dict[str, Json]


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Asks in each language, and checks the answers; a `Run` of `phi4_mlx.evaluation.tasks`.

    Args:
        subject: the model; its tokenizer is counted too.
        answers: those given so far.
        options: `languages`, `limit`, `samples`, `max_tokens`, `temp`, `top_p`, `seed`, `repeats`, `progress` and
            `folder` count. A limit leaves as many of each language as it can: documents go round the languages.

    Returns:
        The share of answers without a fault ("right"), the share in the language asked ("in_language"), and the tokens
        a character of the model's tokenizer; the same by language. Tables and a picture are in `options.folder`.

    Raises:
        RequestError: a language or a document is unknown.
    """
    from phi4_mlx.evaluation.asking import Question, ask

    asked = _documents(options)
    temp = options.temp or 0.0
    top_p = 1.0 if options.top_p is None else options.top_p
    max_tokens = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    repeats = (options.repeats or 1) if temp else 1  # without sampling, all answers are the same
    runs = [(language, at, repeat) for language, at in asked for repeat in range(repeats)]
    questions = [
        Question(
            f"{language.code}-{at + 1}", [{"role": "user", "content": language.questions[at]}], max_tokens=max_tokens,
            temp=temp, top_p=top_p, seed=options.seed + repeat,
        )
        for language, at, repeat in runs
    ]  # fmt: skip
    given = ask(subject, questions, answers, options.progress)
    samples: list[Sample] = []
    for question, (language, at, repeat), answer in zip(questions, runs, given, strict=True):
        verdict = check(answer.content, language.questions[at], language.code)
        samples.append({
            "id": question.name if repeats == 1 else f"{question.name}-{repeat + 1}", "score": float(not verdict.fault),
            "language": language.code, "found": verdict.language, "fault": verdict.fault,
            "question": language.questions[at], "answer": answer.content, "finish_reason": answer.finish_reason,
        })  # fmt: skip
    spoken = [language for language in LANGUAGES.values() if any(language is each for each, _ in asked)]
    tokens = token_table.of_own(lambda text: len(subject.tokenizer.encode(text)))
    notes = [_faults(samples)]
    if options.folder:
        notes.append(_write(options.folder, tokens, samples))
    settings = {
        "languages": [language.code for language in spoken], "documents": len(asked), "limit": options.limit,
        "max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": options.seed, "repeats": repeats,
    }  # fmt: skip
    groups = {
        language.code: _metrics([sample for sample in samples if sample["language"] == language.code], tokens)
        for language in spoken
    }
    return TaskResult(NAME, _metrics(samples, tokens), settings, samples, "; ".join(filter(None, notes)), groups)


def _documents(options: Options) -> list[tuple[Language, int]]:
    """The questions that the options leave, as language and place: the first of each language, then the second."""
    every = [
        (language, at)
        for at in range(max(len(language.questions) for language in LANGUAGES.values()))
        for language in LANGUAGES.values()
        if at < len(language.questions)
    ]
    wanted = chosen(options.languages)
    if NAME in options.samples:
        numbers = list(dict.fromkeys(options.samples[NAME]))
        if wrong := [number for number in numbers if number not in range(len(every))]:
            raise RequestError(
                f"--samples {NAME}: {wrong[0]!r} is not a document; they have numbers from 0 to {len(every) - 1}"
            )
        every = [every[number] for number in numbers]
    found = [(language, at) for language, at in every if language in wanted]
    if NAME not in options.samples:
        found = found[: options.limit]
    if not found:
        raise RequestError(f"--limit, --samples and --languages leave {NAME} no question; choose more")
    return found


def _metrics(samples: Sequence[Sample], tokens: dict[str, token_table.Count]) -> list[Metric]:
    codes = {sample["language"] for sample in samples}
    characters = sum(tokens[code].characters for code in codes)
    per_character = sum(tokens[code].tokens["own"] for code in codes) / characters
    return [
        mean("right", [sample["score"] for sample in samples]),
        mean("in_language", [float(sample["found"] == sample["language"]) for sample in samples]),
        Metric("tokens_per_character", per_character, None, characters),
    ]


def _faults(samples: Sequence[Sample]) -> str:
    """Numbers of faults by kind, for the note."""
    counts = {fault: sum(sample["fault"] == fault for sample in samples) for fault in FAULTS}
    return ", ".join(f"{fault}: {count}" for fault, count in counts.items() if count)


def _write(folder: Path, tokens: dict[str, token_table.Count], samples: Sequence[Sample]) -> str:
    """Writes the tables and the picture; returns a note if the latter could not be drawn."""
    about, declaration, _ = token_table.read()
    sources = "".join(f"- {name}: {source}\n" for name, source in about["tokenizers"].items())
    wrong = [
        f"| {sample['id']} | {sample['fault']} | {sample['found']} | {_shown(sample['answer'])} |\n"
        for sample in samples
        if sample["fault"]
    ]
    kinds = "".join(f"- {fault}: {meaning}\n" for fault, meaning in FAULTS.items())
    table = "| question | fault | language found | answer |\n| --- | --- | --- | --- |\n" + "".join(wrong)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLES).write_text(
        "# Languages\n\n## Answers with a fault\n\n"
        + (f"{table}\n{kinds}" if wrong else f"None of {len(samples)}.\n")
        + "\n## Tokens of this model (own) beside others, on the questions and sentences of this task\n\n"
        + f"{token_table.markdown(tokens)}\n## Tokens of the {about['declaration']}\n\n"
        + f"{token_table.markdown(declaration)}\nWords are what white space separates; – where it does not. "
        + f"Characters include white space.\n\n{sources}",
        encoding="utf-8",
    )
    return draw(samples, tokens, folder)


def _shown(answer: str) -> str:
    """The beginning of an answer, as the cell of a table."""
    text = " ".join(answer.split()).replace("|", "\\|")
    return text if len(text) <= 80 else f"{text[:79]}…"
