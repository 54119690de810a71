"""What a person sees of a run: a bar on a terminal, a line now and then in a pipe, and the curve at its end."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from phi4_mlx.lora.record import Record, draw_in_terminal, draw_png

if TYPE_CHECKING:
    from phi4_mlx.lora.settings import Settings
    from phi4_mlx.lora.trainer import Step

Tell = Callable[[str], Any]


def to_stderr(sentence: str) -> None:
    """Where a run tells what it has to tell, unless the caller has another place."""
    print(sentence, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(settings: Settings, done: int, tell: Tell) -> Iterator[Callable[[Step], None]]:
    """Shows steps.

    Args:
        settings: of the run.
        done: steps that were made before.
        tell: told a line now and then where there is no bar: it is not the terminal's.
    """
    begin = time.monotonic()
    if tell is not to_stderr or not sys.stderr.isatty():

        def show(step: Step) -> None:
            if step.step % settings.steps_per_report == 0 or step.valid_loss is not None:
                left = (time.monotonic() - begin) / (step.step - done) * (settings.iters - step.step)
                tell(f"{step_line(step, settings.noun)}, {duration(left)} left")

        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=settings.iters, completed=done)
        yield lambda step: bar.update(task, completed=step.step, description=step_line(step, settings.noun))


def step_line(step: Step, noun: str) -> str:
    """A step in one line.

    Args:
        step: the step.
        noun: what its loss is the mean of, "targets" or "pairs".
    """
    ahead = "" if step.accuracy is None else f", {step.accuracy:.0%} ahead by {step.margin:.2f}"
    validated = "" if step.valid_loss is None else f", validation {step.valid_loss:.3f}"
    if step.valid_accuracy is not None:
        validated += f" with {step.valid_accuracy:.0%} ahead"
    rate = step.tokens / step.seconds
    return (
        f"step {step.step:,}: loss {step.loss:.3f}{ahead}{validated}, {rate:,.{0 if rate >= 10 else 1}f} {noun}/s, "
        f"{step.peak_bytes / 1e9:.2f} GB"
    )


def duration(seconds: float) -> str:
    """A time in words, no finer than it can be known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def tell_end(record: Record, tell: Tell) -> None:
    """Draws the curve, and tells where everything is."""
    curve = ""
    if len(record.lines) > 1:
        if tell is to_stderr and sys.stdout.isatty():
            print(draw_in_terminal(record, min(100, shutil.get_terminal_size().columns)))
        try:
            picture = draw_png(record)
            curve = f", curve in {picture}" if picture else ""
        except OSError as error:  # a full disk: what counts is there
            curve = f", the curve could not be drawn: {error.strerror}"
    tell(f"adapter in {record.path.parent}, metrics in {record.path}{curve}")
