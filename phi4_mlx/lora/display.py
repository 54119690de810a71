"""What a person sees of a run: a bar on a terminal, a line now and then in a pipe, and the curve at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.lora.data.samples import Sample
from phi4_mlx.lora.saving.metrics import CURVE_FILE, MetricsLog
from phi4_mlx.terminal.printable import printable
from phi4_mlx.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phi4_mlx.lora.progress import Step
    from phi4_mlx.lora.settings import Settings

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


def tell_end(log: MetricsLog, tell: Tell) -> None:
    """Draws the curve, and tells where everything is."""
    curve = ""
    if len(log.lines) > 1:
        if tell is to_stderr and sys.stdout.isatty():
            print(draw_in_terminal(log, min(100, shutil.get_terminal_size().columns)))
        try:
            picture = draw_png(log)
            curve = f", curve in {picture}" if picture else ""
        except OSError as error:  # a full disk: what counts is there
            curve = f", the curve could not be drawn: {error.strerror}"
    tell(f"adapter in {log.path.parent}, metrics in {log.path}{curve}")

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille character, row by row


def draw_in_terminal(log: MetricsLog, width: int, height: int = 12) -> str:
    """The losses of training as text, of that many columns and rows: a Braille character holds 2 x 4 points."""
    steps, losses = log.curves()["training"]
    low, high = min(losses), max(losses)
    label = max(len(f"{high:.2f}"), len(f"{low:.2f}"))
    columns, rows = 2 * (width - label - 1), 4 * height
    cells = [[0] * (columns // 2) for _ in range(height)]
    for step, loss in zip(steps, losses, strict=True):
        x = round((step - steps[0]) / max(1, steps[-1] - steps[0]) * (columns - 1))
        y = round((high - loss) / ((high - low) or 1) * (rows - 1))
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    names = [f"{high:.2f}", *[""] * (height - 2), f"{low:.2f}"]
    lines = [
        f"{name:>{label}} {''.join(chr(0x2800 + dots) for dots in row)}" for name, row in zip(names, cells, strict=True)
    ]
    return "\n".join([*lines, f"{'':>{label}} loss, steps {steps[0]:,} to {steps[-1]:,}"])


def draw_png(log: MetricsLog) -> Path | None:
    """Writes the curves beside the metrics; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, losses) in log.curves().items():
        axes.plot(steps, losses, label=name, marker="o" if name == "validation" else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats a token", title="Fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    path = log.path.with_name(CURVE_FILE)
    figure.savefig(path, dpi=120)
    return path


def show(sample: Sample, tokenizer: Tokenizer) -> str:
    """A sample as the model will see it; lines to be learned begin with ">", and line breaks of its own show as "↵".

    On a terminal what is to be learned is green too, and control tokens are dim, unlike text that looks like them.
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    control, decoder = set(tokenizer.control_ids.values()), tokenizer.streaming_decoder()
    kinds = [(learned, token in control) for token, learned in zip(sample.ids, sample.targets, strict=True)]
    texts = [printable(decoder.add(token)) for token in sample.ids]
    texts[-1] += decoder.finish()

    shown = ""
    for learned, run in groupby(zip(kinds, texts, strict=True), key=lambda each: each[0][0]):
        block = "".join(
            _painted("".join(text for _, text in same), kind if colour else (False, False))
            for kind, same in groupby(run, key=lambda each: each[0])
        )
        margin = "> " if learned else "  "
        shown += "\n" + margin + block.replace("\n", "↵\n" + margin)
    return f"{sample.source}: {len(sample.ids):,} tokens, {sum(sample.targets):,} to be learned{shown}"


def _painted(text: str, kind: tuple[bool, bool]) -> str:
    """The text in the style of (to be learned, control token)."""
    styles = ";".join(style for style, on in zip(("32", "2"), kind, strict=True) if on)
    return "\n".join(f"\x1b[{styles}m{line}\x1b[0m" if styles and line else line for line in text.split("\n"))
