"""The view of a run while it goes on: a bar that moves within a step on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from phi4_mlx.lora.pace import Pace
from phi4_mlx.lora.progress import passes
from phi4_mlx.terminal.amount import duration, size

if TYPE_CHECKING:
    from rich.console import Console, Group

    from phi4_mlx.lora.progress import Step

Tell = Callable[[str], Any]
"""Shows the user a message."""

LONG_BATCH_S = 2  # a batch that takes this long shows its own time
WIDEST_BAR, NARROWEST_BAR = 40, 8


def to_stderr(sentence: str) -> None:
    """Prints a message to standard error, which is the default for a run's messages."""
    print(sentence, file=sys.stderr, flush=True)


class View:
    """The view for a reader of lines: one every `steps_per_report` batches.

    Args:
        tell: called with the lines.

    Attributes:
        tell: shows a message.
        on_stderr: True if messages go to standard error.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell, self.on_stderr = tell, tell is to_stderr
        self._every = self._before = self._done = self._iters = 0
        self._begin = 0.0
        self._noun = ""

    def phase(self, text: str) -> None:
        """Shows the name of the work before and between the steps; lines leave it out."""

    def begin(self, done: int, iters: int, noun: str, every: int, batch_s: float | None) -> None:
        """Begins the steps.

        Args:
            done: batches that were trained on before.
            iters: batches of the whole run.
            noun: the unit that the loss is averaged over, "targets" or "pairs".
            every: batches between two lines.
            batch_s: seconds that a batch is expected to take; None for not known.
        """
        self._before = self._done = done
        self._iters, self._noun, self._every = iters, noun, every
        self._begin = time.monotonic()

    def watch(self, name: str, done: float, following: float, total: int) -> None:
        """Shows progress within steps, a validation or a test; a `Watch`."""

    def step(self, step: Step) -> None:
        """Shows the results of a step."""
        due = passes(self._every, self._before, step.step)
        self._before = step.step
        if due or step.valid_loss is not None:
            left = (time.monotonic() - self._begin) / (step.step - self._done) * (self._iters - step.step)
            self.tell(f"{step_line(step, self._noun)}, {duration(left)} left")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Hides the bar while a library draws its own."""
        yield

    def close(self) -> None:
        """Removes what is drawn, and shows the cursor; for a program that ends at once."""


class Bar(View):
    """The view for a terminal: a bar with the estimates of the step and the run, and the results of the last step.

    Args:
        console: the terminal; messages stand above the bar.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        super().__init__(to_stderr)
        self.tell = self._above
        self._console = console
        self._spinner = Spinner("line")
        self._phase, self._since = "loading", time.monotonic()
        self._passes: dict[str, Pace] = {}
        self._batch_s: float | None = None
        self._name, self._last = "", ""
        self._live = Live(self, console=console, transient=True, refresh_per_second=10)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._end_steps()
        self._live.stop()

    def phase(self, text: str) -> None:
        """See `View.phase`."""
        self._end_steps()
        if text.partition(":")[0] != self._phase.partition(":")[0] or self._name:
            self._since = time.monotonic()
        self._phase, self._name = text, ""

    def begin(self, done: int, iters: int, noun: str, every: int, batch_s: float | None) -> None:
        """See `View.begin`."""
        super().begin(done, iters, noun, every, batch_s)
        self._batch_s = batch_s

    def watch(self, name: str, done: float, following: float, total: int) -> None:
        """See `View.watch`."""
        now = time.monotonic()
        if name not in self._passes or done < self._passes[name].done:
            self._passes[name] = Pace(done, total, self._batch_s if name == "step" else None, now)
        self._passes[name].reach(done, following, now)
        self._name = name

    def step(self, step: Step) -> None:
        """See `View.step`; a validation stays on the screen."""
        self._last = step_line(step, self._noun)
        if step.valid_loss is not None:
            self._end_steps()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """See `View.aside`."""
        self._live.stop()
        yield
        self._live.start()

    def close(self) -> None:
        """See `View.close`."""
        self._live.stop()

    def _above(self, message: str) -> None:
        """Shows a message above the bar; the terminal wraps it, so that a command in it can be copied."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _end_steps(self) -> None:
        """Leaves the results of the last step on the screen."""
        if self._last:
            self.tell(self._last)
            self._last = ""

    def __rich__(self) -> Group:
        """The lines now; called ten times a second, from a thread of the bar's own."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width - 4  # room for the ^C that a terminal writes
        pace = self._passes.get(self._name)
        text, times, part = self._texts(pace, time.monotonic())
        grid = Table.grid(padding=(0, 1))
        cells: list[Any] = [self._spinner, Text(text[: width - 2], no_wrap=True)]
        room = min(WIDEST_BAR, width - len(text) - len(times) - 4)
        if pace is not None and room >= NARROWEST_BAR:
            cells.append(ProgressBar(pace.total, part, room))
        if pace is not None and len(text) + len(times) + 3 <= width:
            cells.append(Text(times, no_wrap=True))
        grid.add_row(*cells)
        return Group(grid, Text(self._last[:width], no_wrap=True, end="")) if self._last else Group(grid)

    def _texts(self, pace: Pace | None, now: float) -> tuple[str, str, float]:
        """(where the run is, the estimates, batches done)"""
        if pace is None:
            return f"{self._phase}, {duration(now - self._since)}", "", 0.0
        done, spent, batch_s, left = pace.estimate(now)
        number = min(int(pace.done) + 1, pace.total)
        text = f"{self._name} {'batch ' * (self._name != 'step')}{number:,} of {pace.total:,}, {done - number + 1:4.0%}"
        times = []
        if batch_s is not None and batch_s >= LONG_BATCH_S:
            times.append(f"{duration(spent)} of about {duration(batch_s)}")
        elif batch_s is None:
            times.append(duration(spent))
        if left is not None:
            times.append(f"about {duration(left)} left")
        return text, "; ".join(times), done


@contextlib.contextmanager
def view_of(tell: Tell) -> Iterator[View]:
    """The view of a run: a bar if messages go to standard error and that is a terminal, else lines."""
    if tell is not to_stderr or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield View(tell)
        return
    from rich.console import Console

    with Bar(Console(stderr=True)) as bar:
        yield bar


def step_line(step: Step, noun: str) -> str:
    """The results of a step in one line.

    Args:
        step: the step.
        noun: the unit that its loss is averaged over, "targets" or "pairs".
    """
    ahead = "" if step.accuracy is None else f", {step.accuracy:.0%} ahead by {step.margin:.2f}"
    validated = "" if step.valid_loss is None else f", validation {step.valid_loss:.3f}"
    if step.valid_accuracy is not None:
        validated += f" with {step.valid_accuracy:.0%} ahead"
    rate = step.tokens / step.seconds
    return (
        f"step {step.step:,}: loss {step.loss:.3f}{ahead}{validated}, {rate:,.{0 if rate >= 10 else 1}f} {noun}/s, "
        f"{size(step.peak_bytes)}"
    )
