"""A picture of the languages: right answers, and the price of a language in tokens beside English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4_mlx.evaluation.languages.texts import LANGUAGES
from phi4_mlx.evaluation.languages.token_table import Count, price
from phi4_mlx.files.atomic import replacing

NAME = "languages.png"

# From Okabe and Ito's palette, which is readable with any colour vision.
_COLOURS = {"own": "#0072b2", "o200k": "#56b4e9", "Llama-3": "#e69f00", "Qwen 2.5": "#009e73", "Phi-3.5": "#cc79a7"}


def draw(samples: Sequence[Mapping[str, Any]], tokens: Mapping[str, Count], folder: Path) -> str:
    """Draws `languages.png`.

    Args:
        samples: of the task.
        tokens: of each language, "own" among the tokenizers.
        folder: an existing one.

    Returns:
        A note if it could not be drawn, else "".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: pip install 'matplotlib>=3.8'"
    scores: dict[str, list[float]] = {}
    for sample in samples:
        scores.setdefault(sample["language"], []).append(sample["score"])
    costs = {name: price(tokens, name) for name in tokens["en"].tokens}
    codes = sorted(scores, key=lambda code: costs["own"][code])
    names = [LANGUAGES[code].name for code in codes]
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(codes)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [sum(scores[code]) / len(scores[code]) for code in codes], color=_COLOURS["own"])
    left.set(xlim=(0, 1), xlabel="answers without a fault", title="Answers in the language asked")
    for name, cost in costs.items():
        marker, size = ("o", 7) if name == "own" else ("|", 12)
        right.plot(
            [cost[code] for code in codes],
            names,
            marker,
            ms=size,
            mew=2,
            color=_COLOURS[name],
            label="this model" if name == "own" else name,
        )
    right.set(xlabel="tokens for the same content, English = 1", title="Price of a language")
    right.set_xlim(left=0)
    right.grid(axis="x", alpha=0.3)
    right.legend(fontsize=8)
    with replacing(folder / NAME) as path:
        figure.savefig(path, dpi=120, format="png")
    return ""
