"""The task `tools`: the share of right answers when the model's calls are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from phi4_mlx.agent import run_tools
from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers, key_of
from phi4_mlx.evaluation.options import Options, picked
from phi4_mlx.evaluation.result import TaskResult, mean
from phi4_mlx.evaluation.sharing import share_out
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.evaluation.tools.checks import check_tool_format
from phi4_mlx.evaluation.tools.questions import Question, find_questions, load_questions
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.sampling import make_sampler
from phi4_mlx.terminal.suggestion import suggestion

MAX_TOKENS = 512  # of each answer


def check(options: Options) -> None:
    """Checks that the data is there before a model is loaded.

    Raises:
        RequestError: it is not.
    """
    find_questions(options.data)


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Answers questions with `run_tools`, and counts the answers that are right to the letter.

    Args:
        subject: the model.
        answers: of this task.
        options: `data` is as for `load_questions`; `categories` are those of its lines.

    Raises:
        RequestError: the data is missing or malformed, a category is not in it, or the model's chat format declares no
            tools.
    """
    check_tool_format(subject)
    loaded = load_questions(options.data, subject.tokenizer)
    questions = picked("tools", _of_categories(loaded.items, options.categories), options)
    max_tokens, temp = options.max_tokens or MAX_TOKENS, options.temp or 0.0
    top_p = 1.0 if options.top_p is None else options.top_p
    draws = [temp, top_p, options.seed] if temp else None
    settings = [max_tokens, draws, loaded.functions_sha256]
    keys = [key_of(subject.fingerprint, "tools", _asked(question), settings) for question in questions]
    by_key = dict(zip(keys, questions, strict=True))

    def answer(own: Sequence[str]) -> None:
        for done, key in enumerate(own):
            if options.progress is not None:
                options.progress(done, len(own))
            if answers.get(key) is None:
                answers.put(key, _answer(subject, by_key[key], max_tokens, draws))

    found = share_out(subject.group, dict.fromkeys(by_key, 1), answers, answer)
    if options.progress is not None:
        options.progress(len(questions), len(questions))
    samples = [_sample(question, found[key]) for key, question in zip(keys, questions, strict=True)]
    groups = {
        name: [mean("accuracy", [sample["score"] for sample in samples if sample["category"] == name])]
        for name in dict.fromkeys(question.category for question in questions)
        if name
    }
    lines = "\n".join(json.dumps(question.line, sort_keys=True) for question in questions)
    described = {
        "questions_sha256": hashlib.sha256(lines.encode()).hexdigest(), "functions_sha256": loaded.functions_sha256,
        "documents": len(questions), "max_tokens": max_tokens, "temp": temp, "top_p": top_p,
        "seed": options.seed if temp else None,
    }  # fmt: skip
    accuracy = mean("accuracy", [sample["score"] for sample in samples])
    return TaskResult("tools", [accuracy], described, samples, "", groups)


def _asked(question: Question) -> JsonObject:
    """A question without its right answer and its labels, on which the model's answer does not depend."""
    return {name: value for name, value in question.line.items() if name not in ("id", "category", "answer")}


def _answer(subject: Subject, question: Question, max_tokens: int, draws: list[float] | None) -> JsonObject:
    sampler = make_sampler(draws[0], draws[1], seed=int(draws[2])) if draws else None
    try:
        result = run_tools(
            subject.model, subject.tokenizer, question.messages, question.tools, max_tokens=max_tokens, sampler=sampler
        )
    except RequestError as error:
        raise RequestError(f"question {question.name!r:.100}: {error}") from None
    added = result.messages[len(question.messages) :]
    return {"text": result.text, "messages": added, "finish_reason": result.finish_reason}


def _sample(question: Question, answer: JsonObject) -> JsonObject:
    score = float(answer["text"] == question.answer)
    return {"id": question.name, "score": score, "category": question.category, "answer": question.answer, **answer}


def _of_categories(questions: Sequence[Question], wanted: Sequence[str]) -> list[Question]:
    known = dict.fromkeys(question.category for question in questions if question.category)
    for name in wanted:
        if name not in known:
            near = suggestion(name, known) or f"; it has {', '.join(known) or 'none'}"
            raise RequestError(f"the data has no category {name!r:.100}{near:.500}")
    return [question for question in questions if not wanted or question.category in wanted]
