"""The task `languages`: questions in each language, whose answers must be in it; and the tokens that it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.languages import chat_check, token_table
from phi4_mlx.evaluation.languages.page import NAME as PAGE
from phi4_mlx.evaluation.languages.page import write_page
from phi4_mlx.evaluation.languages.picture import draw
from phi4_mlx.evaluation.languages.texts import LANGUAGES, Language, chosen
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import Json, Metric, TaskResult, mean

if TYPE_CHECKING:
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.subject import Subject
    from phi4_mlx.generation.answer_batch import Answer

NAME = "languages"
MAX_TOKENS = 256
THINKING_TOKENS = 4096  # more, for a model that reasons before it answers


@dataclass(frozen=True)
class Document:
    """A question in a language; `number` counts the questions of that language from 1."""

    language: Language
    number: int

    @property
    def id(self) -> str:
        """Unique in the task, such as "de-2"."""
        return f"{self.language.code}-{self.number}"

    @property
    def question(self) -> str:
        """The user's words."""
        return self.language.questions[self.number - 1]


def check(options: Options) -> None:
    """Checks the options before a model is loaded.

    Raises:
        RequestError: a language or a document is unknown.
    """
    _documents(options)


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Asks in each language, and checks the answers; a `Run` of `phi4_mlx.evaluation.tasks`.

    Args:
        subject: the model; its tokenizer is counted too.
        answers: those given so far.
        options: `languages`, `limit`, `samples`, `max_tokens`, `temp`, `top_p`, `seed`, `repeats`, `progress` and
            `folder` count. Documents go round the languages, so that a limit leaves some of each.

    Returns:
        The share of answers without a fault ("right"), the share in the language asked ("in_language"), and the tokens
        a character of the model's tokenizer; the same by language. A page and a picture are in `options.folder`.

    Raises:
        RequestError: a language or a document is unknown.
    """
    from phi4_mlx.evaluation.asking import Question, ask

    documents = _documents(options)
    temp = options.temp or 0.0
    top_p = 1.0 if options.top_p is None else options.top_p
    max_tokens = options.max_tokens or MAX_TOKENS + THINKING_TOKENS * subject.tokenizer.chat_format.reasons
    repeats = (options.repeats or 1) if temp else 1  # without sampling, all answers are the same
    questions = [
        Question(
            document.id, [{"role": "user", "content": document.question}], max_tokens=max_tokens,
            temp=temp, top_p=top_p, seed=options.seed + repeat,
        )
        for document in documents
        for repeat in range(repeats)
    ]  # fmt: skip
    given = ask(subject, questions, answers, options.progress)
    samples = [_sample(document, given[at * repeats : (at + 1) * repeats]) for at, document in enumerate(documents)]

    tokens = token_table.of_own(lambda text: len(subject.tokenizer.encode(text)))
    faults = Counter(answer["fault"] for sample in samples for answer in sample["answers"] if answer["fault"])
    notes = [", ".join(f"{fault}: {faults[fault]}" for fault in chat_check.FAULTS if faults[fault])]
    if options.folder:
        write_page(samples, tokens, options.folder)
        notes += [f"tokens of each language in {PAGE}", draw(samples, tokens, options.folder)]
    codes = [code for code in LANGUAGES if any(document.language.code == code for document in documents)]
    settings = {
        "languages": codes, "documents": len(documents), "max_tokens": max_tokens, "temp": temp, "top_p": top_p,
        "seed": options.seed, "repeats": repeats,
    }  # fmt: skip
    groups = {code: _metrics([sample for sample in samples if sample["language"] == code], tokens) for code in codes}
    return TaskResult(NAME, _metrics(samples, tokens), settings, samples, "; ".join(filter(None, notes)), groups)


def _documents(options: Options) -> list[Document]:
    """The documents that the options leave: the first question of each language, then the second of each."""
    questions = min(len(language.questions) for language in LANGUAGES.values())
    found = [Document(language, number) for number in range(1, questions + 1) for language in LANGUAGES.values()]
    if NAME in options.samples:
        places = list(dict.fromkeys(options.samples[NAME]))
        if wrong := [place for place in places if place not in range(len(found))]:
            raise RequestError(
                f"--samples {NAME}: {wrong[0]!r} is not a document; they have numbers from 0 to {len(found) - 1}"
            )
        found = [found[place] for place in places]
    wanted = chosen(options.languages)
    found = [document for document in found if document.language in wanted]
    if NAME not in options.samples:
        found = found[: options.limit]
    if not found:
        raise RequestError(f"--samples, --limit and --languages leave {NAME} no document; choose more")
    return found


def _sample(document: Document, given: Sequence[Answer]) -> dict[str, Json]:
    """A document with its answers: one, or several that were drawn with different seeds."""
    code = document.language.code
    checked = [(answer, chat_check.check(answer.content, document.question, code)) for answer in given]
    return {
        "id": document.id,
        "score": sum(not verdict.fault for _, verdict in checked) / len(checked),
        "in_language": sum(verdict.language == code for _, verdict in checked) / len(checked),
        "language": code,
        "question": document.question,
        "answers": [
            {"content": each.content, "fault": verdict.fault, "found": verdict.language, "finish": each.finish_reason}
            for each, verdict in checked
        ],
    }


def _metrics(samples: Sequence[dict[str, Json]], tokens: Mapping[str, token_table.Count]) -> list[Metric]:
    counted = [tokens[code] for code in {sample["language"] for sample in samples}]
    characters = sum(count.characters for count in counted)
    return [
        mean("right", [sample["score"] for sample in samples]),
        mean("in_language", [sample["in_language"] for sample in samples]),
        Metric("tokens_per_character", sum(count.tokens["own"] for count in counted) / characters, None, characters),
    ]
