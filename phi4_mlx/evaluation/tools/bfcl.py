"""The task `bfcl`: single-turn questions of the Berkeley Function-Calling Leaderboard, live and not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.options import Options, picked
from phi4_mlx.evaluation.result import Metric, TaskResult, mean
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.evaluation.tools.checks import check_tool_format
from phi4_mlx.evaluation.tools.judge import mistake
from phi4_mlx.evaluation.tools.leaderboard import LIVE, NON_LIVE, Leaderboard
from phi4_mlx.terminal.suggestion import suggestion

MAX_TOKENS = 1024
CATEGORIES = (*NON_LIVE, *LIVE)
COLLECTIONS = {"non_live": NON_LIVE, "live": LIVE}

# Aggregates over categories, as the leaderboard forms them. Source: eval_checker/eval_runner_helper.py of bfcl-eval.
_SIMPLE = ("simple_python", "simple_java", "simple_javascript")
_OTHERS = ("multiple", "parallel", "parallel_multiple")
_LIVE_AST = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
_IRRELEVANCE = ("irrelevance", "live_irrelevance")


def check(options: Options) -> None:
    """Checks the options and the package before a model is loaded.

    Raises:
        RequestError: bfcl-eval is missing, or a category is not known.
    """
    chosen(options.categories)
    Leaderboard()


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Asks the questions and scores the calls.

    Args:
        subject: the model.
        answers: of this task.
        options: `categories` are names in `CATEGORIES` or `COLLECTIONS`; `limit` counts in each category; `samples`
            are indices into the questions of the chosen categories, in order.

    Raises:
        RequestError: bfcl-eval is missing, a category is not known, or the model's chat format declares no tools.
    """
    categories = chosen(options.categories)
    board = Leaderboard()
    check_tool_format(subject)
    limit = None if "bfcl" in options.samples else options.limit
    cases = [case for category in categories for case in board.cases(category)[:limit]]
    cases = picked("bfcl", cases, replace(options, limit=None))
    max_tokens, temp = options.max_tokens or MAX_TOKENS, options.temp or 0.0
    top_p = 1.0 if options.top_p is None else options.top_p
    questions = [
        Question(case.name, case.messages, case.tools or None, max_tokens, temp=temp, top_p=top_p, seed=options.seed)
        for case in cases
    ]
    scores: dict[str, list[float]] = {category: [] for category in categories}
    samples = []
    for case, answer in zip(cases, ask(subject, questions, answers, options.progress), strict=True):
        wrong = mistake(board, case, answer.calls, answer.content)
        scores[case.category].append(float(wrong is None))
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
        samples.append({"id": case.name, "score": scores[case.category][-1], "category": case.category, "calls": calls,
                        "mistake": wrong or "", "finish_reason": answer.finish_reason})  # fmt: skip
    groups = {category: [mean("accuracy", values)] for category, values in scores.items() if values}
    overall = mean("accuracy", [score for values in scores.values() for score in values])
    settings = {"bfcl_eval": board.version, "categories": [*groups], "documents": len(cases), "max_tokens": max_tokens,
                "temp": temp, "top_p": top_p, "seed": options.seed if temp else None}  # fmt: skip
    note = "the model's own tool format; multi-turn, agentic and format categories are not part of it"
    return TaskResult("bfcl", [overall, *aggregates(groups)], settings, samples, note, groups)


def aggregates(groups: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """The leaderboard's aggregates of which every category was asked.

    Args:
        groups: category -> metrics, accuracy first.

    Returns:
        "non_live" (the mean over kinds of question; the simple kind is the mean over three languages), "live" (the mean
        over questions), "irrelevance" (the mean of live and not) and "relevance".
    """
    found = {category: metrics[0] for category, metrics in groups.items()}
    counts = {category: found[category].count for category in _LIVE_AST if category in found}
    weights: dict[str, dict[str, float]] = {
        "non_live": {**dict.fromkeys(_SIMPLE, 1 / 12), **dict.fromkeys(_OTHERS, 1 / 4)},
        "live": {category: counts.get(category, 0) for category in _LIVE_AST},
        "irrelevance": dict.fromkeys(_IRRELEVANCE, 1 / 2),
        "relevance": {"live_relevance": 1},
    }
    return [
        _weighted(name, [(found[category], weight) for category, weight in parts.items()])
        for name, parts in weights.items()
        if parts.keys() <= found.keys()
    ]


def _weighted(name: str, parts: Sequence[tuple[Metric, float]]) -> Metric:
    """A weighted mean of metrics over different documents."""
    total = sum(weight for _, weight in parts)
    shares = [(metric, weight / total) for metric, weight in parts]
    errors = [metric.stderr * share for metric, share in shares if metric.stderr is not None]
    stderr = math.hypot(*errors) if len(errors) == len(parts) else None
    value = math.fsum(metric.value * share for metric, share in shares)
    return Metric(name, value, stderr, sum(metric.count for metric, _ in parts))


def chosen(names: Iterable[str]) -> list[str]:
    """The categories that names stand for, in the leaderboard's order; all of them for no name.

    Raises:
        RequestError: a name is not known; names the nearest.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in CATEGORIES and name not in COLLECTIONS:
            known = (*COLLECTIONS, *CATEGORIES)
            raise RequestError(
                f"bfcl has no category {name!r:.100}{suggestion(name, known) or '; known are ' + ', '.join(known)}"
            )
        wanted |= {*COLLECTIONS.get(name, (name,))}
    return [category for category in CATEGORIES if not wanted or category in wanted]
