"""What the scripts' last lines come to: figures with their bars, a Markdown table, and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Results = Mapping[str, Mapping[str, Any]]  # what each script printed last, by its name


@dataclass(frozen=True)
class Figure:
    """A number of a script, and the bar that it is held against.

    Attributes:
        bench: the script.
        what: what was measured.
        path: where the number stands in the script's last line.
        side: whether it must be at most or at least the bar.
        bar: None for a figure that is only shown.
        unit: behind the number.
        ratio: whether it is a ratio to mlx-lm, and so drawn beside the others.
    """

    bench: str
    what: str
    path: tuple[str, ...]
    side: Literal["most", "least"] = "most"
    bar: float | None = None
    unit: str = ""
    ratio: bool = False


@dataclass(frozen=True)
class Row:
    """A figure as it was measured."""

    figure: Figure
    value: float

    @property
    def ok(self) -> bool | None:
        """Whether the bar is kept; None without a bar."""
        if self.figure.bar is None:
            return None
        return self.value <= self.figure.bar if self.figure.side == "most" else self.value >= self.figure.bar


def _of(bench: str, *figures: tuple[Any, ...]) -> list[Figure]:
    return [Figure(bench, what, tuple(path.split("/")), *rest) for what, path, *rest in figures]


FIGURES: list[Figure] = [
    *_of(
        "steps",
        ("graph nodes of a decode step, 32 layers", "ratios/nodes", "most", 0.9, "", True),
        ("operations of a decode step, each `mx.fast` call one", "ratios/operations", "most", 0.8, "", True),
        ("host time to build a decode step", "ratios/host", "most", 0.6, "", True),
    ),
    *_of(
        "long_context",
        ("peak of attention over a 4-bit cache, 32,768 tokens", "ratio", "most", 0.1, "", True),
        ("peak of attention and cache, 32,768 tokens", "whole_ratio", "most", 0.1, "", True),
        ("error of that attention", "error", "most", 1e-5),
    ),
    *_of("startup", ("start to first token", "ratio", "most", 0.2, "", True)),
    *_of("startup", ("`import phi4_mlx`", "import_ms", "most", 30, "ms")),
    *_of("sampling", ("time of a draw, temp 0.8, top-p 0.95", "ratios/top_p 0.95", "most", 0.4, "", True)),
    *_of(
        "second_turn",
        ("time to first token with the history from a file, long", "ratios/long", "most", 0.05),
        ("the same, short RoPE table", "ratios/short", "most", 0.05),
    ),
    *_of(
        "turns",
        ("active memory after 200 turns", "drift_percent/active", "most", 2.0, "%"),
        ("cached memory after 200 turns", "drift_percent/cached", "most", 2.0, "%"),
        ("resident memory after 200 turns", "drift_percent/resident", "most", 2.0, "%"),
    ),
    *_of(
        "speculation",
        ("passes a token, file edited", "passes_per_token/edit", "most", 0.5),
        ("passes a token, passage quoted", "passes_per_token/quote", "most", 0.5),
        ("passes a token, tool's result repeated", "passes_per_token/tool", "most", 0.5),
        ("passes a token, free text", "passes_per_token/free", "most", 1.0),
        ("time of `auto`, free text, of the plain time", "auto_time/free", "most", 1.03),
    ),
    *_of("batching", ("32 answers together, of the time one by one", "ratio", "most", 0.5)),
    *_of(
        "loss",
        ("peak of the loss with its gradient", "loss_memory_ratio", "most", None, "", True),
        ("time of the loss with its gradient", "loss_time_ratio", "most", None, "", True),
        ("peak of a training step", "step_memory_ratio", "most", None, "", True),
        ("time of a training step", "step_time_ratio", "most", None, "", True),
    ),
    *_of(
        "padding",
        ("slots a token of the data, packed", "packed"),
        ("slots a token of the data, mlx-lm", "mlx_lm"),
    ),
    *_of(
        "convert",
        ("peak of a conversion, of the checkpoint", "peak_share", "most", 0.25),
        ("time of a conversion, whole process", "process_ratio", "most", 1.0, "", True),
    ),
    *_of(
        "tokenizer",
        ("reading tokenizer.json, times as fast as tokenizers", "ratio_load", "least"),
        ("encoding 2,000 characters, times as fast", "ratio_2000", "least"),
    ),
    *_of("constrain", ("time of a mask, V = 200,064", "mask_ms", "most", 1.0, "ms")),
    *_of("tools", ("held-out questions right, with tools", "right_percent", "least", 95.0, "%")),
    *_of(
        "teach",
        ("new tool right after training", "new_after_percent", "least", 90.0, "%"),
        ("old skills right after it", "old_after_percent", "least", None, "%"),
        ("time to learn it", "minutes", "most", 10.0, "min"),
    ),
    *_of("preference", ("declines as preferred after DPO", "after_percent", "least", 80.0, "%")),
]


def rows(results: Results) -> Iterator[Row]:
    """Every figure that was measured, in the order of the scripts."""
    for bench, result in results.items():
        figures = list(_speed(result)) if bench == "speed" else [each for each in FIGURES if each.bench == bench]
        for figure in figures:
            value: Any = result
            for key in figure.path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                yield Row(figure, float(value))


def _speed(result: Mapping[str, Any]) -> Iterator[Figure]:
    """The settings of the speed script, each with the bar that it names."""
    for name, each in result.get("settings", {}).items():
        path = ("settings", name, "ratio")
        yield Figure("speed", f"tokens a second, {name}", path, "least", each["bar"], "", True)


def markdown(results: Results, failed: Mapping[str, str], about: Mapping[str, str], plots: list[Path]) -> str:
    """The whole report.

    Args:
        results: what each script printed last.
        failed: scripts that came to no result, and why.
        about: the machine and versions, by name.
        plots: pictures beside the report.
    """
    lines = ["# Figures", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["What each is, and how it is measured: `tests/bench/README.md`. Ratios are ours to mlx-lm's.", ""]
    lines += ["| script | what | figure | bar | kept |", "|---|---|---|---|---|"]
    for row in rows(results):
        figure, ratio = row.figure, " of mlx-lm" if row.figure.ratio else ""
        sign = "≤" if figure.side == "most" else "≥"
        bar = "" if figure.bar is None else f"{sign} {figure.bar:g}{_unit(figure)}"
        kept = {True: "yes", False: "**no**", None: ""}[row.ok]
        lines.append(f"| {figure.bench} | {figure.what} | {row.value:.4g}{_unit(figure)}{ratio} | {bar} | {kept} |")
    told = {each.figure.bench for each in rows(results)}
    for bench in results:
        if bench not in told:
            lines.append(f"| {bench} | see {bench}.log | | | |")
    lines += [f"| {bench} | **failed**: {why.replace('|', '/')} | | | **no** |" for bench, why in failed.items()]
    for path in plots:
        lines += ["", f"![{path.stem.replace('_', ' ')}]({path.name})"]
    return "\n".join(lines) + "\n"


def _unit(figure: Figure) -> str:
    return f" {figure.unit}" if figure.unit else ""


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the plots that there are figures for; none where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return []
    drawn = (_ratios(results, folder), _memory(results, folder), _accepted(results, folder))
    return [path for path in drawn if path is not None]


def _canvas(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, height), layout="constrained")
    return canvas, canvas.subplots()


def _saved(canvas: Any, path: Path) -> Path:
    canvas.savefig(path, dpi=120)
    return path


def _ratios(results: Results, folder: Path) -> Path | None:
    """Bars of what ours costs where mlx-lm's costs 1, with the bar of each as a tick."""
    found = [row for row in rows(results) if row.figure.ratio and row.value > 0]
    if not found:
        return None
    canvas, axes = _canvas(1.2 + 0.3 * len(found))
    for place, row in enumerate(reversed(found)):
        cost, bar = ((1 / n if row.figure.side == "least" else n) if n else None for n in (row.value, row.figure.bar))
        axes.barh(place, cost, color="tab:red" if row.ok is False else "tab:blue", height=0.7)
        at, colour = (0.0, "white") if cost > 0.1 else (cost, "black")  # beside a bar that is too short for it
        axes.annotate(f" {cost:.2g}", (at, place), va="center", fontsize=8, color=colour)
        if bar:
            axes.plot([bar, bar], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axes.axvline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [row.figure.what.replace("`", "") for row in reversed(found)], fontsize=8)
    axes.set(xlabel="cost, mlx-lm = 1 (tokens a second: inverted); tick: the bar", title="Beside mlx-lm")
    axes.set_xlim(left=0)
    return _saved(canvas, folder / "ratios.png")


def _memory(results: Results, folder: Path) -> Path | None:
    """Peak memory of attention against the context."""
    contexts = results.get("long_context", {}).get("contexts")
    if not contexts:
        return None
    canvas, axes = _canvas(4.5)
    lengths = [row["context"] for row in contexts]
    axes.plot(lengths, [row["whole"] / 1e6 for row in contexts], marker="o", color="tab:blue", label="ours")
    axes.plot(lengths, [row["cache"] / 1e6 for row in contexts], ":", color="grey", label="the 4-bit cache alone")
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
    """Tokens a forward pass comes to, by task."""
    tasks = results.get("speculation", {}).get("tokens_per_pass")
    if not tasks:
        return None
    canvas, axes = _canvas(4)
    bars = axes.bar(list(tasks), list(tasks.values()), color="tab:blue", width=0.6)
    axes.bar_label(bars, fmt="%.2f")
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="task", ylabel="tokens a forward pass", title="Guessed from the prompt")
    return _saved(canvas, folder / "accepted.png")
