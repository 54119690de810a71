"""Pictures for people: the loss curve of a run, and samples as the model sees them."""

from __future__ import annotations

import os
import shutil
import sys
from itertools import groupby
from pathlib import Path

from phi4_mlx.data.samples import Sample
from phi4_mlx.lora.saving.metrics import CURVE_FILE, MetricsLog
from phi4_mlx.lora.view import View
from phi4_mlx.terminal.amount import amount
from phi4_mlx.terminal.printable import printable
from phi4_mlx.tokens.tokenizer import Tokenizer

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille character, row by row


def report_end(log: MetricsLog, view: View) -> None:
    """Draws the loss curve, and shows where adapter, metrics and curve are."""
    curve = ""
    if len(log.lines) > 1:
        if view.on_stderr and sys.stdout.isatty():
            print(draw_in_terminal(log, min(100, shutil.get_terminal_size().columns)))
        try:
            picture = draw_png(log)
            curve = f", curve in {picture}" if picture else ""
        except OSError as error:  # adapter and metrics are already on the disk
            curve = f", the curve could not be drawn: {error.strerror}"
    view.tell(f"adapter in {log.path.parent}, metrics in {log.path}{curve}")


def draw_in_terminal(log: MetricsLog, width: int, height: int = 12) -> str:
    """Draws the training loss as text.

    Args:
        log: the metrics.
        width: columns, the labels included.
        height: rows; a Braille character holds 2 x 4 points.

    Returns:
        `height` lines and a caption.
    """
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
    """Draws the losses into a picture beside the metrics; returns None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, losses) in log.curves().items():
        axes.plot(steps, losses, label=name, marker="o" if name == "validation" else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    path = log.path.with_name(CURVE_FILE)
    figure.savefig(path, dpi=120)
    return path


def show(sample: Sample, tokenizer: Tokenizer) -> str:
    """Formats a sample as the model sees it.

    Lines of targets begin with ">", and a line break that belongs to the sample shows as "↵". On a terminal, targets
    are green and control tokens are dim, which distinguishes them from text that looks the same.

    Args:
        sample: the sample.
        tokenizer: decodes its tokens.

    Returns:
        Several lines; the first gives the source and the numbers of tokens and targets.
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    control, decoder = set(tokenizer.control_ids.values()), tokenizer.streaming_decoder()
    texts = [printable(decoder.add(token)) for token in sample.ids]
    texts[-1] += decoder.finish()
    kinds = [(target, token in control) for token, target in zip(sample.ids, sample.targets, strict=True)]

    shown, margin = "", ""
    for (target, is_control), group in groupby(zip(kinds, texts, strict=True), key=lambda each: each[0]):
        text = "".join(text for _, text in group)
        if margin != ("> " if target else "  "):
            margin = "> " if target else "  "
            shown += "\n" + margin
        shown += (_painted(text, target, is_control) if colour else text).replace("\n", "↵\n" + margin)
    return f"{sample.source}: {amount(len(sample.ids), 'token')}, {sum(sample.targets):,} to be learned{shown}"


def _painted(text: str, target: bool, is_control: bool) -> str:
    """The text, green if it is a target and dim if it is a control token, line by line."""
    codes = ["32"] * target + ["2"] * is_control
    if not codes:
        return text
    return "\n".join(f"\x1b[{';'.join(codes)}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
