"""Fusing an adapter into the weights of its base, which makes a package of its own.

The weights pass through the converter in blocks of rows, so memory does not grow with the model. If the base is
quantised, each fused matrix is quantised again in the same way, and the error of that is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.folder import FULL, Adapter
from phi4_mlx.adapters.layers import check_fit, put_adapter, read_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.config import Config
from phi4_mlx.convert.package import write_package
from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.convert.weights import Parameter, plan
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import load_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. 1, 2, 3, 4, 5: which number comes next, and why?"
"""The prompt on which the logits of the package are compared with those of base and adapter."""


@dataclass(frozen=True)
class Fused:
    """The result of a fusion.

    Attributes:
        tensors: number of fused matrices.
        change: relative RMS by which the adapter changes them.
        error: relative RMS of the stored matrices from the exact sum of base and adapter.
        max_difference: largest absolute difference of a logit on `PROMPT`, between the package and the base with the
            adapter on.
        mean_difference: mean absolute difference of these logits.
        agreeing: number of the prompt's tokens at which the likeliest next token is the same.
        prompt_tokens: number of tokens of the prompt.
    """

    tensors: int
    change: float
    error: float
    max_difference: float
    mean_difference: float
    agreeing: int
    prompt_tokens: int


def fuse(
    model: str | Path,
    adapter_path: str | Path,
    save_path: str | Path = "fused_model",
    dequantize: bool = False,
    revision: str | None = None,
    *,
    progress: Callable[[int, int], Any] | None = None,
) -> Fused:
    """Makes a package of a model and an adapter; the package is complete or absent.

    Args:
        model: the base, a folder or a Hub id.
        adapter_path: the adapter's folder, in mlx-lm's layout or PEFT's.
        save_path: the package's folder; must not exist yet.
        dequantize: True for a dense package; else a quantised base stays quantised in the same way.
        revision: a commit, branch or tag of the Hub repository.
        progress: called with (bytes done, total bytes) of the base.

    Returns:
        How far the package is from the base with the adapter on.

    Raises:
        RequestError: the target exists or cannot be written, or there is nothing to dequantise.
        CheckpointError: base or adapter is missing or damaged, or the adapter does not fit the base.
        ConfigError, TokenizerError: the base's files are missing, damaged or not supported.
    """
    adapter = read_adapter(Path(adapter_path))
    measured = Measurement()

    def planned(folder: Path, config: Config) -> list[Parameter]:
        check_fit(load_model(folder), adapter)
        paths = set(adapter.paths)
        return [
            FusedParameter(**vars(each), adapter=adapter, measured=measured) if each.path in paths else each
            for each in plan(folder, config, None, None, dequantize)
        ]

    target = Path(os.path.expanduser(save_path))
    write_package(target, model, revision, planned, progress)
    change, error = measured.relative_rms()
    return Fused(len(adapter.paths), change, error, *_differences(model, revision, adapter, target))


class Measurement:
    """Sums of squares over all blocks of the fused matrices: of the change, of the error and of the exact weights."""

    def __init__(self) -> None:
        self._squares: list[mx.array] = []  # [3] each

    def add(self, base: mx.array, exact: mx.array, stored: mx.array) -> None:
        """Adds a block of rows.

        Args:
            base: rows of the base, fp32 [rows, in].
            exact: the same rows with the adapter, fp32 [rows, in].
            stored: the same rows as the package stores them, fp32 [rows, in].
        """
        self._squares.append(mx.stack([mx.square(part).sum() for part in (exact - base, stored - exact, exact)]))
        mx.async_eval(self._squares[-1])  # now, or every block would stay in memory until the end

    def relative_rms(self) -> tuple[float, float]:
        """Relative RMS of the change and of the error."""
        change, error, exact = sum(self._squares, start=mx.zeros(3)).tolist()
        return (change / exact) ** 0.5, (error / exact) ** 0.5


@dataclass(frozen=True)
class FusedParameter(Parameter):
    """A parameter that an adapter changes while it is converted.

    Attributes:
        adapter: the adapter.
        measured: gets every block that is converted.
    """

    adapter: Adapter
    measured: Measurement

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Rows `first` to `last` of each output, as bytes, not yet computed."""
        base = _dense([stored.rows(first, last) for stored in self.inputs], self.packed)
        exact = _with_adapter(self.adapter, self.path, base, first, last)
        arrays = [exact.astype(mlx_dtype(self.numbers))]
        if self.target:
            arrays = mx.quantize(arrays[0], **vars(self.target))
        self.measured.add(base, exact, _dense(arrays, self.target))
        converted: list[mx.array] = self.as_bytes(arrays)
        return converted


def _dense(arrays: Sequence[mx.array], scheme: Scheme | None) -> mx.array:
    """Rows of a matrix in fp32, from the arrays that a file stores."""
    if scheme is None:
        return arrays[0].astype(mx.float32)
    weight, *rest = arrays
    if scheme.mode == "affine":
        rest = [array.astype(mx.float32) for array in rest]  # else the product would be rounded to their dtype
    return mx.dequantize(weight, *rest, **vars(scheme)).astype(mx.float32)


def _with_adapter(adapter: Adapter, path: str, rows: mx.array, first: int, last: int) -> mx.array:
    """Rows `first` to `last` of a matrix [out, in] with the adapter on, in fp32."""
    if adapter.kind == FULL:
        return adapter.tensors[f"{path}.weight"][first:last].astype(mx.float32)
    a, b, *m = (array.astype(mx.float32) for array in adapter.of(path))
    rows = rows + adapter.scale * (a @ b[:, first:last]).T
    for norms in m:
        found = mx.linalg.norm(rows, axis=1)
        rows = (norms[first:last] / mx.maximum(found, 1e-15))[:, None] * rows
    return rows


def _differences(
    model: str | Path, revision: str | None, adapter: Adapter, target: Path
) -> tuple[float, float, int, int]:
    """Differences of the package's logits from those of base and adapter: largest, mean, agreeing tokens, tokens."""
    ids = mx.array([load_tokenizer(target).encode(PROMPT)])

    def logits(model: LanguageModel) -> mx.array:
        found = model(ids).astype(mx.float32)
        mx.eval(found)
        return found

    base = load_model(resolve(model, revision))
    put_adapter(base, adapter)
    expected = logits(base)
    del base  # only one model at a time in memory
    found = logits(load_model(target))
    difference = mx.abs(found - expected)
    agreeing = (found.argmax(-1) == expected.argmax(-1)).sum()
    return difference.max().item(), difference.mean().item(), int(agreeing.item()), ids.size
