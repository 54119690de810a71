"""A checkpoint's weights, parameter by parameter: read, dequantised, cast, quantised, written.

Everything is planned from the headers alone. The numbers then pass through in blocks of rows, the next ones being read
and computed while the last ones are written, so memory does not grow with the model, nor with its largest tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import check_tensors, empty_model
from phi4_mlx.config import ModelConfig
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.safetensors import TensorInfo, TensorWriter, read_header, tensor_bytes, weight_files
from phi4_mlx.models.text import Model

from .quantize import Layout, Recipe, Scheme

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_DTYPES = {**FLOATS, "U32": mx.uint32, "U8": mx.uint8}

_BLOCK_BYTES = 2**22  # of the source, read at a time
_BLOCKS_AHEAD = 8  # read and being computed while one is written


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    info: TensorInfo

    def rows(self, first: int, last: int) -> mx.array:
        """Reads some of the rows.

        Raises:
            CheckpointError: they cannot be read.
        """
        row_bytes = (self.info.end - self.info.start) // self.info.shape[0]
        count = (last - first) * row_bytes
        try:
            with self.path.open("rb") as file:
                file.seek(self.info.start + first * row_bytes)
                data = file.read(count)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(data) < count:
            raise CheckpointError(f"{self.path} ended early; it was changed while it was read")
        array = mx.array(memoryview(data)).view(_DTYPES[self.info.dtype])
        return array.reshape(last - first, *self.info.shape[1:])


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model on its way from the checkpoint to the package.

    Attributes:
        path: of its layer.
        inputs: the tensor, or the packed weight, the scales and the biases of a quantised one.
        outputs: likewise, in the package.
        numbers: what the floating-point ones among the outputs are, and what is quantised, a key of `FLOATS`.
        packed: how it is quantised in the checkpoint.
        target: how it shall be quantised in the package.
    """

    path: str
    inputs: tuple[Stored, ...]
    outputs: Layout
    numbers: str
    packed: Scheme | None
    target: Scheme | None

    @property
    def input_bytes(self) -> int:
        """What there is to read."""
        return sum(stored.info.end - stored.info.start for stored in self.inputs)

    @property
    def output_bytes(self) -> int:
        """What there will be to write."""
        return sum(tensor_bytes(*kind) for kind in self.outputs.values())

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The rows to take at a time, first and last."""
        rows = self.inputs[0].info.shape[0]
        step = max(1, _BLOCK_BYTES * rows // self.input_bytes)
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def converted(self, first: int, last: int) -> list[mx.array]:
        """Some rows of each output, as bytes, not yet computed."""
        arrays = [stored.rows(first, last) for stored in self.inputs]
        if self.packed != self.target:
            arrays = self._repacked(arrays)
        return self.as_bytes(arrays)

    def as_bytes(self, arrays: Iterable[mx.array]) -> list[mx.array]:
        """Some rows of each output, as the file will hold them."""
        kinds = [_DTYPES[dtype] for dtype, _ in self.outputs.values()]
        return [array.astype(kind).view(mx.uint8) for array, kind in zip(arrays, kinds, strict=True)]

    def _repacked(self, arrays: list[mx.array]) -> list[mx.array]:
        if self.packed:
            weight, scales, *biases = arrays
            arrays = [mx.dequantize(weight, scales, *biases, **vars(self.packed))]
        if self.target:
            arrays = mx.quantize(arrays[0].astype(FLOATS[self.numbers]), **vars(self.target))
        return arrays


def plan(
    folder: Path, config: ModelConfig, recipe: Recipe | None, dtype: str | None, dequantize: bool
) -> list[Parameter]:
    """Plans every parameter of the model, from the headers of a checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.
        recipe: how to quantise; None leaves the weights as they are.
        dtype: what to cast floating-point numbers to, a key of `FLOATS`; None keeps each as it is.
        dequantize: unpacks what is quantised in the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, damaged, left over or of another shape.
        RequestError: the recipe does not fit the model's shapes, or what was asked for is done already.
    """
    files = weight_files(folder)
    stored = {
        name: Stored(path, info) for path in sorted(set(files.values())) for name, info in read_header(path).items()
    }
    infos = {name: tensor.info for name, tensor in stored.items()}
    source = empty_model(config, infos)
    check_tensors(source, infos)
    packed = {
        path: Scheme(module.mode, module.bits, module.group_size)
        for path, module in source.named_modules()
        if hasattr(module, "bits")
    }
    if packed and recipe and not dequantize:
        raise RequestError(f"{folder} is quantised already; drop -q, or add --dequantize to quantise anew, at a loss")
    if dequantize and not packed:
        raise RequestError(f"{folder} is not quantised; drop --dequantize")
    parameters = []
    for name, array in tree_flatten(Model(config).parameters()):
        path = name.removesuffix(".weight")
        before = packed.get(path)
        matrix = array.ndim == 2
        target = recipe.scheme_of(path) if recipe and matrix else None if dequantize else before
        tensors = [f"{path}.{part}" for part in ("weight", "scales", "biases") if f"{path}.{part}" in stored]
        inputs = tuple(stored[tensor] for tensor in tensors)
        own = inputs[-1].info.dtype  # of the weight, or of affine biases; the scales of mxfp4 and its kin are bytes
        numbers = dtype or (own if own in FLOATS else infos["model.norm.weight"].dtype)
        outputs = target.layout(path, numbers, array.shape) if target else {name: (numbers, tuple(array.shape))}
        parameters.append(Parameter(path, inputs, outputs, numbers, before, target))
    return parameters


def shards(parameters: Iterable[Parameter], limit: int) -> list[list[Parameter]]:
    """Parts the parameters into files of at most `limit` bytes, unless one parameter alone is larger."""
    parts: list[list[Parameter]] = []
    room = -1
    for parameter in parameters:
        room -= parameter.output_bytes
        if room < 0:
            parts.append([])
            room = limit - parameter.output_bytes
        parts[-1].append(parameter)
    return parts


def write_shard(path: Path, parameters: list[Parameter], progress: Callable[[int], Any]) -> str:
    """Converts some parameters into one file.

    Args:
        path: of the new file.
        parameters: what it shall hold, in this order.
        progress: called with the number of source bytes that have just been dealt with.

    Returns:
        The file's SHA-256, in hexadecimal.
    """
    layout = {name: kind for parameter in parameters for name, kind in parameter.outputs.items()}
    blocks = _ahead(_computing(parameters))
    with TensorWriter(path, layout) as writer:
        for parameter in parameters:
            _write_parameter(writer, parameter, blocks, progress)
            mx.clear_cache()
    return writer.sha256


def _write_parameter(
    writer: TensorWriter, parameter: Parameter, blocks: Iterator[list[mx.array]], progress: Callable[[int], Any]
) -> None:
    weight, *others = parameter.outputs
    kept: list[list[mx.array]] = []  # scales and biases, which come after the weight and are small beside it

    def pieces() -> Iterator[memoryview]:
        for first, last in parameter.blocks():
            piece, *rest = next(blocks)
            kept.append(rest)
            yield memoryview(piece)
            progress(parameter.input_bytes * (last - first) // parameter.inputs[0].info.shape[0])

    writer.write(weight, pieces())
    for name, parts in zip(others, zip(*kept, strict=True), strict=True):
        writer.write(name, map(memoryview, parts))


def _computing(parameters: Iterable[Parameter]) -> Iterator[list[mx.array]]:
    streams = cycle(_streams())
    for parameter in parameters:
        for first, last in parameter.blocks():
            with mx.stream(next(streams)):
                arrays = parameter.converted(first, last)
                mx.async_eval(arrays)
            yield arrays


@cache
def _streams() -> list[mx.Stream]:
    """One on a GPU, which a block fills; two on the CPU, where a stream is a thread."""
    if mx.default_device() == mx.cpu:
        return [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    return [mx.default_stream(mx.default_device())]


def _ahead(items: Iterator[list[mx.array]]) -> Iterator[list[mx.array]]:
    """The same items, each drawn while the ones before it are still in use."""
    waiting: deque[list[mx.array]] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > _BLOCKS_AHEAD:
            yield waiting.popleft()
    yield from waiting
