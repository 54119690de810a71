"""`python -m phi4_mlx evaluate`: scores of a model on tasks, beside published figures and other runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.command import Idle, Parser, complain, number, progress_bar, run, typed, word
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT, SEED_LIMIT, TEMPERATURE_LIMIT
from phi4_mlx.terminal.options import add_model_options, load_options

if TYPE_CHECKING:
    from phi4_mlx.evaluation.options import Options
    from phi4_mlx.evaluation.result import TaskResult
    from phi4_mlx.evaluation.run import Job, Loaded, Run
    from phi4_mlx.evaluation.subject import Subject
    from phi4_mlx.evaluation.suite import Suite

PROG = typed("evaluate")
_count = number(int, 1, 10_000_000)
_ROW_OPTIONS = (
    "num_shots", "apply_chat_template", "temp", "top_p", "include_path", "lengths", "depths", "languages",
)  # fmt: skip
_WITH_DATA = {"tools", "arena-hard"}  # the package's own tasks that take --data
_LM_OPTIONS = ("num_shots", "apply_chat_template", "include_path")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _evaluate, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Score a model on tasks: lm-eval's by name, your own in YAML, or bfcl, tools, long-context and "
        "languages. Every answer is kept, so that the same command goes on after a stop. lm-eval's tasks need the "
        "extra: pip install 'phi4-mlx[eval]'.",
    )
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tasks", nargs="+", type=word, metavar="TASK", help="tasks, apart or with commas (default: none)"
    )
    what.add_argument(
        "--suite", type=word, metavar="NAME",
        help="phi-4-mini: the table of the model's article, each row as the nearest public setting (default: none)",
    )  # fmt: skip
    what.add_argument(
        "--report", nargs=2, type=word, metavar=("A", "B"),
        help="compare two results.json (or their folders) on the documents of both, with a paired test (default: none)",
    )  # fmt: skip
    _add_documents(parser)
    _add_answers(parser)
    parser.add_argument(
        "--comparator", type=word, action="append", default=[], metavar="MODEL",
        help="another model to score in the same way, run by mlx-lm; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--judge", type=word, metavar="MODEL",
        help="a local model that judges Arena Hard's answers, in a column of its own (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=word, default="evaluation", metavar="FOLDER",
        help="folder for results.json, results.md, pictures and every answer",
    )  # fmt: skip
    parser.idle += [
        Idle(_ROW_OPTIONS, lambda args: args.suite is not None, "with --suite, whose rows have their own"),
        Idle(_LM_OPTIONS, _only_own, "on the package's own tasks"),
        Idle(("data",), lambda args: _only_own(args) and not _asks(args, *_WITH_DATA), "on these tasks"),
        Idle(("repeats",), lambda args: _only_own(args) and not _asks(args, "languages"), "on these tasks"),
        Idle(("lengths", "depths"), lambda args: not _asks(args, "long-context"), "without the task long-context"),
        Idle(("languages",), lambda args: not _asks(args, "long-context", "languages"), "without those tasks"),
        Idle(("judge",), lambda args: not _asks(args, "arena-hard"), "without the task arena-hard"),
        Idle(("repeats",), _is_greedy, "at a temperature of 0; --temp sets another"),
        Idle(("categories",), lambda args: not _asks(args, "bfcl", "tools"), "without the task bfcl or tools"),
    ]
    return parser


def _only_own(args: argparse.Namespace) -> bool:
    """True if every task is one of the package's own."""
    from phi4_mlx.evaluation.tasks import OWN

    names = set(_names(args.tasks))
    return bool(names) and names <= OWN.keys()


def _asks(args: argparse.Namespace, *tasks: str) -> bool:
    """True if one of these tasks is asked for; a suite may have any."""
    return args.suite is not None or not {*tasks}.isdisjoint(_names(args.tasks))


def _is_greedy(args: argparse.Namespace) -> bool:
    """True if answers have the likeliest tokens; the rows of a suite have temperatures of their own."""
    return args.suite is None and not args.temp and (not _only_own(args) or _asks(args, "languages"))


def _add_documents(parser: Parser) -> None:
    """The options that choose what is asked."""
    parser.add_argument(
        "--include-path",
        type=word,
        metavar="FOLDER",
        help="a folder with tasks of your own, as lm-eval's YAML (default: none)",
    )
    parser.add_argument(
        "--data", type=word, metavar="PATH",
        help="a folder with copies of data sets under their Hugging Face ids, as in PATH/allenai/ai2_arc, or the data "
        "of the package's own task (default: from Hugging Face)",
    )  # fmt: skip
    parser.add_argument("--limit", type=_count, metavar="N", help="documents a task (default: all)")
    parser.add_argument(
        "--samples", type=word, metavar="JSON",
        help='documents by task, as \'{"arc_challenge": [0, 3]}\' or a file with that (default: all)',
    )  # fmt: skip
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=_count,
        metavar="N",
        help="prompt lengths of long-context, in tokens (default: its own)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=number(int, 0, 100),
        metavar="N",
        help="depths of what long-context hides, in per cent of the text (default: 0 25 50 75 100)",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        type=word,
        metavar="CODE",
        help="codes of languages of long-context and languages, apart or with commas (default: all)",
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        type=word,
        metavar="NAME",
        help="kinds of question of bfcl (live, non_live, or such as live_simple) and tools (default: all)",
    )


def _add_answers(parser: Parser) -> None:
    """The options that decide how it is asked and answered."""
    parser.add_argument(
        "--num-shots",
        type=number(int, 0, 1000),
        metavar="N",
        help="solved examples before each question (default: the task's)",
    )
    parser.add_argument(
        "--apply-chat-template", action=argparse.BooleanOptionalAction,
        help="ask in the model's chat format (default: where the model writes its answer, not where texts are scored)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens",
        type=number(int, 1, MAX_TOKENS_LIMIT),
        metavar="N",
        help="longest answer, in tokens (default: the task's)",
    )
    parser.add_argument(
        "--temp", type=number(float, 0, TEMPERATURE_LIMIT), metavar="N", help="temperature (default: the task's)"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        metavar="N",
        help="keep the likeliest tokens whose probabilities sum to this (default: the task's)",
    )
    parser.add_argument(
        "--repeats",
        type=number(int, 1, 10_000),
        metavar="N",
        help="answers drawn for each question, at a temperature above 0; scores are their mean (default: 1; of a "
        "suite, the row's)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, SEED_LIMIT),
        default=0,
        metavar="N",
        help="for the choice of examples and for sampling",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks run code that the model writes"
    )


def _evaluate(args: argparse.Namespace) -> None:
    if args.report is not None:
        _report(args)
        return
    from phi4_mlx.evaluation.comparator import load_comparator
    from phi4_mlx.evaluation.run import file_name, load_jobs, unwritable
    from phi4_mlx.hub import resolve

    if args.tasks is None and args.suite is None:
        raise RequestError("nothing to evaluate: name --tasks, --suite phi-4-mini, or two results to --report")
    options = _options(args)
    suite, names = _asked(args, options)
    folder = Path(os.path.expanduser(args.output_dir)).absolute()
    with _warnings_as_lines():
        with progress_bar("data of tasks", of=_whole) as show:  # before minutes of loading a model
            loaded = load_jobs(_jobs(suite, names, options, None), suite is not None, show or _no_progress)
        judges = [args.judge] if args.judge and _asks(args, "arena-hard") else []
        for name in (*args.comparator, *judges):
            resolve(name)  # a name that is wrong is refused before the first answer
        subject = _subject(args)
        group, jobs = subject.group, _jobs(suite, names, options, subject)
        runs = [_run(jobs, loaded, subject, folder, _settings(args, names))]
        del subject
        for name in args.comparator:
            comparator, place = load_comparator(name), folder / "comparators" / file_name(name)
            comparator.group = group
            runs.append(_run(jobs, loaded, comparator, place, _settings(args, names)))
    if group is None or group.rank() == 0:
        try:
            _write(runs, suite, folder)
        except OSError as error:
            raise unwritable(folder, error) from None


def _options(args: argparse.Namespace) -> Options:
    from phi4_mlx.evaluation.options import Options

    data = None if args.data is None else Path(os.path.expanduser(args.data)).absolute()
    if data is not None and not data.exists():
        raise RequestError(f"--data {args.data} does not exist; name a folder with copies of data sets")
    if args.limit is not None and args.samples is not None:
        raise RequestError("--limit and --samples both choose documents; drop one")
    include = None if args.include_path is None else Path(os.path.expanduser(args.include_path)).absolute()
    return Options(
        limit=args.limit,
        samples=_samples(args.samples),
        seed=args.seed,
        num_shots=args.num_shots,
        apply_chat_template=args.apply_chat_template,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        repeats=args.repeats,
        include_path=include,
        data=data,
        lengths=tuple(args.lengths or ()),
        depths=tuple(args.depths or ()),
        languages=tuple(_names(args.languages)),
        categories=tuple(_names(args.categories)),
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        judge=args.judge,
    )


def _samples(given: str | None) -> dict[str, list[int]]:
    """The documents by task, from JSON or a file with it."""
    if given is None:
        return {}
    from phi4_mlx.files.user_file import read_file

    text = (
        given if given.lstrip().startswith("{") else read_file(Path(os.path.expanduser(given))).decode(errors="replace")
    )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'--samples is not JSON: {error}; write {{"arc_challenge": [0, 3]}}') from None
    is_ids = isinstance(value, dict) and all(
        isinstance(ids, list) and all(type(each) is int for each in ids) for ids in value.values()
    )
    if not is_ids:
        raise RequestError(f'--samples must map tasks to lists of ids, as {{"arc_challenge": [0, 3]}}, not {text:.100}')
    return {name: sorted(set(ids)) for name, ids in value.items()}


def _names(given: Sequence[str] | None) -> list[str]:
    """The names of an option, apart or with commas, each once."""
    return list(dict.fromkeys(name for part in given or () for name in part.split(",") if name))


def _asked(args: argparse.Namespace, options: Options) -> tuple[Suite | None, list[str]]:
    """The suite or the names of tasks, known to exist before a model is loaded."""
    from phi4_mlx.evaluation.suite import load_suite
    from phi4_mlx.evaluation.tasks import OWN, check_own_task

    if args.suite is not None:
        from phi4_mlx.evaluation.task_index import tasks_folder

        tasks_folder()  # lm-eval is installed
        return load_suite(args.suite), []
    names = _names(args.tasks)
    if not names:
        raise RequestError("--tasks names no task")
    if not set(names) <= OWN.keys():
        from phi4_mlx.evaluation.lm_tasks import check_task_names

        check_task_names(names, [*OWN], options.include_path)
    for name in names:
        if name in OWN:
            check_own_task(name, options)
    return None, names


def _subject(args: argparse.Namespace) -> Subject:
    from phi4_mlx.evaluation.sharing import join_group
    from phi4_mlx.evaluation.subject import load_subject
    from phi4_mlx.hub import DEFAULT_MODEL

    subject = load_subject(args.model or DEFAULT_MODEL, **load_options(args))
    subject.group = join_group()
    return subject


def _jobs(suite: Suite | None, names: Sequence[str], options: Options, subject: Subject | None) -> list[Job]:
    from phi4_mlx.evaluation.run import Job, suite_jobs
    from phi4_mlx.terminal.options import advised

    if suite is None:
        return [Job(name, name, options) for name in names]
    chat_format = None if subject is None else getattr(subject.tokenizer, "chat_format", None)
    return suite_jobs(suite, options, advised(chat_format.name) if chat_format is not None else {})


def _settings(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that results depend on."""
    kept = ("suite", "limit", "num_shots", "apply_chat_template", "max_tokens", "temp", "top_p", "repeats", "seed")
    own = {
        "tasks": list(names),
        "samples": _samples(args.samples),
        "lengths": args.lengths,
        "depths": args.depths,
        "languages": _names(args.languages),
        "categories": _names(args.categories),
    }
    return {name: getattr(args, name) for name in kept} | own


def _run(
    jobs: Sequence[Job],
    loaded: Loaded,
    subject: Subject,
    folder: Path,
    settings: dict[str, Any],
) -> Run:
    """Runs jobs on a model, with `results.json` after each."""
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.run import Run, file_name, open_run, run_job, versions
    from phi4_mlx.evaluation.sharing import answers_path

    run = open_run(folder, Run(subject.name, subject.fingerprint, settings, versions(), {}, dict(loaded.missing)))
    started, first = time.monotonic(), subject.group is None or subject.group.rank() == 0
    try:
        for place, job in enumerate(jobs, 1):
            label = f"{place}/{len(jobs)} {job.name}"
            if reason := loaded.missing.get(job.name):
                complain(PROG, f"{label} is left out: {reason}")
                continue
            path = answers_path(folder / "answers", file_name(job.name), subject.group)
            with progress_bar(label, of=_whole) as show, Answers(path) as answers:
                results = run_job(job, loaded.tasks.get(job.name, ()), subject, answers, folder, show or _no_progress)
            left = (time.monotonic() - started) / place * (len(jobs) - place)
            for result in results:
                run.results[job.name if len(results) == 1 else result.task] = result
                complain(
                    PROG, f"{label}: {_line(result)}{f'; about {_duration(left)} left' if place < len(jobs) else ''}"
                )
            if first:
                run.write(folder)
    except KeyboardInterrupt:
        complain(PROG, f"stopped; the same command goes on from there, with the answers in {folder}")
        raise
    return run


def _line(result: TaskResult) -> str:
    main = result.main
    return f"{main.name} {main.value:.4g}, {amount(main.count, 'document')}"


def _write(runs: Sequence[Run], suite: Suite | None, folder: Path) -> None:
    """Writes results.md and the pictures, and prints the tables; of several processes, the first one does."""
    from phi4_mlx.evaluation.pictures import NO_PICTURE, draw_run
    from phi4_mlx.evaluation.sharing import join_group
    from phi4_mlx.evaluation.tables import run_markdown
    from phi4_mlx.files.atomic import replacing

    group = join_group()
    if group is not None and group.rank():
        return
    text = run_markdown(runs, suite)
    with replacing(folder / "results.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    drawn = draw_run(runs, suite, folder)
    if drawn is None:
        complain(PROG, NO_PICTURE)
    complain(PROG, f"results in {folder}")


def _report(args: argparse.Namespace) -> None:
    """Compares two runs."""
    from phi4_mlx.evaluation.report import compared
    from phi4_mlx.evaluation.run import read_run

    one, other = (read_run(Path(os.path.expanduser(path))) for path in args.report)
    text = compared(one, other)
    print(text)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints each warning as one line of the command."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        complain(PROG, f"{message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries
        warnings.filterwarnings("always", category=UserWarning, module=r"(phi4_mlx|lm_eval)\.")
        warnings.showwarning = show
        yield


def _whole(done: float) -> str:
    return f"{int(done):,}"


def _no_progress(done: int, total: int) -> None:
    """Shows nothing, where standard error is no terminal."""


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
