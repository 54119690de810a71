"""An adapter worked into the weights of its base, as a package of its own.

The weights pass through the converter, in blocks of rows, so memory does not grow with the model. Where the base is
quantised the fused matrices are quantised again, each as it was, and what that costs is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.folder import FULL, Adapter
from phi4_mlx.adapters.layers import check_fit, put_adapter, read_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.config import ModelConfig
from phi4_mlx.convert.package import write_package
from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.convert.weights import Parameter, plan
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import load_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. 1, 2, 3, 4, 5: which number comes next, and why?"
"""Where the logits of the package are held against those of base and adapter."""


@dataclass(frozen=True)
class Fused:
    """What became of a fusion.

    Attributes:
        tensors: how many were changed.
        change: relative RMS by which the adapter changed them.
        error: relative RMS of what is in the package, beside the exact sum.
        max_difference: of a logit on `PROMPT`, between the package and the base with the adapter on.
        mean_difference: likewise, the mean of absolute values.
        agreeing: at how many of the prompt's tokens the likeliest next one is the same.
        prompt_tokens: how many tokens the prompt has.
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
    """Makes a package of a model and an adapter, complete or not at all.

    Args:
        model: the base, a folder or a Hub id.
        adapter_path: the adapter's folder, in mlx-lm's layout or PEFT's.
        save_path: the package's folder; must not exist yet.
        dequantize: leaves the whole package dense; else a quantised base is quantised again as it was.
        revision: a commit, branch or tag of the Hub repository.
        progress: called as (bytes done, bytes in all) of the base.

    Raises:
        RequestError: the target exists or cannot be written, or there is nothing to dequantise.
        CheckpointError: base or adapter is missing or damaged, or they are not for each other.
        ConfigError, TokenizerError: the base's files are missing, damaged, or ask for what is not done here.
    """
    adapter = read_adapter(Path(adapter_path))
    changed: list[FusedParameter] = []

    def planned(folder: Path, config: ModelConfig) -> list[Parameter]:
        check_fit(load_model(folder), adapter)
        parameters = [_fused(parameter, adapter) for parameter in plan(folder, config, None, None, dequantize)]
        changed.extend(parameter for parameter in parameters if isinstance(parameter, FusedParameter))
        return parameters

    target = Path(os.path.expanduser(save_path))
    write_package(target, model, revision, planned, progress)
    squares = [sum(sums, start=mx.zeros(3)) for sums in (parameter.squares for parameter in changed)]
    change, error, whole = sum(squares, start=mx.zeros(3)).tolist()
    return Fused(
        len(changed), (change / whole) ** 0.5, (error / whole) ** 0.5, *_differences(model, revision, adapter, target)
    )


@dataclass(frozen=True)
class FusedParameter(Parameter):
    """A parameter that an adapter changes on its way.

    Attributes:
        adapter: the adapter.
        squares: filled by each block: the sums of squares [3] of change, error and exact weights.
    """

    adapter: Adapter
    squares: list[mx.array] = field(default_factory=list)

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Some rows of each output, as bytes, not yet computed."""
        base = _dense([stored.rows(first, last) for stored in self.inputs], self.packed)
        exact = _with_adapter(self.adapter, self.path, base, first, last)
        arrays = [exact.astype(mlx_dtype(self.numbers))]
        if self.target:
            arrays = mx.quantize(arrays[0], **vars(self.target))
        parts = (exact - base, _dense(arrays, self.target) - exact, exact)
        self.squares.append(mx.stack([mx.square(part).sum() for part in parts]))
        mx.async_eval(self.squares[-1])  # now, or the blocks would stay in memory until the sums are asked for
        return self.as_bytes(arrays)


def _fused(parameter: Parameter, adapter: Adapter) -> Parameter:
    name = f"{parameter.path}.weight" if adapter.kind == FULL else f"{parameter.path}.lora_a"
    return FusedParameter(**vars(parameter), adapter=adapter) if name in adapter.tensors else parameter


def _dense(arrays: Sequence[mx.array], scheme: Scheme | None) -> mx.array:
    """Rows of a matrix in fp32, from what a file holds of it."""
    if scheme is None:
        return arrays[0].astype(mx.float32)
    weight, *rest = arrays
    if scheme.mode == "affine":
        rest = [array.astype(mx.float32) for array in rest]  # else the product would be rounded to their precision
    return mx.dequantize(weight, *rest, **vars(scheme)).astype(mx.float32)


def _with_adapter(adapter: Adapter, path: str, rows: mx.array, first: int, last: int) -> mx.array:
    """What some rows of a matrix [out, in] are with the adapter on, in fp32."""
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
    """How far the package's logits are from those of base and adapter: largest, mean, agreeing tokens, tokens."""
    ids = mx.array([load_tokenizer(target).encode(PROMPT)])

    def logits(model: LanguageModel) -> mx.array:
        found = model(ids).astype(mx.float32)
        mx.eval(found)
        return found

    base = load_model(resolve(model, revision))
    put_adapter(base, adapter)
    expected = logits(base)
    del base  # two models need not be in memory together
    found = logits(load_model(target))
    difference = mx.abs(found - expected)
    agreeing = (found.argmax(-1) == expected.argmax(-1)).sum()
    return difference.max().item(), difference.mean().item(), int(agreeing.item()), ids.size
