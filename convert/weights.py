"""The weights of a checkpoint, parameter by parameter: read, dequantised, cast, quantised, written.

Everything is planned from the headers. The numbers then pass through in blocks of rows. The next blocks are read and
computed while one is written, so memory grows neither with the model nor with its largest tensor.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import check_tensors, empty_model, stored_tensors
from phi4_mlx.config.fields import Config
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.dtypes import DTYPES, FLOATS, mlx_dtype
from phi4_mlx.files.regular_file import open_regular
from phi4_mlx.files.safetensors import Stored, TensorWriter, tensor_bytes
from phi4_mlx.models.padded import PaddedLinear, pad, padded_width

from .quantize import Layout, Recipe, Scheme, layout_of

BLOCK_BYTES = 2**22  # read from the source at a time
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}  # its bits
_NVFP4_LARGEST = 2688  # 448, the largest scale in E4M3, times 6, the largest number in E2M1
_NVFP4_LARGEST_SCALE = 0x7E  # its bits
_BLOCKS_AHEAD = 8  # read and being computed while one is written


def read_rows(stored: Stored, first: int, last: int) -> mx.array:
    """Reads rows from `first` to before `last`, in the dtype and shape of the tensor.

    Raises:
        CheckpointError: they cannot be read, or contain NaN or infinity.
    """
    row_bytes = (stored.info.end - stored.info.start) // stored.info.shape[0]
    count = (last - first) * row_bytes
    try:
        with open_regular(stored.path) as file:
            file.seek(stored.info.start + first * row_bytes)
            data = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{stored.path} cannot be read: {error.strerror}") from None
    if len(data) < count:
        raise CheckpointError(f"{stored.path} ended early: it was changed while it was read; convert it again")
    if not _is_finite(data, stored.info.dtype):
        raise CheckpointError(
            f"{stored.path}: {stored.name} contains NaN or infinity; the checkpoint is damaged, download it again"
        )
    array = mx.array(memoryview(data)).view(mlx_dtype(stored.info.dtype))
    return array.reshape(last - first, *stored.info.shape[1:])


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model on its way from the checkpoint to the package.

    Attributes:
        path: the path of its layer.
        inputs: its tensors in the checkpoint: one, or the packed weight, the scales and the biases.
        outputs: its tensors in the package.
        numbers: dtype of the floating-point outputs and of the numbers that are quantised, one of `FLOATS`.
        packed: the quantisation in the checkpoint; None if it is dense.
        target: the quantisation in the package; None if it is dense.
        width: numbers of a row; those of a quantised matrix may be padded with zeros.
        on_demand: as `LanguageModel.on_demand`; such parameters have a file of their own.
    """

    path: str
    inputs: tuple[Stored, ...]
    outputs: Layout
    numbers: str
    packed: Scheme | None
    target: Scheme | None
    width: int
    on_demand: bool

    @property
    def rows(self) -> int:
        """Rows of the matrix, or elements of the vector."""
        return self.inputs[0].info.shape[0]

    @property
    def input_bytes(self) -> int:
        """Bytes to read."""
        return sum(stored.info.end - stored.info.start for stored in self.inputs)

    @property
    def output_bytes(self) -> int:
        """Bytes to write."""
        return sum(tensor_bytes(*kind) for kind in self.outputs.values())

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows to convert at a time, as (first, last); `last` is not included."""
        step = max(1, BLOCK_BYTES * self.rows // self.input_bytes)
        return ((first, min(first + step, self.rows)) for first in range(0, self.rows, step))

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Rows from `first` to before `last` of each output, as bytes, not yet computed."""
        if self.packed == self.target:
            return self.as_bytes(read_rows(stored, first, last) for stored in self.inputs)
        rows = self.dense(first, last)
        if self.target is None:
            return self.as_bytes([rows])
        padded = pad(rows, padded_width(self.width, self.target.group_size))
        return self.as_bytes(mx.quantize(padded, **vars(self.target)))

    def as_bytes(self, arrays: Iterable[mx.array]) -> list[mx.array]:
        """Rows of each output in its dtype, viewed as bytes."""
        kinds = [mlx_dtype(dtype) for dtype, _ in self.outputs.values()]
        return [array.astype(kind).view(mx.uint8) for array, kind in zip(arrays, kinds, strict=True)]

    def dense(self, first: int, last: int) -> mx.array:
        """Rows from `first` to before `last`, dequantised, in the dtype of the package."""
        rows, *rest = (read_rows(stored, first, last) for stored in self.inputs)
        if self.packed:
            rows = mx.contiguous(mx.dequantize(rows, *rest, **vars(self.packed))[:, : self.width])
        return rows.astype(mlx_dtype(self.numbers))

    def finite(self, first: int, last: int) -> mx.array:
        """As `dense`, but computed; RequestError if a number is too large for the dtype of the package."""
        rows = self.dense(first, last)
        if not mx.isfinite(rows).all().item():
            raise self.too_large(self.name, self.numbers, first, last)
        return rows

    def too_large(self, name: str, dtype: str, first: int, last: int) -> RequestError:
        """The refusal of rows that are not finite in a tensor of the package of this name and dtype."""
        return RequestError(
            f"{name} has numbers too large for {DTYPES[dtype].mlx_name}{self.such_as(first, last)}; convert with "
            "--dtype bfloat16 or float32"
        )

    def such_as(self, first: int, last: int) -> str:
        """A phrase with the largest magnitude in rows of the source; empty if that is packed."""
        return "" if self.packed else f", such as {self.largest(first, last):.6g}"

    def largest(self, first: int, last: int) -> float:
        """The largest magnitude in rows of the source; infinity if that is packed, whose numbers are not at hand."""
        if self.packed:
            return math.inf
        return float(mx.abs(read_rows(self.inputs[0], first, last).astype(mx.float32)).max().item())

    def layout(self, scheme: Scheme) -> Layout:
        """The tensors of a matrix of the decoder in another scheme; see `Scheme.layout`."""
        return scheme.layout(self.path, self.numbers, (self.rows, self.width))

    @property
    def name(self) -> str:
        """Its name in the model."""
        return next(iter(self.outputs))


def plan(folder: Path, config: Config, recipe: Recipe | None, dtype: str | None, dequantize: bool) -> list[Parameter]:
    """Plans every parameter of the model, from the headers of a checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.
        recipe: the quantisation of each matrix; None leaves the weights as they are.
        dtype: dtype to cast floating-point numbers to, one of `FLOATS`; None keeps each as it is. Parameters that the
            model keeps in float32 are cast to that.
        dequantize: whether to dequantise the quantised tensors of the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, damaged, left over or of another shape.
        RequestError: the recipe does not fit the shapes, or the checkpoint is quantised already or not at all.
    """
    tensors = stored_tensors(folder, config)
    source = empty_model(config, tensors.infos)
    tensors = tensors.shaped(source)
    stored, infos = tensors.model, tensors.infos
    check_tensors(source, infos)
    packed = {
        path: Scheme(module.mode, module.bits, module.group_size)
        for path, module in source.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    if packed and recipe and not dequantize:
        raise RequestError(
            f"{folder} is quantised already; drop -q, or add --dequantize to quantise it again, at a loss of precision"
        )
    if dequantize and not packed:
        raise RequestError(f"{folder} is not quantised; drop --dequantize")
    dense = empty_model(config, {})
    modules = dict(dense.named_modules())
    ((usual, _),) = Counter(info.dtype for info in infos.values() if info.dtype in FLOATS).most_common(1)
    parameters = []
    for name, array in tree_flatten(dense.parameters()):
        path = name.removesuffix(".weight")
        before = packed.get(path)
        on_demand = dense.on_demand(name)
        if recipe and path in modules and dense.quantizable(path, modules[path]):
            target = recipe.scheme_of(path, on_demand)
        else:
            target = None if dequantize else before
        parts = [f"{path}.{part}" for part in ("scales", "biases") if f"{path}.{part}" in stored]
        inputs = tuple(stored[tensor] for tensor in (name, *parts))
        own = inputs[-1].info.dtype  # of the weight, or of affine biases; mxfp4, nvfp4 and mxfp8 end with scales in U8
        kept = "F32" if dtype and dense.in_float32(name) else dtype
        numbers = kept or (own if own in FLOATS else usual)
        shape = tuple(array.shape)
        if target and isinstance(modules[path], PaddedLinear):
            shape = (shape[0], padded_width(shape[1], target.group_size))
        outputs = layout_of(name, numbers, shape, target)
        parameters.append(Parameter(path, inputs, outputs, numbers, before, target, array.shape[-1], on_demand))
    return parameters


def shards(parameters: Iterable[Parameter], limit: int) -> list[list[Parameter]]:
    """Groups parameters into files of at most `limit` bytes; a larger parameter gets a file of its own."""
    parts: list[list[Parameter]] = []
    used = 0
    for parameter in parameters:
        size = parameter.output_bytes
        if not parts or used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(parameter)
        used += size
    return parts


def write_shard(path: Path, parameters: Iterable[Parameter], progress: Callable[[int], object]) -> str:
    """Converts some parameters into one file.

    Args:
        path: the new file.
        parameters: its content, in this order.
        progress: called after each block with its size in bytes of the source.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        CheckpointError: the source contains NaN or infinity.
        RequestError: a number is too large for its dtype or its mode in the file.
    """
    parameters = list(parameters)
    layout = {name: kind for parameter in parameters for name, kind in parameter.outputs.items()}
    small: list[list[mx.array]] = []  # scales and biases: in the file they come after the whole weight
    with TensorWriter(path, layout) as writer:
        for block in _computed(parameters):
            names, rows = list(block.parameter.outputs), block.parameter.rows
            block.check()
            writer.append(names[0], memoryview(block.arrays[0]))
            small.append(block.arrays[1:])
            progress(block.parameter.input_bytes * (block.last - block.first) // rows)
            if block.last == rows:
                for name, pieces in zip(names[1:], zip(*small, strict=True), strict=True):
                    writer.write(name, map(memoryview, pieces))
                small.clear()
                mx.clear_cache()
    return writer.sha256


class _Block(NamedTuple):
    """Rows of a parameter from `first` to before `last`, as bytes of each output."""

    parameter: Parameter
    first: int
    last: int
    arrays: list[mx.array]

    def check(self) -> None:
        """Refuses numbers that their dtype in the file turned into infinity, or that nvfp4 cut off."""
        for (name, (dtype, _)), array in zip(self.parameter.outputs.items(), self.arrays, strict=True):
            if not _is_finite(memoryview(array), dtype):
                raise self.parameter.too_large(name, dtype, self.first, self.last)
        target = self.parameter.target
        if target and target.mode == "nvfp4" and target != self.parameter.packed:
            import numpy as np

            largest_scale = np.frombuffer(memoryview(self.arrays[1]), np.uint8).max()
            rows = self.first, self.last
            if largest_scale >= _NVFP4_LARGEST_SCALE and not self.parameter.largest(*rows) <= _NVFP4_LARGEST:
                raise RequestError(
                    f"{self.parameter.path} has numbers too large for nvfp4, which ends at {_NVFP4_LARGEST:,}"
                    f"{self.parameter.such_as(*rows)}; choose another --q-mode"
                )


def _is_finite(data: bytes | memoryview, dtype: str) -> bool:
    """True if numbers contain neither NaN nor infinity, whose exponents are all ones; integers never do."""
    if dtype not in _INFINITY:
        return True
    import numpy as np

    infinity = _INFINITY[dtype]
    bits = np.frombuffer(data, np.dtype(f"<u{DTYPES[dtype].bits // 8}"))
    return bool((bits & (2 ** (DTYPES[dtype].bits - 1) - 1)).max(initial=0) < infinity)


def _computed(parameters: Iterable[Parameter]) -> Iterator[_Block]:
    """All blocks in order, the next ones being computed while one is in use."""
    streams = cycle(_streams())
    waiting: deque[_Block] = deque()
    for parameter in parameters:
        for first, last in parameter.blocks():
            with mx.stream(next(streams)):
                arrays = parameter.converted(first, last)
                mx.async_eval(arrays)
            waiting.append(_Block(parameter, first, last, arrays))
            if len(waiting) > _BLOCKS_AHEAD:
                yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@functools.cache
def _streams() -> list[mx.Stream]:
    """One stream on a GPU, which a block fills; two on the CPU, where a stream is a thread."""
    if mx.default_device() == mx.cpu:
        return [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    return [mx.default_stream(mx.default_device())]
