"""Arena Hard: answers exported for its judges, and the verdicts of a local judge in a group of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.options import Options, picked
from phi4_mlx.evaluation.result import Json, Metric, TaskResult, mean
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.user_file import read_file
from phi4_mlx.generation.answer_batch import Answer

REPOSITORY = "lmarena-ai/arena-hard-auto"
QUESTIONS = "data/arena-hard-v0.1/question.jsonl"
BASELINE = "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl"  # the model that Arena Hard v0.1 compares with
MAX_TOKENS = 4096  # of an answer, as in Arena Hard's own settings
_LARGEST = 2**28

# Verdicts by which answer stands first; a strong and a slight preference count alike.
_VERDICT = re.compile(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]")
_SCORES = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
_JUDGE = (
    "You judge two answers to a question. Weigh whether they are right, helpful, to the point and complete; their "
    "order and their length do not count. Explain briefly, then end with exactly one of [[A>>B]], [[A>B]], [[A=B]], "
    "[[B>A]] or [[B>>A]].\n\nQuestion:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
)


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Answers Arena Hard's questions, exports the answers, and has them judged if a judge is named.

    Args:
        subject: the model.
        answers: where its answers and the judge's are kept.
        options: `data` is a folder with a copy of the questions under its Hub id; `judge` a local model.

    Returns:
        The number of answers; with a judge, a group with its name has the share of comparisons that the model wins.

    Raises:
        RequestError: the questions, or for a judge the baseline's answers, cannot be had.
    """
    questions = picked("arena-hard", _rows(QUESTIONS, options.data), options)
    length = options.max_tokens or MAX_TOKENS
    asked = [
        Question(str(row["question_id"]), [{"role": "user", "content": _prompt(row)}], max_tokens=length)
        for row in questions
    ]
    if options.temp is not None:
        top_p = 1.0 if options.top_p is None else options.top_p
        asked = [replace(each, temp=options.temp, top_p=top_p, seed=options.seed) for each in asked]
    found = ask(subject, asked, answers, options.progress)
    if options.folder is not None:
        name = re.sub(r"[^\w.-]+", "-", subject.name)
        _export(options.folder / f"arena-hard-{name}.jsonl", subject, questions, found)
    samples: list[dict[str, Json]] = [
        {"id": each.name, "score": None, "answer": answer.content, "tokens": answer.tokens}
        for each, answer in zip(asked, found, strict=True)
    ]
    result = TaskResult(
        "arena-hard",
        [
            Metric("answers", float(len(found)), None, len(found)),
            mean("tokens of an answer", [answer.tokens for answer in found]),
            mean("cut at the most tokens", [float(answer.finish_reason == "length") for answer in found]),
        ],
        {"task": "arena-hard", "max_tokens": length, "temp": options.temp or 0, "judge": options.judge},
        samples,
        "answers are exported for a judge; a local judge's verdicts are not comparable with published figures",
    )
    return result if options.judge is None else _judged(result, questions, answers, options)


def _judged(
    result: TaskResult, questions: Sequence[Mapping[str, Any]], answers: Answers, options: Options
) -> TaskResult:
    """The result with a local judge's verdicts, each pair in both orders."""
    assert options.judge is not None
    baseline = {str(row["question_id"]): _content(row) for row in _rows(BASELINE, options.data)}
    lacking = [str(row["question_id"]) for row in questions if str(row["question_id"]) not in baseline]
    if lacking:
        raise RequestError(f"{BASELINE} has no answer to question {lacking[0]}; --judge needs one to each question")
    judge = load_subject(options.judge)
    asked = []
    for row, sample in zip(questions, result.samples, strict=True):
        pair = (str(sample["answer"]), baseline[str(row["question_id"])])
        for first, second in (pair, pair[::-1]):
            text = _JUDGE.format(question=_prompt(row), first=first, second=second)
            asked.append(Question(str(row["question_id"]), [{"role": "user", "content": text}], max_tokens=2048))
    verdicts = [_VERDICT.findall(answer.content) for answer in ask(judge, asked, answers, options.progress)]
    samples, scores = [], []
    for place, sample in enumerate(result.samples):
        own, swapped = verdicts[2 * place], verdicts[2 * place + 1]
        kept = [_SCORES[verdict] for verdict in own[-1:]] + [1 - _SCORES[verdict] for verdict in swapped[-1:]]
        score = sum(kept) / len(kept) if kept else None
        scores += [] if score is None else [score]
        samples.append({**sample, "score": score, "verdicts": [each[-1] if each else None for each in (own, swapped)]})
    unclear = sum(not verdict for verdict in verdicts)
    metrics = [mean("wins", scores)] if scores else [Metric("wins", float("nan"), None, 0)]
    groups = {
        f"judge {options.judge}": [*metrics, Metric("comparisons without a verdict", unclear, None, len(verdicts))]
    }
    return replace(result, samples=samples, groups=groups)


def _rows(name: str, data: Path | None) -> list[dict[str, Any]]:
    """The rows of one of Arena Hard's files, from `data` or the Hub."""
    path = _file(name, data)
    rows = []
    for number, line in enumerate(read_file(path, _LARGEST).decode("utf-8", "replace").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                row["question_id"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RequestError(f"{path}: line {number} is not a row of Arena Hard, with question_id") from None
            rows.append(row)
    if not rows:
        raise RequestError(f"{path} is empty")
    return rows


def _file(name: str, data: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    copy = None if data is None else data / REPOSITORY / name
    if copy is not None and copy.is_file():
        return copy
    offline = os.environ.get("HF_DATASETS_OFFLINE", "0") not in ("", "0", "false", "False")
    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_files_only=offline))
    except Exception as error:  # the library raises errors of many kinds for a file that cannot be had
        where = copy or f"DIR/{REPOSITORY}/{name}"
        raise RequestError(
            f"arena-hard: {name} of {REPOSITORY} is not on this disk and cannot be fetched; --data DIR takes a copy as "
            f"{where} ({type(error).__name__}: {message_of(error):.100})"
        ) from None


def _prompt(row: Mapping[str, Any]) -> str:
    """A question's text: v0.1 has it in "turns", v2.0 in "prompt"."""
    try:
        return str(row["turns"][0]["content"] if "turns" in row else row["prompt"])
    except (KeyError, IndexError, TypeError):
        raise RequestError(f"question {row['question_id']} of Arena Hard has no text") from None


def _content(row: Mapping[str, Any]) -> str:
    try:
        content = row["choices"][0]["turns"][0]["content"]
        return str(content["answer"] if isinstance(content, dict) else content)
    except (KeyError, IndexError, TypeError):
        raise RequestError(f"the answer to question {row['question_id']} has no text") from None


def _export(path: Path, subject: Subject, questions: Sequence[Mapping[str, Any]], found: Sequence[Answer]) -> None:
    """Writes answers in the form that Arena Hard's judges read."""
    lines = []
    for row, answer in zip(questions, found, strict=True):
        about = f"{row['question_id']}\n{subject.fingerprint}\n{answer.content}"
        line = {
            "question_id": row["question_id"],
            "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
            "model_id": subject.name,
            "choices": [{"index": 0, "turns": [{"content": answer.content}]}],
            "tstamp": time.time(),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")
