"""The report of `make bench`: figures with their bars, a Markdown table, and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Results = Mapping[str, Mapping[str, Any]]  # script -> its last line


@dataclass(frozen=True)
class Figure:
    """A number of a script, and its bar.

    Attributes:
        bench: the script.
        name: the quantity measured.
        path: keys of the number in the script's last line, joined by slashes.
        bar: the limit; None for a figure without one.
        side: whether the number must be at most or at least the bar.
        unit: printed after the number.
        ratio: whether it is a ratio to mlx-lm, and so a bar of the plot.
    """

    bench: str
    name: str
    path: str
    bar: float | None = None
    side: Literal["most", "least"] = "most"
    unit: str = ""
    ratio: bool = False

    def kept(self, value: float) -> bool | None:
        """True if `value` is on the right side of the bar; None without a bar."""
        if self.bar is None:
            return None
        return value <= self.bar if self.side == "most" else value >= self.bar

    def shown(self, value: float) -> str:
        """A number with the unit."""
        return f"{value:.4g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Row:
    """A figure and its measured value."""

    figure: Figure
    value: float

    @property
    def ok(self) -> bool | None:
        """True if the bar is kept; None without a bar."""
        return self.figure.kept(self.value)


FIGURES = [
    Figure("steps", "graph nodes of a decode step, 32 layers", "ratios/nodes", 0.9, ratio=True),
    Figure("steps", "operations of a decode step, each `mx.fast` call one", "ratios/operations", 0.8, ratio=True),
    Figure("steps", "host time to build a decode step", "ratios/host", 0.6, ratio=True),
    Figure("long_context", "peak of attention over a 4-bit cache, 32,768 tokens", "ratio", 0.1, ratio=True),
    Figure("long_context", "peak of attention and cache, 32,768 tokens", "whole_ratio", 0.1, ratio=True),
    Figure("long_context", "error of that attention", "error", 1e-5),
    Figure("startup", "start to first token", "ratio", 0.2, ratio=True),
    Figure("startup", "`import phi4_mlx`", "import_ms", 30, unit="ms"),
    Figure("sampling", "time of a draw, temp 0.8, top-p 0.95", "ratios/top_p 0.95", 0.4, ratio=True),
    Figure("second_turn", "time to first token, history from a file, long RoPE table", "ratios/long", 0.05),
    Figure("second_turn", "time to first token, history from a file, short RoPE table", "ratios/short", 0.05),
    Figure("restart", "time to first token after a restart, prompt on disk", "of_cold", 0.15),
    Figure("turns", "growth of active memory over 200 turns", "drift_percent/active", 2.0, unit="%"),
    Figure("turns", "growth of cached memory over 200 turns", "drift_percent/cached", 2.0, unit="%"),
    Figure("turns", "growth of resident memory over 200 turns", "drift_percent/resident", 2.0, unit="%"),
    Figure("speculation", "passes per token, edited file", "passes_per_token/edit", 0.5),
    Figure("speculation", "passes per token, quoted passage", "passes_per_token/quote", 0.5),
    Figure("speculation", "passes per token, repeated tool result", "passes_per_token/tool", 0.5),
    Figure("speculation", "passes per token, free text", "passes_per_token/free", 1.0),
    Figure("speculation", "time with `auto`, free text, plain = 1", "auto_time/free", 1.03),
    Figure("batching", "time of 32 answers together, one by one = 1", "ratio", 0.5),
    Figure("mixed_adapters", "CPU time of a step under several adapters, base alone = 1", "ratio", 1.15),
    Figure("loss", "peak of the loss with its gradient", "loss_memory_ratio", ratio=True),
    Figure("loss", "time of the loss with its gradient", "loss_time_ratio", ratio=True),
    Figure("loss", "peak of a training step", "step_memory_ratio", ratio=True),
    Figure("loss", "time of a training step", "step_time_ratio", ratio=True),
    Figure("padding", "slots per token of the data, packed", "packed"),
    Figure("padding", "slots per token of the data, mlx-lm", "mlx_lm"),
    Figure("convert", "peak of a conversion, checkpoint = 1", "peak_share", 0.25),
    Figure("convert", "time of a conversion, whole process", "process_ratio", 1.0, ratio=True),
    Figure("tokenizer", "speed of reading tokenizer.json, tokenizers = 1", "ratio_load", side="least"),
    Figure("tokenizer", "speed of encoding 2,000 characters, tokenizers = 1", "ratio_2000", side="least"),
    Figure("flash", "first token after 4,096 tokens, the logits of all = 1", "figures/first_token", 0.60),
    Figure("flash", "prefill of 4,096 tokens, that of 2,048 = 1", "figures/growth", 2.15),
    Figure("flash", "second turn behind 4,096 tokens, cold = 1", "figures/second_turn", 0.1),
    Figure("flash", "decode step, 512 tokens cached, Phi-4-mini = 1", "figures/decode 512", 1.2),
    Figure("flash", "decode step, 4,096 tokens cached, Phi-4-mini = 1", "figures/decode 4096", 0.75),
    Figure("flash", "decode step, 16,384 tokens cached, Phi-4-mini = 1", "figures/decode 16384", 0.55),
    Figure("flash", "compiled decode step, plain = 1", "figures/compiled", 0.75),
    Figure("flash", "a Mamba layer, 2,048 tokens", "figures/scan", 0.8, ratio=True),
    Figure("flash", "memory of the scan of 4,096 tokens", "figures/peak 4096", 64, unit="MiB"),
    Figure("flash", "cached bytes per token, one layer's keys and values = 1", "figures/token_bytes", 1.05),
    *(
        Figure("serving", f"tokens per second, {load}", f"{load}/tokens_ratio", bar, "least", ratio=True)
        for load, bar in (("1 client", 1.0), ("8 clients", 2.0), ("32 clients", 1.0), ("8 clients, shared", 1.0))
    ),
    *(
        Figure("serving", f"time to first token, {load}", f"{load}/first_ratio", 0.6, ratio=True)
        for load in ("1 client", "8 clients", "32 clients", "8 clients, shared")
    ),
    Figure("serving", "connections lost, 32 clients", "32 clients/lost", 0),
    Figure("constrain", "time of a mask, V = 200,064", "mask_ms", 1.0, unit="ms"),
    Figure("calibration", "KL of calibrated 4 bits, plain = 1", "four_bits_ratio", 0.35),
    Figure("calibration", "KL with bits chosen in plain's bytes, plain = 1", "chosen_ratio", 0.25),
    Figure("calibration", "largest difference of logits from mlx-lm", "mlx_lm_difference", 1e-3),
    Figure("tools", "held-out questions right, with tools", "right_percent", 95.0, "least", "%"),
    Figure("teach", "new tool right after training", "new_after_percent", 90.0, "least", "%"),
    Figure("teach", "old skills right after training", "old_after_percent", side="least", unit="%"),
    Figure("teach", "time of that training", "minutes", 10.0, unit="min"),
    Figure("preference", "preferred refusals after DPO", "after_percent", 80.0, "least", "%"),
]


def rows(results: Results) -> Iterator[Row]:
    """Every figure with a value, in the order of the scripts."""
    for bench, result in results.items():
        figures = speed_figures(result) if bench == "speed" else [each for each in FIGURES if each.bench == bench]
        for figure in figures:
            value: Any = result
            for key in figure.path.split("/"):
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                yield Row(figure, float(value))


def speed_figures(result: Mapping[str, Any]) -> list[Figure]:
    """A figure for each setting of the speed script, with the setting's own bar."""
    return [
        Figure("speed", f"tokens per second, {name}", f"settings/{name}/ratio", each["bar"], "least", ratio=True)
        for name, each in result.get("settings", {}).items()
    ]


def markdown(results: Results, failed: Mapping[str, str], about: Mapping[str, str], plots: list[Path]) -> str:
    """The whole report.

    Args:
        results: script -> its last line.
        failed: scripts without a result -> the reason.
        about: the machine and the versions, by name.
        plots: pictures beside the report.
    """
    lines = ["# Figures", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["`tests/bench/README.md` says how each is measured. Ratios are ours to mlx-lm's.", ""]
    lines += ["| script | figure | value | bar | kept |", "|---|---|---|---|---|"]
    measured = list(rows(results))
    for row in measured:
        figure, ratio = row.figure, " of mlx-lm" if row.figure.ratio else ""
        sign = "≤" if figure.side == "most" else "≥"
        bar = "" if figure.bar is None else f"{sign} {figure.shown(figure.bar)}"
        kept = {True: "yes", False: "**no**", None: ""}[row.ok]
        lines.append(f"| {figure.bench} | {figure.name} | {figure.shown(row.value)}{ratio} | {bar} | {kept} |")
    without = results.keys() - {row.figure.bench for row in measured}
    lines += [f"| {bench} | see {bench}.log | | | |" for bench in results if bench in without]
    lines += [f"| {bench} | **failed**: {why.replace('|', '/')} | | | **no** |" for bench, why in failed.items()]
    for path in plots:
        lines += ["", f"![{path.stem.replace('_', ' ')}]({path.name})"]
    return "\n".join(lines) + "\n"


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the plots that `results` has figures for; none where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return []
    drawn = (_ratios(results, folder), _memory(results, folder), _accepted(results, folder))
    return [path for path in drawn if path is not None]


def _canvas(height: float) -> tuple[Canvas, Axes]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, height), layout="constrained")
    return canvas, canvas.subplots()


def _saved(canvas: Canvas, path: Path) -> Path:
    canvas.savefig(path, dpi=120)
    return path


def _cost(figure: Figure, value: float) -> float:
    """A ratio to mlx-lm's cost; speeds are inverted."""
    return 1 / value if figure.side == "least" else value


def _ratios(results: Results, folder: Path) -> Path | None:
    """Horizontal bars: our cost where mlx-lm's is 1, with each figure's bar as a tick."""
    found = [row for row in rows(results) if row.figure.ratio and row.value > 0]
    if not found:
        return None
    canvas, axes = _canvas(1.2 + 0.3 * len(found))
    for place, row in enumerate(reversed(found)):
        cost = _cost(row.figure, row.value)
        axes.barh(place, cost, color="tab:red" if row.ok is False else "tab:blue", height=0.7)
        at, colour = (0.0, "white") if cost > 0.1 else (cost, "black")  # beside a bar too short for the text
        axes.annotate(f" {cost:.2g}", (at, place), va="center", fontsize=8, color=colour)
        if row.figure.bar is not None:
            bar = _cost(row.figure, row.figure.bar)
            axes.plot([bar, bar], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axes.axvline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [row.figure.name.replace("`", "") for row in reversed(found)], fontsize=8)
    axes.set(xlabel="cost, mlx-lm = 1 (tokens per second: inverted); tick: the bar", title="Beside mlx-lm")
    axes.set_xlim(left=0)
    return _saved(canvas, folder / "ratios.png")


def _memory(results: Results, folder: Path) -> Path | None:
    """Peak memory of attention over the context length."""
    contexts = results.get("long_context", {}).get("contexts")
    if not contexts:
        return None
    canvas, axes = _canvas(4.5)
    lengths = [row["context"] for row in contexts]
    axes.plot(lengths, [row["whole"] / 1e6 for row in contexts], marker="o", color="tab:blue", label="ours")
    axes.plot(lengths, [row["cache"] / 1e6 for row in contexts], ":", color="grey", label="the 4-bit cache")
    measured = [row for row in contexts if not row["computed"]]
    for part, line, name in ((measured, "-o", "mlx-lm"), (contexts[len(measured) - 1 :], "--", "mlx-lm, computed")):
        theirs = [row["mlx_lm_whole"] / 1e6 for row in part]
        axes.plot([row["context"] for row in part], theirs, line, color="tab:orange", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="context, tokens", ylabel="peak, MB", title="One layer: 128 new tokens over a 4-bit cache")
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(canvas, folder / "memory.png")


def _accepted(results: Results, folder: Path) -> Path | None:
    """Tokens per forward pass, by task."""
    tasks = results.get("speculation", {}).get("tokens_per_pass")
    if not tasks:
        return None
    canvas, axes = _canvas(4)
    bars = axes.bar(list(tasks), list(tasks.values()), color="tab:blue", width=0.6)
    axes.bar_label(bars, fmt="%.2f")
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="task", ylabel="tokens per forward pass", title="Speculation from the prompt")
    return _saved(canvas, folder / "accepted.png")
