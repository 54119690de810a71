"""The task `long-context`: asks the questions of a run and marks the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.long_context.haystack import SLACK, Haystack
from phi4_mlx.evaluation.long_context.heat_map import draw_heat_maps
from phi4_mlx.evaluation.long_context.lengths import check_lengths, default_lengths, table
from phi4_mlx.evaluation.long_context.mark import mark
from phi4_mlx.evaluation.long_context.plan import DEPTHS, Place, answer_room, languages, places
from phi4_mlx.evaluation.long_context.problem import KINDS
from phi4_mlx.evaluation.options import Options, picked
from phi4_mlx.evaluation.result import Json, Metric, TaskResult, mean
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.terminal.amount import amount

NAME = "long-context"
_TABLES = ("one table", "short table", "both tables", "long table")
Sample = dict[str, Json]


def check(options: Options) -> None:
    """Checks the languages before a model is loaded.

    Raises:
        RequestError: there is no such language.
    """
    languages(options.languages)


def run(subject: Subject, answers: Answers, options: Options) -> TaskResult:
    """Asks questions about long texts; a `Run` of `phi4_mlx.evaluation.tasks`.

    Args:
        subject: the model.
        answers: those given so far.
        options: `lengths`, `depths`, `languages`, `limit`, `samples`, `max_tokens`, `temp`, `top_p`, `seed`, `progress`
            and `folder` count.

    Returns:
        The mean marks of `phi4_mlx.evaluation.long_context.mark`, also by RoPE table, length, depth, kind, language and
        form of the values. Heat maps are in `options.folder`.

    Raises:
        RequestError: a language, a length or a depth cannot be asked.
    """
    spoken = languages(options.languages)
    room = options.max_tokens or answer_room(spoken, subject.tokenizer)
    cut = ""
    if options.lengths:
        lengths = check_lengths(subject.model, options.lengths, room)
    else:
        lengths, cut = default_lengths(subject.model, room)
    for depth in options.depths:
        check_whole("--depths", depth, 0, 100)
    depths = sorted(set(options.depths or DEPTHS))
    whole = bool(options.languages or options.depths)
    asked = picked(NAME, places(spoken, lengths, depths, whole, options.seed), options)
    # Neighbours share their beginnings.
    chosen = sorted(asked, key=lambda place: (place.language.code, place.length, place.kind, place.depth))

    samples, short = _ask(subject, answers, chosen, room, options)
    if not samples:
        raise RequestError(
            f"--lengths {', '.join(map(str, lengths))}: the shortest question does not fit; choose greater lengths"
        )
    boundary = subject.model.boundary
    for sample in samples:
        sample["table"] = table(sample["length"], room, boundary)
    notes = [cut, *short]
    if options.folder:
        notes.append(draw_heat_maps(samples, boundary, options.folder))
    settings = {
        "lengths": lengths, "depths": depths, "languages": [language.code for language in spoken], "seed": options.seed,
        "limit": options.limit, "max_tokens": room, "temp": options.temp or 0.0, "top_p": options.top_p,
        "slack": SLACK, "rope_boundary": boundary,
    }  # fmt: skip
    return TaskResult(
        NAME, _metrics(samples), settings, samples, "; ".join(note for note in notes if note), _groups(samples)
    )


def _ask(
    subject: Subject, answers: Answers, chosen: Sequence[Place], room: int, options: Options
) -> tuple[list[Sample], list[str]]:
    """Samples, and notes on questions that do not fit their length; the texts of one length are in memory at a time."""
    samples: list[Sample] = []
    short: dict[str, int] = {}
    done = 0
    for language, of_language in groupby(chosen, key=lambda place: place.language):
        haystack = Haystack(language, subject.tokenizer, options.seed)
        for _, group in groupby(of_language, key=lambda place: place.length):
            asked = []
            for place in (members := list(group)):
                problem = place.problem(options.seed)
                prompt = haystack.prompt(problem, place.length)
                if prompt is None:
                    name = f"{place.kind} in {place.length:,} tokens"
                    short[name] = short.get(name, 0) + 1
                else:
                    asked.append((place, problem, _question(place, prompt, room, options)))
            given = ask(subject, [question for *_, question in asked], answers, _shifted(options, done, len(chosen)))
            for (place, problem, _), answer in zip(asked, given, strict=True):
                found = mark(problem, answer.content)
                samples.append({
                    "id": place.id, "score": found.score, "recall": found.recall, "exact": found.exact,
                    "kind": place.kind, "language": language.code, "form": place.form, "length": place.length,
                    "depth": place.depth, "prompt_tokens": answer.prompt_tokens, "truths": [*problem.truths],
                    "answer": answer.content, "finish_reason": answer.finish_reason,
                })  # fmt: skip
            done += len(members)
    return samples, [f"no room for {name} ({amount(count, 'question')})" for name, count in short.items()]


def _question(place: Place, prompt: str, room: int, options: Options) -> Question:
    top_p = 1.0 if options.top_p is None else options.top_p
    messages = [{"role": "user", "content": prompt}]
    return Question(place.id, messages, max_tokens=room, temp=options.temp or 0.0, top_p=top_p, seed=options.seed)


def _shifted(options: Options, done: int, total: int) -> Callable[[int, int], None] | None:
    """The progress of the whole run, for a part of it that begins at `done`."""
    tell = options.progress
    return None if tell is None else lambda part, _: tell(done + part, total)


def _metrics(samples: Sequence[Sample]) -> list[Metric]:
    return [mean(name, [sample[name] for sample in samples]) for name in ("score", "recall", "exact")]


def _groups(samples: Sequence[Sample]) -> dict[str, list[Metric]]:
    """Metrics by table, length, depth, kind, language and form, and by kind and table together."""

    def rows() -> Iterator[tuple[tuple[int, object], str, Sample]]:
        for sample in samples:
            table = _TABLES.index(sample["table"])
            yield (0, table), sample["table"], sample
            yield (1, sample["length"]), f"{sample['length']:,} tokens", sample
            yield (2, sample["depth"]), f"depth {sample['depth']} %", sample
            kind = [*KINDS].index(sample["kind"])
            yield (3, kind), sample["kind"], sample
            yield (4, (kind, table)), f"{sample['kind']}, {sample['table']}", sample
            yield (5, sample["language"]), f"language {sample['language']}", sample
            yield (6, sample["form"]), f"values: {sample['form']}", sample

    order: dict[str, tuple[int, object]] = {}
    members: dict[str, list[Sample]] = {}
    for key, name, sample in rows():
        order[name] = key
        members.setdefault(name, []).append(sample)
    return {name: _metrics(members[name]) for name in sorted(members, key=lambda name: (order[name], name))}
