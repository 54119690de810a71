"""`python -m phi4_mlx evaluate`: scores of a model on tasks, beside published figures and other runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.commands.evaluate_options import PROG, asks, names_of, read_options, settings_of
from phi4_mlx.commands.evaluate_options import parser as _parser
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount, duration
from phi4_mlx.terminal.command import complain, progress_bar, run
from phi4_mlx.terminal.options import load_options

if TYPE_CHECKING:
    from phi4_mlx.evaluation.options import Options
    from phi4_mlx.evaluation.result import TaskResult
    from phi4_mlx.evaluation.run import Job, Loaded, Run
    from phi4_mlx.evaluation.subject import Subject
    from phi4_mlx.evaluation.suite import Suite


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _evaluate, argv)


def _evaluate(args: argparse.Namespace) -> None:
    if args.report is not None:
        _report(args)
        return
    from phi4_mlx.evaluation.comparator import load_comparator
    from phi4_mlx.evaluation.run import file_name, load_jobs
    from phi4_mlx.hub import resolve

    if args.tasks is None and args.suite is None:
        raise RequestError("nothing to evaluate: name --tasks, --suite phi-4-mini, or two results to --report")
    options = read_options(args)
    suite, names = _asked(args, options)
    folder = Path(os.path.expanduser(args.output_dir)).absolute()
    with _warnings_as_lines():
        with progress_bar("data of tasks", of=_whole) as show:  # before minutes of loading a model
            loaded = load_jobs(_jobs(suite, names, options, None), suite is not None, show or _no_progress)
        _name_options_without_effect(args, loaded)
        judges = [args.judge] if args.judge and asks(args, "arena-hard") else []
        for name in (*args.comparator, *judges):
            resolve(name)  # a name that is wrong is refused before the first answer
        subject = _subject(args)
        jobs = _jobs(suite, names, options, subject)
        runs = [_run(jobs, loaded, subject, folder, settings_of(args, names))]
        del subject
        try:
            for name in args.comparator:
                comparator, place = load_comparator(name), folder / "comparators" / file_name(name)
                runs.append(_run(jobs, loaded, comparator, place, settings_of(args, names)))
        finally:  # what has been run is shown, whatever became of the others
            _write(runs, suite, folder)


def _name_options_without_effect(args: argparse.Namespace, loaded: Loaded) -> None:
    """Names the options of written answers where every task scores texts that are given."""
    from phi4_mlx.evaluation.tasks import OWN

    tasks = [each for some in loaded.tasks.values() for task in some for each in task.tasks.values()]
    writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks) or asks(args, *OWN)
    for option in ("max_tokens", "temp", "top_p"):
        if not writes and getattr(args, option) is not None:
            complain(PROG, f"--{option.replace('_', '-')} has no effect on tasks that score given texts")


def _asked(args: argparse.Namespace, options: Options) -> tuple[Suite | None, list[str]]:
    """The suite or the names of tasks, known to exist before a model is loaded."""
    from phi4_mlx.evaluation.suite import load_suite
    from phi4_mlx.evaluation.tasks import OWN, check_own_task

    if args.suite is not None:
        from phi4_mlx.evaluation.task_index import tasks_folder

        tasks_folder()  # lm-eval is installed
        return load_suite(args.suite), []
    names = names_of(args.tasks)
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
    from phi4_mlx.evaluation.subject import load_subject
    from phi4_mlx.hub import DEFAULT_MODEL

    return load_subject(args.model or DEFAULT_MODEL, **load_options(args))


def _jobs(suite: Suite | None, names: Sequence[str], options: Options, subject: Subject | None) -> list[Job]:
    from phi4_mlx.evaluation.run import Job, suite_jobs
    from phi4_mlx.terminal.options import advised

    if suite is None:
        return [Job(name, name, options) for name in names]
    chat_format = None if subject is None else getattr(subject.tokenizer, "chat_format", None)
    return suite_jobs(suite, options, advised(chat_format.name) if chat_format is not None else {})


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
    from phi4_mlx.evaluation.sharing import answers_path, other_answers

    run = open_run(folder, Run(subject.name, subject.fingerprint, settings, versions(), {}, dict(loaded.missing)))
    started, first = time.monotonic(), subject.group is None or subject.group.rank() == 0
    try:
        for place, job in enumerate(jobs, 1):
            label = f"{place}/{len(jobs)} {job.name}"
            if reason := loaded.missing.get(job.name):
                complain(PROG, f"{label} is left out: {reason}")
                continue
            path = answers_path(folder / "answers", task := file_name(job.name), subject.group)
            with progress_bar(label, of=_whole) as show, Answers(path, other_answers(path, task)) as answers:
                results = run_job(job, loaded.tasks.get(job.name, ()), subject, answers, folder, show or _no_progress)
            left = (time.monotonic() - started) / place * (len(jobs) - place)
            for result in results:
                run.results[job.name if len(results) == 1 else result.task] = result
                complain(
                    PROG, f"{label}: {_line(result)}{f'; about {duration(left)} left' if place < len(jobs) else ''}"
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
    from phi4_mlx.evaluation.run import unwritable
    from phi4_mlx.evaluation.sharing import join_group
    from phi4_mlx.evaluation.tables import run_markdown
    from phi4_mlx.files.atomic import replacing

    group = join_group()
    if group is not None and group.rank():
        return
    text = run_markdown(runs, suite)
    print(text)
    try:
        with replacing(folder / "results.md") as path:
            path.write_text(text, encoding="utf-8")
        drawn = draw_run(runs, suite, folder)
    except OSError as error:
        raise unwritable(folder, error) from None
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
