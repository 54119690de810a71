"""The quantisation of fused matrices: as few bytes as keep the adapter's effect.

All matrices stay in the base's scheme, if `rounding` for their inputs is enough. Else they are raised one bit at a
time, those first that gain most per byte, until the effect is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.checkpoint import share_weights
from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.convert.exact import dense, with_adapter
from phi4_mlx.convert.quantize import Scheme, layout_of
from phi4_mlx.convert.weights import Parameter
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.files.safetensors import tensor_bytes
from phi4_mlx.lora.effect import Probe, measure
from phi4_mlx.lora.rounding import metric, rounded
from phi4_mlx.models.model import LanguageModel

INPUTS = 32  # last tokens of each probe whose inputs are recorded
ROWS = 1024  # rows of a matrix that are rounded at a time
TRIES = 5  # measurements of raised packages

Choice = dict[str, Scheme | None]
"""Path of each adapted layer -> its quantisation; None for dense."""


def in_bytes(progress: Callable[[int, int], object], model: LanguageModel) -> Callable[[int, int], None]:
    """Adapts a progress callback of bytes to one of (passes done, total passes) over a model's weights."""
    nbytes = model.weights_bytes

    def passed(done: int, total: int) -> None:
        progress(done * nbytes, total * nbytes)

    return passed


def schemes_above(scheme: Scheme, width: int) -> list[Scheme | None]:
    """The schemes with more bits than one, and dense at the end; `width` is the number of columns."""
    widths, sizes = QUANTIZATION_MODES["affine"]
    if scheme.mode == "affine":
        sizes, bits = (scheme.group_size,), scheme.bits
    else:
        sizes = tuple(size for size in sizes if width % size == 0)
        bits = scheme.bits - 1  # affine has two numbers a group, mx modes one
    return [*(Scheme("affine", n, sizes[0]) for n in sorted(widths) if sizes and n > bits), None]


class Fitting:
    """Fused matrices of a quantised base in chosen schemes.

    Args:
        base: the model without the adapter.
        tuned: the model with it; gets the probes once, to record the inputs of its layers.
        adapter: the adapter, "lora" or "dora".
        parameters: the plan of each adapted layer that is quantised, by path.
        probes: prompts with the adapter's answers.
        progress: called with (bytes done, total bytes) while matrices are rounded.

    Attributes:
        choice: the scheme of each layer.
        arrays: path -> the arrays of its matrix, as the package stores them.
    """

    def __init__(
        self,
        base: LanguageModel,
        tuned: LanguageModel,
        adapter: Adapter,
        parameters: Mapping[str, Parameter],
        probes: Sequence[Probe],
        progress: Callable[[int, int], object],
    ):
        self._base, self._adapter, self._parameters, self._probes = base, adapter, parameters, probes
        self._progress = progress
        self._layers = {path: layer for path, layer in base.named_modules() if path in parameters}
        self._inputs = _record(tuned, list(parameters), probes)
        self.choice: Choice = {}
        self.arrays: dict[str, list[mx.array]] = {}

    def fit(self) -> None:
        """Finds the smallest choice that keeps the effect; all layers dense, if none does."""
        start: Choice = {path: parameter.packed for path, parameter in self._parameters.items()}
        if self._keeps(start):
            return
        steps = self._steps(start)
        low, high = 0, len(steps)
        for _ in range(TRIES):
            middle = (low + high) // 2
            if middle == low:
                break
            if self._keeps(start | dict(steps[:middle])):
                high = middle
            else:
                low = middle
        self._round(start | dict(steps[:high]))

    def _keeps(self, choice: Choice) -> bool:
        self._round(choice)
        model = share_weights(self._base)
        layers = [(path, _layer(choice[path], self.arrays[path])) for path in choice]
        model.update_modules(tree_unflatten(layers))
        model.eval()
        return measure(model, self._probes, in_bytes(self._progress, model)).keeps

    def _round(self, choice: Choice) -> None:
        """Rounds the layers whose scheme changes."""
        changed = [path for path, scheme in choice.items() if path not in self.arrays or self.choice[path] != scheme]
        total, done = sum(self._parameters[path].input_bytes for path in changed), 0
        for path in changed:
            self.arrays[path] = self._rounded(path, choice[path])
            mx.clear_cache()
            done += self._parameters[path].input_bytes
            self._progress(done, total)
        self.choice = choice

    def _rounded(self, path: str, scheme: Scheme | None) -> list[mx.array]:
        parameter, dtype = self._parameters[path], mlx_dtype(self._parameters[path].numbers)
        own = self._metric(path) if scheme else None
        blocks: list[list[mx.array]] = []
        for first in range(0, parameter.rows, ROWS):
            base, exact = self._exact(path, first)
            if scheme is None or own is None:
                arrays = [exact.astype(dtype)]
            else:
                arrays = rounded(exact, scheme, dtype, own, base if scheme == parameter.packed else None)
            mx.eval(arrays)
            blocks.append(arrays)
        joined = [mx.concatenate(parts) for parts in zip(*blocks, strict=True)]
        mx.eval(joined)
        return joined

    def _exact(self, path: str, first: int) -> tuple[list[mx.array], mx.array]:
        """Rows from `first` on: the base's arrays, and the exact sum of base and adapter in fp32."""
        layer, last = self._layers[path], min(first + ROWS, self._parameters[path].rows)
        parts = [layer[name][first:last] for name in ("weight", "scales", "biases") if layer.get(name) is not None]
        return parts, with_adapter(self._adapter, path, dense(parts, self._parameters[path].packed), first, last)

    def _metric(self, path: str) -> mx.array:
        found = metric(self._inputs[path], self._adapter.of(path)[0])
        mx.eval(found)
        return found

    def _steps(self, choice: Choice) -> list[tuple[str, Scheme | None]]:
        """Changes of single layers to their next scheme, those first that gain most per byte.

        A bit halves the error, so its square falls to a quarter; no layer is rounded to find the order.
        """
        steps: list[tuple[float, int, str, Scheme | None]] = []
        for path, scheme in choice.items():
            assert scheme is not None
            parameter, width = self._parameters[path], self._inputs[path].shape[1]
            shape = (parameter.rows, width)
            loss, size = self._loss(path), parameter.output_bytes
            for order, above in enumerate(schemes_above(scheme, width)):
                lower = loss / 4 ** (above.bits - (scheme.bits if scheme else 0)) if above else 0.0
                layout = layout_of(f"{path}.weight", parameter.numbers, shape, above)
                larger = sum(tensor_bytes(*kind) for kind in layout.values())
                steps.append(((loss - lower) / max(1, larger - size), -order, path, above))
                loss, size, scheme = lower, larger, above
        return [(path, above) for _, _, path, above in sorted(steps, key=lambda step: step[:3], reverse=True)]

    def _loss(self, path: str) -> float:
        """The squared error of a layer's outputs as it is rounded now, relative to the squares of the outputs."""
        own, scheme = self._metric(path), self.choice[path]
        error = total = 0.0
        for first in range(0, self._parameters[path].rows, ROWS):
            _, exact = self._exact(path, first)
            off = dense([array[first : first + ROWS] for array in self.arrays[path]], scheme) - exact
            error += ((off @ own) * off).sum().item()
            total += ((exact @ own) * exact).sum().item()
        return error / max(total, 1e-30)


class _Recorder(nn.Module):
    """A layer that keeps the last inputs of each sequence."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer, self.inputs = layer, list[mx.array]()

    def __call__(self, x: mx.array) -> mx.array:
        self.inputs.append(x[:, -INPUTS:].reshape(-1, x.shape[-1]))
        output: mx.array = self._layer(x)
        return output


def _record(tuned: LanguageModel, paths: Sequence[str], probes: Sequence[Probe]) -> dict[str, mx.array]:
    """The inputs of layers on the probes, [N, in] each."""
    layers = {path: layer for path, layer in tuned.named_modules() if path in paths}
    recorders = {path: _Recorder(layer) for path, layer in layers.items()}
    tuned.update_modules(tree_unflatten(list(recorders.items())))
    for probe in probes:
        tuned.logits(tuned.hidden(mx.array([probe.ids])))
        mx.eval([recorder.inputs[-1] for recorder in recorders.values()])
    tuned.update_modules(tree_unflatten(list(layers.items())))
    return {path: mx.concatenate(recorder.inputs) for path, recorder in recorders.items()}


def _layer(scheme: Scheme | None, arrays: Sequence[mx.array]) -> nn.Module:
    """A linear layer over the arrays of a package."""
    if scheme is None:
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = arrays[0]
        return layer
    rows, words = arrays[0].shape
    layer = nn.QuantizedLinear(words * 32 // scheme.bits, rows, bias=False, **vars(scheme))
    layer.update(dict(zip(("weight", "scales", "biases"), arrays, strict=False)))
    return layer
