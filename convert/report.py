"""The report of a calibrated package: quantization.json and a picture of KL against bytes, by matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.manifest import REPORT_FILE

from .bits import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

PICTURE_FILE = "quantization.png"

METHOD = (
    "GPTQ on a grid searched with weights from the inputs' second moments; bits by the KL of each matrix alone, "
    "measured in one scheme and taken to be proportional to the squared error of its outputs in the others"
)

_LAYER = re.compile(r"\.(\d+)\.")  # the first number in a path
_PANELS = 4  # beside each other, at most
_SMALLEST_KL = 1e-9  # drawn; rounding in float32 is not far below


@dataclass(frozen=True)
class Report:
    """The measurements and the choice of a calibration.

    Attributes:
        chosen: path -> the scheme of the matrix in the package.
        candidates: path -> all schemes that were tried.
        bits_per_weight: the budget, scales and biases included.
        data: the calibration data's name, without its folder.
        data_sha256: SHA-256 of that file, in hexadecimal.
        tokens: calibration tokens.
        seconds: time of the calibration.
        peak_bytes: peak memory of the calibration.
        kl: KL divergence of the package from the unquantised model on the calibration data, in nats per token.
    """

    chosen: Mapping[str, Candidate]
    candidates: Mapping[str, Sequence[Candidate]]
    bits_per_weight: float
    data: str
    data_sha256: str
    tokens: int
    seconds: float
    peak_bytes: int
    kl: float

    @property
    def kl_sum(self) -> float:
        """The sum of the KLs with each matrix alone quantised, which predicts `kl`."""
        return sum(each.kl for each in self.chosen.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the chosen matrices, scales and biases counted in 16 bits each."""
        return sum(each.nbytes for each in self.chosen.values())

    @property
    def mean_bits(self) -> float:
        """Bits per weight of the chosen matrices."""
        return self.nbytes * 8 / sum(each.numbers for each in self.chosen.values())

    def to_json(self) -> JsonObject:
        """The content of quantization.json."""
        return {
            "method": METHOD,
            "budget_bits_per_weight": self.bits_per_weight,
            "bits_per_weight": self.mean_bits,
            "bytes": self.nbytes,
            "scale_bits": 16,
            "kl_nats_per_token": {"measured": self.kl, "sum_of_matrices": self.kl_sum},
            "calibration": {"data": self.data, "sha256": self.data_sha256, "tokens": self.tokens},
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "matrices": {
                path: {"numbers": each.numbers, "group_size": each.scheme.group_size}
                | _measured(each)
                | {"candidates": [_measured(other) for other in self.candidates[path]]}
                for path, each in self.chosen.items()
            },
        }


def _measured(candidate: Candidate) -> JsonObject:
    return {
        "bits": candidate.scheme.bits,
        "bytes": candidate.nbytes,
        "kl_nats_per_token": candidate.kl,
        "relative_squared_error": candidate.error,
    }


def write_report(out: Path, report: Report) -> list[Path]:
    """Writes quantization.json and, if matplotlib is installed, the picture.

    Args:
        out: the package's folder.
        report: what to write.

    Returns:
        The new files.

    Raises:
        OSError: they cannot be written.
    """
    path = out / REPORT_FILE
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return [path, *_draw(out / PICTURE_FILE, report)]


def kind_of(path: str) -> str:
    """The kind of matrix at a path, without its layer: "self_attn.qkv_proj", "embed_tokens"."""
    number = _LAYER.search(path)
    return path[number.end() :] if number else path.removeprefix("model.")


def layer_of(path: str) -> int | None:
    """The number of the layer that a path is in; None for the embedding and the head."""
    number = _LAYER.search(path)
    return int(number[1]) if number else None


def _draw(path: Path, report: Report) -> list[Path]:
    """One panel for each kind and size of matrix; no file without matplotlib."""
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return []
    kinds = list(dict.fromkeys((kind_of(path), each.numbers) for path, each in report.chosen.items()))
    rows = -(-len(kinds) // _PANELS)
    columns = -(-len(kinds) // rows)
    figure = Figure(figsize=(3.1 * columns + 1.6, 3.1 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    layers = [layer for layer in map(layer_of, report.chosen) if layer is not None]
    colours = Normalize(0, max(layers, default=0) or 1)
    panels = grid.ravel()
    for axes, (kind, numbers) in zip(panels, kinds, strict=False):
        _draw_kind(axes, kind, numbers, report, colours)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("KL, nats per token")
    if len(layers) > 1:
        whole = MaxNLocator(integer=True)
        figure.colorbar(ScalarMappable(colours, "viridis"), ax=grid, label="layer", aspect=40, ticks=whole)
    legend = [
        Line2D([], [], color="grey", marker=".", linewidth=0.8, label="tried"),
        Line2D([], [], color="none", marker="o", markerfacecolor="grey", markeredgecolor="black", label="chosen"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"KL with one matrix alone quantised, against its size ({report.mean_bits:.2f} bits per weight in all)"
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return [path]


def _draw_kind(axes: Axes, kind: str, numbers: int, report: Report, colours: Normalize) -> None:
    """A line through the candidates of each such matrix, and a larger point where it was chosen."""
    from matplotlib import colormaps

    unit, name = (1e6, "MB") if numbers >= 10**6 else (1e3, "KB")
    widths: dict[float, int] = {}
    for path, chosen in report.chosen.items():
        if (kind_of(path), chosen.numbers) != (kind, numbers):
            continue
        layer = layer_of(path)
        colour = "grey" if layer is None else colormaps["viridis"](colours(layer))
        options = sorted(report.candidates[path], key=lambda each: each.nbytes)
        widths |= {each.nbytes / unit: each.scheme.bits for each in options}
        kls = [max(each.kl, _SMALLEST_KL) for each in options]
        axes.plot([each.nbytes / unit for each in options], kls, color=colour, marker=".", markersize=3, linewidth=0.8)
        axes.plot(
            chosen.nbytes / unit, max(chosen.kl, _SMALLEST_KL), "o", color=colour, markeredgecolor="black",
            markeredgewidth=0.7, markersize=6.5, zorder=3,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(f"{kind}, {numbers / 1e6:.3g} M" if numbers >= 10**6 else f"{kind}, {numbers:,}", fontsize=10)
    axes.set_xticks(list(widths), [f"{nbytes:.3g}\n{bits} bits" for nbytes, bits in widths.items()], fontsize=7)
    axes.set_xlabel(name, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, which="major")
