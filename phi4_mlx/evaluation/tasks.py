"""Tasks by name: the package's own; any other name is a task of lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from phi4_mlx.evaluation.answers import Answers
    from phi4_mlx.evaluation.options import Options
    from phi4_mlx.evaluation.result import TaskResult
    from phi4_mlx.evaluation.subject import Subject

# Name -> module:function, imported when it runs.
OWN = {
    "arena-hard": "phi4_mlx.evaluation.arena:run",
    "bfcl": "phi4_mlx.evaluation.tools.bfcl:run",
    "tools": "phi4_mlx.evaluation.tools.execution:run",
    "long-context": "phi4_mlx.evaluation.long_context.task:run",
    "languages": "phi4_mlx.evaluation.languages.task:run",
}


class Run(Protocol):
    """A task's function."""

    def __call__(self, subject: Subject, answers: Answers, options: Options) -> TaskResult:
        """Asks the model what is not yet in `answers`, and scores it."""


Check = Callable[["Options"], object]
"""A task's function `check`, where it has one; raises RequestError."""


def own_task(name: str) -> Run:
    """The function of one of the package's own tasks, by its name in `OWN`."""
    module, _, function = OWN[name].partition(":")
    run: Run = getattr(import_module(module), function)
    return run


def check_own_task(name: str, options: Options) -> None:
    """Has a task check, before a model is loaded, that its package and its data are there.

    Raises:
        RequestError: one is not, or an option names what the task does not have.
    """
    check: Check | None = getattr(import_module(OWN[name].partition(":")[0]), "check", None)
    if check is not None:
        check(options)
