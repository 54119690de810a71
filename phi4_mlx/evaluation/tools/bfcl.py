"""The task `bfcl`: single-turn questions of the Berkeley Function-Calling Leaderboard, live and not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import Metric, TaskResult, mean
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.evaluation.tools.judge import mistake
from phi4_mlx.evaluation.tools.leaderboard import LIVE, NON_LIVE, Case, Leaderboard
from phi4_mlx.terminal.suggestion import nearest

MAX_TOKENS = 1024
CATEGORIES = (*NON_LIVE, *LIVE)
COLLECTIONS = {"non_live": NON_LIVE, "live": LIVE}

# Aggregates over categories, as the leaderboard forms them. Source: eval_checker/eval_runner_helper.py of bfcl-eval.
_SIMPLE = ("simple_python", "simple_java", "simple_javascript")
_LIVE_AST = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
_IRRELEVANCE = ("irrelevance", "live_irrelevance")


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
    cases = [case for category in categories for case in board.cases(category)[: options.limit]]
    if "bfcl" in options.samples:
        cases = picked("bfcl", cases, options.samples["bfcl"])
    max_tokens, temp, top_p = options.max_tokens or MAX_TOKENS, options.temp or 0.0, options.top_p or 1.0
    questions = [
        Question(case.name, case.messages, case.tools or None, max_tokens, temp=temp, top_p=top_p, seed=options.seed)
        for case in cases
    ]
    scores: dict[str, list[float]] = {category: [] for category in categories}
    samples = []
    for case, answer in zip(cases, ask(subject, questions, answers, options.progress), strict=True):
        wrong = mistake(board, case, answer.calls)
        scores[case.category].append(float(wrong is None))
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
        samples.append({"id": case.name, "score": scores[case.category][-1], "category": case.category, "calls": calls,
                        "mistake": wrong or "", "finish_reason": answer.finish_reason})  # fmt: skip
    groups = {category: [mean("accuracy", values)] for category, values in scores.items() if values}
    overall = mean("accuracy", [sample["score"] for sample in samples])
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
    weights = {
        "non_live": dict.fromkeys(_SIMPLE, 1 / 12) | dict.fromkeys(("multiple", "parallel", "parallel_multiple"), 1 / 4),
        "live": {category: found[category].count for category in _LIVE_AST if category in found},
        "irrelevance": dict.fromkeys(_IRRELEVANCE, 1 / 2),
        "relevance": {"live_relevance": 1.0},
    }
    needed = {"live": set(_LIVE_AST)}
    made = []
    for name, parts in weights.items():
        if needed.get(name, parts.keys()) <= found.keys():
            made.append(_weighted(name, [(found[category], weight) for category, weight in parts.items()]))
    return made


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
            near = nearest(name, (*COLLECTIONS, *CATEGORIES))
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            known = ", ".join((*COLLECTIONS, *CATEGORIES))
            raise RequestError(f"bfcl has no category {name!r:.100}{meant} (known: {known})")
        wanted |= {*COLLECTIONS.get(name, (name,))}
    return [category for category in CATEGORIES if not wanted or category in wanted]


def check_tool_format(subject: Subject) -> None:
    """Refuses a model whose chat format cannot declare tools.

    Raises:
        RequestError: it cannot.
    """
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        subject.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=[tool])
    except RequestError as error:
        raise RequestError(f"{subject.name} cannot be evaluated on tools: {error}") from None


def picked(task: str, items: Sequence[Case], indices: Sequence[int]) -> list[Case]:
    """The documents at the indices of `--samples`.

    Raises:
        RequestError: an index is not one of a document.
    """
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(items):
            raise RequestError(f"{task} has no document {index!r:.100}; they are numbered 0 to {len(items) - 1:,}")
    return [items[index] for index in indices]
