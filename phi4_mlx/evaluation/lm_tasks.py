"""Tasks of lm-eval: loaded by name from its own folder or from YAML of the user, with data from the Hub or the disk."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import stdev
from typing import Any

from phi4_mlx.errors import Phi4Error, RequestError, message_of
from phi4_mlx.evaluation.task_index import MISSING, known_tasks
from phi4_mlx.files.regular_file import SMALL_BYTES, read_regular
from phi4_mlx.terminal.suggestion import suggestion

_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # in place of a data set: the YAML names files


@dataclass(frozen=True)
class LmTask:
    """A loaded task of lm-eval, or a group of tasks with a figure of its own.

    Attributes:
        name: the name it was asked for by.
        tasks: leaf task -> lm-eval's object.
        groups: group -> lm-eval's object.
    """

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    @property
    def generates(self) -> bool:
        """True if the model writes its answers, False if given texts are scored."""
        return all(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())

    @property
    def runs_code(self) -> bool:
        """True if the task runs code that the model wrote."""
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.tasks.values())


def check_samples(task: LmTask, samples: Mapping[str, Sequence[int]]) -> None:
    """Checks that a task has the documents that are asked for.

    Args:
        task: a loaded task.
        samples: leaf task -> ids of documents; it may have other tasks.

    Raises:
        RequestError: a document is not there, or none is asked for.
    """
    for name in samples.keys() & task.tasks.keys():
        count = len(task.tasks[name].eval_docs)
        wrong = [each for each in samples[name] if not 0 <= each < count]
        if wrong or not samples[name]:
            named = f"document {wrong[0]}" if wrong else "no document"
            raise RequestError(f"--samples asks for {named} of {name}, which has documents 0 to {count - 1:,}")


def check_task_names(names: list[str], own: list[str], include_path: Path | None) -> None:
    """Checks that tasks exist, before a model is loaded.

    Args:
        names: the tasks.
        own: the names that are not lm-eval's.
        include_path: a folder of own YAML.

    Raises:
        RequestError: a name is not known; the nearest ones are named.
    """
    included = _included(include_path)
    for name in names:
        if name in own or name in included:
            continue
        if name not in known_tasks():
            near = suggestion(name, [*own, *included, *known_tasks()])
            if name.endswith((".yaml", ".yml")):
                near = "; name the task in that file, and its folder with --include-path"
            advice = near or f"; own tasks are {', '.join(own)}; `lm_eval ls tasks` lists lm-eval's"
            raise RequestError(f"{name!r:.100} is not a task{advice}{_unread(include_path)}")


def load_tasks(name: str, include_path: Path | None, data: Path | None) -> list[LmTask]:
    """Loads a task, a group or the tasks of a tag.

    Args:
        name: the name, one that `check_task_names` accepts.
        include_path: a folder of own YAML; its tasks come before lm-eval's of the same name.
        data: a folder with copies of data sets, each under its Hub id (data/owner/name); None for the Hub's.

    Returns:
        One task, or one for each part of a tag or of a group that has no figure of its own.

    Raises:
        RequestError: the task's YAML or its data cannot be used.
    """
    quieten()
    if data is not None and not data.is_dir():
        raise RequestError(f"--data {data} is a file; lm-eval's tasks take a folder with copies of data sets")
    manager = _manager(include_path, name)
    entry = manager.task_index.get(name)
    config: Mapping[str, Any] = (entry.cfg if entry else None) or {}
    if config.get("dataset_path") in _FORMATS:
        data = None  # its files are named in the YAML, and may be relative to where the user is
    if name in _included(include_path) and (unknown := _unknown_metric(config)):  # lm-eval asks the Hub for it
        advice = suggestion(unknown, _metrics()) or "; hf_evaluate: true takes it from the library evaluate"
        raise RequestError(f"{name} has the metric {unknown!r:.100}, which lm-eval does not know{advice}")
    random.seed(0)  # GPQA, for one, shuffles its choices as it loads; datasets keeps the first order on the disk
    try:
        with _working_in(data):
            loaded = manager.load([name])
    except (Phi4Error, MemoryError):
        raise
    except Exception as error:
        raise RequestError(_load_message(name, config, data, error)) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    if not tasks:
        raise RequestError(f"{name} has no tasks{_unread(include_path)}")
    if len(tasks) == 1 or (name in groups and groups[name].has_aggregation):
        return [LmTask(name, tasks, groups)]
    return [LmTask(each, {each: task}, {}) for each, task in tasks.items()]


@cache
def quieten() -> None:
    """Turns off the progress bars and warnings of lm-eval and datasets, which would tear our own line.

    Raises:
        RequestError: lm-eval is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import datasets
        import lm_eval.api.metrics
        import lm_eval.api.task
    except ImportError:
        raise RequestError(MISSING) from None
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # it has no switch of its own
    lm_eval.api.metrics.bootstrap_stderr = _bootstrapped  # its own forks this process, with MLX's threads, and prints
    for library in ("lm_eval", "datasets", "huggingface_hub", "fsspec", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _bootstrapped(metric: Callable[[Sequence[Any]], float], scores: Sequence[Any], iters: int) -> float:
    """The standard error of a metric that is not a mean, by resampling."""
    draw = random.Random(0)
    return stdev(metric(draw.choices(scores, k=len(scores))) for _ in range(iters))


def _manager(include_path: Path | None, name: str) -> Any:
    """An index of tasks that has the name, and as few others as can be: lm-eval's own takes seconds."""
    if name in _included(include_path):
        return _small_manager(include_path, None)
    known = known_tasks()[name]
    if known.kind == "task" and known.path is not None:
        return _small_manager(include_path, known.path.parent)
    return _whole_manager(include_path)


def _small_manager(include_path: Path | None, folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    paths = [str(path.absolute()) for path in (folder, include_path) if path is not None]
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = {child for entry in manager.task_index.values() for child in _children(entry.cfg or {})}
    return manager if missing <= set(manager.all_tasks) else _whole_manager(include_path)


@cache
def _whole_manager(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path.absolute()))


def _children(config: Mapping[str, Any]) -> list[str]:
    """The names of a group's parts."""
    parts = config.get("task") if "group" in config else None
    named = [part if isinstance(part, str) else part.get("task") for part in parts] if isinstance(parts, list) else []
    return [name for name in named if isinstance(name, str)]


def _included(include_path: Path | None) -> tuple[str, ...]:
    """The names of the tasks in a folder of own YAML.

    Raises:
        RequestError: it is not a folder.
    """
    if include_path is None:
        return ()
    if not include_path.is_dir():
        raise RequestError(
            f"--include-path {include_path} is not a folder; name the folder with the YAML of your tasks"
        )
    quieten()
    from lm_eval.tasks import TaskManager

    return tuple(TaskManager(include_path=str(include_path.absolute()), include_defaults=False).all_tasks)


def _unread(include_path: Path | None) -> str:
    """The end of a message: files of own YAML that cannot be read, which lm-eval leaves out in silence."""
    if include_path is None:
        return ""
    import yaml

    for path in sorted(include_path.glob("**/*.yaml")):
        try:
            yaml.compose(read_regular(path, SMALL_BYTES))
        except (yaml.YAMLError, OSError, ValueError) as error:
            return f"; {path} cannot be read: {message_of(error):.200}"
    return ""


@contextlib.contextmanager
def _working_in(folder: Path | None) -> Iterator[None]:
    """Makes a folder the working one: datasets takes a folder named like a data set before the Hub's.

    Its cache knows such a folder by its name alone, so each state of the files gets a cache of its own.
    """
    if folder is None:
        yield
        return
    import datasets

    before, cache = os.getcwd(), datasets.config.HF_DATASETS_CACHE
    files = sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))
    state = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = Path(cache, "phi4-mlx", state)
    try:
        yield
    finally:
        os.chdir(before)
        datasets.config.HF_DATASETS_CACHE = cache


def _load_message(name: str, config: Mapping[str, Any], data: Path | None, error: Exception) -> str:
    """One line that says why a task cannot be loaded: its data set, a split of it, or its YAML."""
    from datasets.exceptions import DatasetsError

    source = config.get("dataset_path")
    local = source in _FORMATS
    which = f"{name}: {'its data' if local or source is None else f'the data set {source}'}"
    if config.get("dataset_name"):
        which += f" ({config['dataset_name']})"
    reason = message_of(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{name} needs the package {error.name}; install it: pip install {error.name}"
    if "must have valid or test docs" in reason or isinstance(error, NotImplementedError):
        return f"{which} has no test split that the task names; name one in its YAML: test_split, or validation_split"
    if isinstance(error, KeyError) and error.args and error.args[0] in _splits(config):
        return f"{which} has no split {error.args[0]!r}, which its YAML names"
    if isinstance(error, (StopIteration, IndexError)):
        return f"{which} has no documents"
    if local and isinstance(error, (OSError, DatasetsError)):
        return f"{which} cannot be read: {message_of(error.__cause__ or error):.300}"
    if isinstance(error, (OSError, DatasetsError)) or "Couldn't find" in reason or "BuilderConfig" in reason:
        offline = " and cannot be fetched"
        if isinstance(error, ConnectionError):
            offline = " and HF_DATASETS_OFFLINE is set" if _offline() else ", and the Hub does not answer"
            offline += "" if _offline() else " (HF_DATASETS_OFFLINE=1 keeps to what is on the disk)"
        where = "" if source is None else f": {data or 'DIR'}/{source}"
        return f"{which} is not on this disk{offline}; --data DIR takes a folder of copies{where} ({reason:.200})"
    return f"{name} cannot be loaded: {type(error).__name__}: {reason:.300}"


def unreachable(error: RequestError) -> bool:
    """True if `load_tasks` failed because the Hub does not answer."""
    return isinstance(error.__cause__, ConnectionError) and not _offline()


def _metrics() -> list[str]:
    from lm_eval.api.registry import METRIC_REGISTRY

    return list(METRIC_REGISTRY)


def _unknown_metric(config: Mapping[str, Any]) -> str:
    """The first metric of a task that lm-eval does not know and the task does not compute itself; "" if none."""
    listed = [each for each in config.get("metric_list") or () if isinstance(each, dict)]
    named = [each.get("metric") for each in listed if not each.get("hf_evaluate")]
    known = _metrics()
    unknown = [name for name in named if isinstance(name, str) and name not in known and "/" not in name]
    return unknown[0] if unknown and not config.get("process_results") else ""


def _splits(config: Mapping[str, Any]) -> list[Any]:
    named = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    return [split for split in named if split is not None]


def _offline() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)
