"""A run: tasks on one model, in a folder where every answer is kept, so that the same command goes on after a stop."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.errors import ConfigError, RequestError
from phi4_mlx.evaluation.options import Options, Progress
from phi4_mlx.evaluation.result import Json, TaskResult, shown
from phi4_mlx.evaluation.suite import Suite
from phi4_mlx.evaluation.tasks import OWN, own_task
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.json_file import read_json
from phi4_mlx.terminal.suggestion import suggestion

if TYPE_CHECKING:
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.lm_tasks import LmTask
    from phi4_mlx.evaluation.subject import Subject

RESULTS = "results.json"
_VERSIONS = ("phi4-mlx", "mlx", "mlx-lm", "lm-eval", "datasets")


@dataclass(frozen=True)
class Job:
    """A task to run.

    Attributes:
        name: of the row, which no other row of the run has.
        task: ours or lm-eval's.
        options: with the row's own settings.
        metric: the main metric; None for the task's.
        note: what is known to differ from a published setting.
    """

    name: str
    task: str
    options: Options
    metric: str | None = None
    note: str = ""


@dataclass
class Run:
    """The results of a run, as `results.json` has them.

    Attributes:
        model: the name of the model.
        fingerprint: of the model.
        settings: the options that the results depend on.
        versions: of the packages that matter.
        results: by row, in order; those that are finished.
        missing: row -> why it could not be run.
    """

    model: str
    fingerprint: str
    settings: dict[str, Json]
    versions: dict[str, str] = field(default_factory=dict)
    results: dict[str, TaskResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `results.json`, whole or not at all.

        Raises:
            RequestError: it cannot be written.
        """
        results = {name: result.to_json() for name, result in self.results.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / RESULTS) as path:
                path.write_text(json.dumps({**vars(self), "results": results}, ensure_ascii=False, indent=1), "utf-8")
        except OSError as error:
            raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> RequestError:
    """The error of a folder of results that cannot be written."""
    advice = "make room and give the same command again, or name another --output-dir"
    return RequestError(f"{folder} cannot be written: {error.strerror}; {advice}")


def read_run(path: Path) -> Run:
    """Reads the results of a run.

    Args:
        path: `results.json`, or the folder with it.

    Raises:
        RequestError: it is missing, or not a result of `evaluate`.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        value = read_json(file)
        results = {str(name): TaskResult.from_json(each) for name, each in value["results"].items()}
        run = Run(**{**value, "results": results})
        texts, tables = (run.model, run.fingerprint), (run.settings, run.versions, run.missing)
        if not all(isinstance(each, str) for each in texts) or not all(isinstance(each, dict) for each in tables):
            raise TypeError("a field has another type")
        return run
    except ConfigError as error:
        raise RequestError(str(error)) from None
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None
    except KeyError as error:
        raise RequestError(f"{file} is not a result of evaluate: it has no {error}") from None
    except (TypeError, AttributeError) as error:
        raise RequestError(f"{file} is not a result of evaluate: {error}") from None


def suite_jobs(suite: Suite, options: Options, sampling: Mapping[str, float]) -> list[Job]:
    """The rows of a suite as jobs.

    Args:
        suite: the suite.
        options: of the run; limits, samples, seed and `repeats` hold for every row.
        sampling: "temp" and "top-p" that the model's authors advise, empty for greedy; rows with repeats draw so.
    """
    jobs = []
    for row in suite.rows:
        sampled = bool(sampling) and row.repeats > 1
        own = replace(
            options,
            include_path=suite.folder,
            num_shots=row.shots,
            apply_chat_template=row.chat,
            max_tokens=options.max_tokens or row.max_tokens,
            temp=float(sampling["temp"]) if sampled else 0.0 if row.max_tokens else None,
            top_p=float(sampling["top-p"]) if sampled else None,
            repeats=(options.repeats or row.repeats) if sampled else 1,
        )
        jobs.append(Job(row.name, row.task, own, row.metric, row.differs))
    return jobs


def open_run(folder: Path, run: Run) -> Run:
    """Begins a run in a folder, or goes on with the one that is there.

    Args:
        folder: the folder; it is made.
        run: the run to begin, without results.

    Raises:
        RequestError: the folder has a run of another model or other settings, or cannot be written.
    """
    if (folder / RESULTS).exists() and not _is_bare(folder, before := read_run(folder)):
        if before.fingerprint != run.fingerprint:
            raise RequestError(f"{folder} has results of another model, {before.model}; name another --output-dir")
        for name in {**run.settings, **before.settings}:
            now, then = run.settings.get(name), before.settings.get(name)
            if now != then:
                raise RequestError(
                    f"{folder} has results of a run with {name} {shown(then)}, not {shown(now)}; name another "
                    "--output-dir, or repeat that run's command"
                )
        kept = {name: result for name, result in before.results.items() if name not in run.missing}
        run = replace(run, results=kept)
    run.write(folder)
    return run


def _is_bare(folder: Path, run: Run) -> bool:
    """True if a run stopped before its first answer, so that another may have its folder."""
    return not run.results and not any(path.stat().st_size for path in (folder / "answers").glob("*.jsonl"))


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Loaded:
    """The tasks of jobs.

    Attributes:
        tasks: job -> lm-eval's tasks, where it is one of its.
        missing: job -> why it is left out.
    """

    tasks: Mapping[str, Sequence[LmTask]]
    missing: Mapping[str, str]


def load_jobs(jobs: Sequence[Job], skip: bool, progress: Progress | None = None) -> Loaded:
    """Loads the tasks of jobs.

    Args:
        jobs: the jobs.
        skip: True to leave out a job whose data is not there; not where the Hub does not answer, which takes half a
            minute to find out, each time.
        progress: called with (jobs done, jobs in all).

    Raises:
        RequestError: a task cannot be loaded, and `skip` is False or none is left; it runs code that a model writes; or
            `samples` names a task that none of the jobs has, or a document that its task does not have.
    """
    tasks: dict[str, list[LmTask]] = {}
    missing: dict[str, str] = {}
    for done, job in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs))
        if job.task in OWN:
            continue
        from phi4_mlx.evaluation.lm_tasks import check_samples, load_tasks, unreachable

        try:
            tasks[job.name] = load_tasks(job.task, job.options.include_path, job.options.data)
        except RequestError as error:
            if not skip or unreachable(error):
                raise
            missing[job.name] = str(error)
            continue
        for task in tasks[job.name]:
            check_samples(task, job.options.samples)
        unsafe = [task.name for task in tasks[job.name] if task.runs_code]
        if unsafe and not job.options.confirm_run_unsafe_code:
            raise RequestError(
                f"{unsafe[0]} runs code that the model writes; --confirm-run-unsafe-code allows it, best in a container"
            )
    if missing and not tasks:
        others = ", ".join([*missing][1:])
        raise RequestError(next(iter(missing.values())) + (f"; nor is there data for {others}" if others else ""))
    leaves = [name for loaded in tasks.values() for task in loaded for name in task.tasks]
    known = [*leaves, *(job.task for job in jobs if job.task in OWN)]
    for name in jobs[0].options.samples if jobs and not missing else ():
        if name not in known:
            near = suggestion(name, known) or f"; they are {', '.join(known[:10])}{' ...' if known[10:] else ''}"
            raise RequestError(f"--samples has documents of {name!r:.100}, which is not among the tasks{near}")
    return Loaded(tasks, missing)


def run_job(
    job: Job,
    tasks: Sequence[LmTask],
    subject: Subject,
    answers: Answers,
    folder: Path,
    progress: Progress | None,
) -> list[TaskResult]:
    """Runs a job.

    Args:
        job: the job.
        tasks: lm-eval's, where it is one of its; see `load_jobs`.
        subject: the model.
        answers: where its answers are kept.
        folder: for pictures and exports, which the first of several processes writes.
        progress: called while it runs.

    Returns:
        One result, or one for each part of a tag.
    """
    from phi4_mlx.evaluation.lm_run import run_lm_task

    first = subject.group is None or subject.group.rank() == 0
    options = replace(job.options, progress=progress, folder=folder if first else None)
    if job.task in OWN:
        results = [own_task(job.task)(subject, answers, options)]
    else:
        results = [run_lm_task(task, subject, answers, options, job.metric) for task in tasks]
    return [replace(result, note=job.note or result.note) for result in results]


def file_name(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "task"
