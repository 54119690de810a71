"""One task of lm-eval, run on a model: its documents asked, its metrics as a `TaskResult`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import Phi4Error, RequestError, message_of
from phi4_mlx.evaluation.lm_tasks import LmTask
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.result import Json, Metric, TaskResult, mean

if TYPE_CHECKING:
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.subject import Subject
    from phi4_mlx.generation.answer_batch import Answer

BOOTSTRAPS = 200  # for metrics that are not a mean: an error to 5 %; lm-eval's own 100,000 take minutes

# Of the errors by which lm-eval's samplers of examples refuse.
_TOO_MANY_SHOTS = ("Sample larger than population", "number of fewshot samples requested exceeds")


def run_lm_task(
    task: LmTask, subject: Subject, answers: Answers, options: Options, metric: str | None = None
) -> TaskResult:
    """Runs a task.

    Args:
        task: a loaded task; its settings are changed.
        subject: the model.
        answers: where its answers are kept.
        options: of the evaluation.
        metric: the main metric, such as "acc_norm" or "exact_match,flexible-extract"; None for the task's first.

    Returns:
        The metrics, the groups of a group, and a sample a document. With `repeats`, scores are means of draws.

    Raises:
        RequestError: the options do not fit the task, or its code fails.
    """
    for each in task.tasks.values():
        if options.num_shots is not None:
            each.set_config("num_fewshot", options.num_shots)
        elif each.get_config("num_fewshot") is None:
            each.set_config("num_fewshot", 0)
    chat = task.generates if options.apply_chat_template is None else options.apply_chat_template
    draws = (options.repeats or 1) if task.generates and options.temp else 1
    results = []
    for draw in range(draws):
        for each in task.tasks.values():
            each.set_fewshot_seed(options.seed)  # again: each draw has the same examples
        results.append(_evaluate(task, subject, answers, replace(options, seed=options.seed + draw), chat, metric))
    result = _mean_of_draws(results) if draws > 1 else results[0]
    return replace(result, settings=_settings(task, options, chat, draws))


def _evaluate(
    task: LmTask, subject: Subject, answers: Answers, options: Options, chat: bool, metric: str | None
) -> TaskResult:
    """One pass over the documents."""
    from lm_eval import evaluator

    from phi4_mlx.evaluation.harness import Harness

    lm = Harness(
        subject,
        answers,
        seed=options.seed,
        max_tokens=options.max_tokens,
        temp=options.temp,
        top_p=options.top_p,
        progress=options.progress,
    )
    # lm-eval asks documents in the order of the data and names them in the order given, so it is given that order.
    samples = {name: sorted(set(ids)) for name, ids in options.samples.items() if name in task.tasks}
    try:
        found = evaluator.evaluate(
            lm,
            {"tasks": dict(task.tasks), "groups": dict(task.groups)},
            limit=None if samples else options.limit,
            samples=samples or None,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    except (Phi4Error, OSError, MemoryError):
        raise
    except Exception as error:
        if any(words in message_of(error) for words in _TOO_MANY_SHOTS):
            raise RequestError(f"{task.name} has fewer solved examples than --num-shots {options.num_shots}") from error
        raise RequestError(
            f"{task.name} stopped in lm-eval: {type(error).__name__}: {message_of(error):.300}; --debug shows where"
        ) from error
    written = {
        f"{each.task_name}/{samples[each.task_name][each.doc_id] if each.task_name in samples else each.doc_id}": answer
        for each, answer in lm.drawn
    }
    return _result(task, found, metric, written)


def _result(task: LmTask, found: Mapping[str, Any], metric: str | None, written: Mapping[str, Answer]) -> TaskResult:
    """lm-eval's results of a task as ours."""
    counts = {name: len({sample["doc_id"] for sample in found["samples"][name]}) for name in task.tasks}
    groups = {
        name: _metrics(values, counts.get(name, sum(counts.values()))) for name, values in found["results"].items()
    }
    for name, group in task.groups.items():
        inside = [each.task_name for each in group.get_all_tasks()]
        groups[name] = [replace(each, count=sum(counts[leaf] for leaf in inside)) for each in groups[name]]
    metrics = groups.pop(task.name)
    if not metrics:
        raise RequestError(f"{task.name} has no metric; name one in its YAML: metric_list")
    main = _main_metric(task.name, metrics, metric)
    samples = [sample for name in task.tasks for sample in _samples(name, found["samples"][name], main.name)]
    metrics = [main, *(each for each in metrics if each is not main)]
    if written:
        samples = [{**sample, **_writing(written.get(str(sample["id"])))} for sample in samples]
        metrics += [
            mean("tokens of an answer", [answer.tokens for answer in written.values()]),
            mean("cut at the most tokens", [float(answer.finish_reason == "length") for answer in written.values()]),
        ]
    return TaskResult(task.name, metrics, {}, samples, "", groups)


def _writing(answer: Answer | None) -> dict[str, Json]:
    """The length and the end of an answer; its reasoning is kept apart from what is scored."""
    if answer is None:  # of a document whose given texts are scored
        return {}
    kept: dict[str, Json] = {"tokens": answer.tokens, "finish_reason": answer.finish_reason}
    return {**kept, "reasoning": answer.reasoning} if answer.reasoning else kept


def _metrics(values: Mapping[str, Any], count: int) -> list[Metric]:
    """The metrics of a task in lm-eval's results, where a name is "metric,filter"."""
    found = []
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{name}_stderr,{chosen}")
        stderr = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        found.append(Metric(name if chosen == "none" else key, float(value), stderr, count))
    return found


def _main_metric(task: str, metrics: Sequence[Metric], wanted: str | None) -> Metric:
    for each in metrics:
        if wanted is None or each.name == wanted:
            return each
    raise RequestError(f"{task} has no metric {wanted!r}; it has {', '.join(each.name for each in metrics)}")


def _samples(task: str, logged: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Json]]:
    """The documents of a task with the score and the answer of each."""
    name, _, chosen = metric.partition(",")
    found = []
    for sample in logged:
        if sample["filter"] != (chosen or "none"):
            continue
        score = sample.get(name)
        number = float(score) if score is not None and hasattr(score, "__float__") else None
        answers = [answer for answers in sample["resps"] for answer in answers]
        found.append(
            {
                "id": f"{task}/{sample['doc_id']}",
                "score": number,
                "document": sample["doc_hash"][:16],
                "target": _plain(sample["target"]),
                "answer": _plain(answers[0] if len(answers) == 1 else answers),
            }
        )
    return found


def _plain(value: Any) -> Json:
    """A value as JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return round(float(value), 6) if isinstance(value, float) or hasattr(value, "__float__") else str(value)


def _mean_of_draws(results: Sequence[TaskResult]) -> TaskResult:
    """The mean over documents and draws: the standard error is over documents, each with the mean of its draws.

    That covers both the choice of documents and the draws. The error of the draws alone is a metric of its own.
    """
    draws, first = len(results), results[0]
    samples: list[dict[str, Json]] = []
    for drawn in zip(*(result.samples for result in results), strict=True):
        scores = [sample["score"] for sample in drawn]
        score = None if None in scores else math.fsum(scores) / draws
        answers = [sample["answer"] for sample in drawn]
        samples.append({**drawn[0], "answer": answers, "draws": scores, "score": score})
    name = f"{first.main.name}, mean of {draws}"
    if any(sample["score"] is None for sample in samples):  # a metric of all documents together
        of_draws = mean(name, [result.main.value for result in results])
        return replace(
            first,
            metrics=[replace(of_draws, stderr=None, count=len(samples)), _alone(of_draws.stderr, samples)],
            samples=samples,
            groups={},
        )
    spread = math.fsum(
        (score - sample["score"]) ** 2 / (draws - 1) / draws for sample in samples for score in sample["draws"]
    )
    by_task: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_task[str(sample["id"]).rpartition("/")[0]].append(sample["score"])
    groups = {task: [mean(name, scores)] for task, scores in by_task.items()} if len(by_task) > 1 else {}
    main = mean(name, [sample["score"] for sample in samples])
    return replace(
        first, metrics=[main, _alone(math.sqrt(spread) / len(samples), samples)], samples=samples, groups=groups
    )


def _alone(error: float | None, samples: Sequence[Mapping[str, Json]]) -> Metric:
    return Metric("standard error of the draws alone", math.nan if error is None else error, None, len(samples))


def _settings(task: LmTask, options: Options, chat: bool, draws: int) -> dict[str, Json]:
    """The settings that another run must share to be comparable."""
    first = next(iter(task.tasks.values()))
    settings: dict[str, Json] = {
        "task": task.name,
        "version": _plain(first.VERSION),
        "shots": sorted({each.get_config("num_fewshot") for each in task.tasks.values()}),
        "seed": options.seed,
        "chat_template": chat,
    }
    if task.generates:
        own = {name: _plain(value) for name, value in (first.get_config("generation_kwargs") or {}).items()}
        given = {"max_gen_toks": options.max_tokens, "temperature": options.temp, "top_p": options.top_p}
        settings["generation"] = own | {name: value for name, value in given.items() if value is not None}
        settings["draws"] = draws
    return settings
