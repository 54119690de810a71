"""Fusing an adapter into the weights of its base, which makes a package of its own.

If the base is quantised, the fused matrices are quantised too, in as few bytes as keep the adapter's effect, which is
measured on prompts. A dense package is written in blocks of rows, so memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.layers import check_fit, put_adapter, read_adapter
from phi4_mlx.checkpoint import load_model, load_tokenizer_and_format, share_weights
from phi4_mlx.config.fields import Config
from phi4_mlx.convert.exact import ExactParameter, dense, with_adapter
from phi4_mlx.convert.package import write_package
from phi4_mlx.convert.quantize import Scheme, layout_of
from phi4_mlx.convert.weights import Parameter, plan
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.lora.effect import Effect, Probe, make_probes, measure
from phi4_mlx.lora.fitting import Fitting, in_bytes
from phi4_mlx.lora.probes import found_prompts, own_prompts
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fused:
    """The result of a fusion.

    Attributes:
        schemes: path of each fused matrix -> its quantisation; None for dense.
        raised: paths of the matrices that have more bits than in the base, to keep the effect.
        base_bytes: bytes of the base's weights.
        package_bytes: bytes of the package's weights.
        change: relative RMS by which the adapter changes the fused matrices.
        error: relative RMS of the stored matrices from the exact sum of base and adapter.
        effect: how much of the adapter's effect the package keeps, measured on the package itself.
    """

    schemes: Mapping[str, Scheme | None]
    raised: Sequence[str]
    base_bytes: int
    package_bytes: int
    change: float
    error: float
    effect: Effect


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
        dequantize: True for a dense package; else a quantised base stays quantised in the same way, except matrices
            that need more bits to keep the adapter's effect.
        revision: a commit, branch or tag of the Hub repository.
        progress: called with (bytes done, total bytes) of each pass over the weights.

    Returns:
        What the package keeps of the adapter's effect, and its size.

    Raises:
        RequestError: the target exists or cannot be written, or there is nothing to dequantise.
        CheckpointError: base or adapter is missing or damaged, or the adapter does not fit the base.
        ConfigError, TokenizerError: the base's files are missing, damaged or not supported.
    """
    fusion = _Fusion(Path(adapter_path), dequantize, progress)
    target = Path(os.path.expanduser(save_path))
    write_package(target, model, revision, fusion.planned, progress, tuned=True)
    fused = {path: fusion.parameters[path] for path in fusion.adapter.weights}
    change, error = fusion.measured.relative_rms()
    fused_model = load_model(target)
    return Fused(
        schemes={path: each.target for path, each in fused.items()},
        raised=[path for path, each in fused.items() if not dequantize and each.target != each.packed],
        base_bytes=sum(each.input_bytes for each in fusion.parameters.values()),
        package_bytes=sum(each.output_bytes for each in fusion.parameters.values()),
        change=change,
        error=error,
        effect=measure(fused_model, fusion.probes, in_bytes(fusion.progress, fused_model)),
    )


class _Fusion:
    """One fusion: measures the adapter, then plans the package."""

    def __init__(self, adapter_path: Path, dequantize: bool, progress: Callable[[int, int], Any] | None):
        self.adapter = read_adapter(adapter_path)
        self.measured = Measurement()
        self.probes: list[Probe] = []
        self.parameters: dict[str, Parameter] = {}
        self._path, self._dequantize = adapter_path, dequantize
        self.progress = progress or (lambda done, total: None)

    def planned(self, folder: Path, config: Config) -> list[Parameter]:
        """The parameters of the package, for `write_package`."""
        base = load_model(folder)
        check_fit(base, self.adapter)
        plans = {each.path: each for each in plan(folder, config, None, None, self._dequantize)}
        tuned = share_weights(base)
        put_adapter(tuned, self.adapter)
        self._measure(base, tuned, load_tokenizer_and_format(folder, model_type=config.model_type))
        quantised = {path: plans[path] for path in self.adapter.weights if plans[path].target}
        arrays: Mapping[str, list[mx.array]] = {}
        if quantised:
            fitting = Fitting(base, tuned, self.adapter, quantised, self.probes, self.progress)
            fitting.fit()
            arrays = fitting.arrays
            for path, scheme in fitting.choice.items():
                before, width = plans[path], self.adapter.of(path)[0].shape[0]
                outputs = layout_of(f"{path}.weight", before.numbers, (before.rows, width), scheme)
                plans[path] = replace(before, target=scheme, outputs=outputs)
        for path in self.adapter.weights:
            plans[path] = FusedParameter(
                **vars(plans[path]), adapter=self.adapter, measured=self.measured, arrays=arrays
            )
        self.parameters = plans
        return list(plans.values())

    def _measure(self, base: LanguageModel, tuned: LanguageModel, tokenizer: Tokenizer) -> None:
        """Finds prompts, and answers them with the adapter."""
        progress = in_bytes(self.progress, base)
        prompts = [(ids, True) for ids in own_prompts(self._path, tokenizer)]
        prompts += [(ids, False) for ids in found_prompts(base, tuned, tokenizer, progress)]
        for probe in make_probes(base, tuned, prompts, tokenizer.eos_ids):
            self.probes.append(probe)
            progress(len(self.probes), len(prompts))


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
class FusedParameter(ExactParameter):
    """A parameter that an adapter changes while it is converted.

    Attributes:
        measured: gets every block that is converted.
        arrays: path -> the whole matrix in the target's quantisation, for those that are quantised.
    """

    measured: Measurement
    arrays: Mapping[str, list[mx.array]]

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Rows `first` to `last` of each output, as bytes, not yet computed."""
        base = self.base(first, last)
        exact = with_adapter(self.adapter, self.path, base, first, last) if self.adapter else base
        if self.path in self.arrays:
            arrays = [array[first:last] for array in self.arrays[self.path]]
        else:
            arrays = [exact.astype(mlx_dtype(self.numbers))]
        self.measured.add(base, exact, dense(arrays, self.target))
        converted: list[mx.array] = self.as_bytes(arrays)
        return converted
