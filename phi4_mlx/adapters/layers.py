"""LoRA and DoRA layers, and the adapter of a model: added, loaded, read, switched off, removed.

An adapter's layers wrap the base's own, unchanged and not copied, so the base model stays available.

Source: LoRA (arXiv 2106.09685), equation 3; DoRA (arXiv 2402.09353), equations 5 and 11.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.adapters.folder import FULL, PARTS, Adapter, place, read_config, read_folder
from phi4_mlx.adapters.peft import is_peft, read_peft
from phi4_mlx.errors import CheckpointError, RequestError

DEFAULT_KEYS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The paths of all linear layers within a block."""

_ROWS = 1024  # rows of a matrix that are unpacked to fp32 at a time


class LoRALinear(nn.Module):  # type: ignore[misc]  # mlx is not type-checked
    """y = W x + scale * (x a) b, over a dense or a quantised linear layer W.

    The product is computed in the dtype of x; a and b may have a higher precision.

    Attributes:
        linear: the base's own layer.
        lora_a: [in, R].
        lora_b: [R, out].
        scale: factor of the product.
        dropout: the probability that training drops an input of `lora_a`, from 0 to below 1.
        on: False makes the layer compute W x.
    """

    kind = "lora"

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0):
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = lora_a, lora_b
        self.scale, self.dropout, self.on = scale, dropout, True
        self._dropout_key: mx.array | None = None
        self._folded: _Folded | None = None

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if not self.on:
            return y
        a, b = self.operands(x.dtype)
        return y + (self._dropped(x) @ a) @ b

    def adapter(self) -> tuple[mx.array, ...]:
        """The trained tensors, in the order of `PARTS`."""
        return tuple(self[part] for part in PARTS[self.kind])

    def _dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout):
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._dropout_key)
        return mx.where(kept, x * (1 / (1 - self.dropout)), 0)

    def operands(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """The operands of the forward pass, made once for all calls outside training.

        Args:
            dtype: the dtype of x, and of the result.

        Returns:
            a [in, R] and scale * b [R, out]; for DoRA a, gain * scale * b and gain - 1 [out].
        """
        if self.training:
            return self._fold(dtype)
        arrays = self.adapter()
        if self._folded is None or not self._folded.is_of(arrays, dtype, self.scale):
            self._folded = _Folded(arrays, dtype, self.scale, self._fold(dtype))
        return self._folded.operands

    def _fold(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        return self.lora_a.astype(dtype), (self.scale * self.lora_b).astype(dtype)


class DoRALinear(LoRALinear):
    """y = gain * (W x + scale * (x a) b), so that row i of the effective matrix has the norm m[i].

    As in the paper, the norm in gain = m / norm is a constant to the gradient. It is computed from W a [R, out] and
    a^T a [R, R], without the sum of the matrices and without unpacking a quantised W.

    Attributes:
        m: the trained norms of the rows, [out], in fp32.
    """

    kind = "dora"

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        m: mx.array | None,
        scale: float,
        dropout: float = 0.0,
    ):
        super().__init__(linear, lora_a, lora_b, scale, dropout)
        self._row_squares = _row_squares(linear)  # [out]
        self.m = mx.sqrt(self._row_squares) if m is None else m

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if not self.on:
            return y
        a, b, excess = self.operands(x.dtype)
        return y + (y * excess + (self._dropped(x) @ a) @ b)

    def _fold(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        gain = self.m / mx.stop_gradient(self._norms(dtype))
        # gain - 1, because half precision would round a gain close to 1.
        return self.lora_a.astype(dtype), (gain * self.scale * self.lora_b).astype(dtype), (gain - 1).astype(dtype)

    def _norms(self, dtype: mx.Dtype) -> mx.array:
        """The norms of the rows of W + scale * (a b)^T, [out]."""
        a, b = self.lora_a.astype(mx.float32), self.scale * self.lora_b.astype(mx.float32)
        cross = self.linear(a.T.astype(dtype)).astype(mx.float32)  # [R, out]
        squares = self._row_squares + ((2 * cross + (a.T @ a) @ b) * b).sum(axis=0)
        return mx.sqrt(mx.maximum(squares, 1e-30))  # a row of zeros stays zero


@dataclass(frozen=True, eq=False)
class _Folded:
    """Operands and their inputs. Arrays are never changed in place, so the same object has the same value."""

    arrays: tuple[mx.array, ...]
    dtype: mx.Dtype
    scale: float
    operands: tuple[mx.array, ...]

    def is_of(self, arrays: tuple[mx.array, ...], dtype: mx.Dtype, scale: float) -> bool:
        same = all(old is new for old, new in zip(self.arrays, arrays, strict=True))
        return same and (self.dtype, self.scale) == (dtype, scale)


def add_adapter(
    model: nn.Module,
    *,
    rank: int = 8,
    scale: float = 20.0,
    dropout: float = 0.0,
    keys: Sequence[str] = DEFAULT_KEYS,
    num_layers: int | None = None,
    kind: str = "lora",
    seed: int = 0,
) -> None:
    """Adds a new adapter to a model and freezes everything else; the output of the model does not change yet.

    Args:
        model: the model; an adapter that it already has is removed.
        rank: R.
        scale: factor of the product a b: alpha / R in PEFT's terms, or alpha / sqrt(R) for rsLoRA (`peft.scale_of`).
        dropout: the probability that training drops an input of `lora_a`, from 0 to below 1.
        keys: the linear layers of a block to adapt, from `DEFAULT_KEYS`.
        num_layers: the number of blocks to adapt, counted from the last one; None for all.
        kind: "lora" or "dora".
        seed: seed of the random numbers in `lora_a`.

    Raises:
        RequestError: an option is out of its limits.
    """
    total = len(model.layers)
    count = total if num_layers is None else num_layers
    _check_options(rank, scale, dropout, keys, count, total, kind)
    paths = [f"model.layers.{n}.{key}" for n in range(total - count, total) for key in keys]
    linears = _linear_layers(model)
    layers: dict[str, LoRALinear] = {}
    for path, random in zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True):
        width, out = _dimensions(linears[path])
        bound = 1 / math.sqrt(width)
        a, b = mx.random.uniform(-bound, bound, (width, rank), key=random), mx.zeros((rank, out))
        if kind == "dora":
            layers[path] = DoRALinear(linears[path], a, b, None, scale, dropout)
        else:
            layers[path] = LoRALinear(linears[path], a, b, scale, dropout)
    _install(model, layers)


def load_adapter(model: nn.Module, path: Path) -> None:
    """Loads an adapter from a folder onto a model, in place of one that it already has.

    A folder of full fine-tuning has whole weights instead: they replace the model's own permanently.

    Args:
        model: the model; everything except the adapter is frozen.
        path: a folder in mlx-lm's layout or PEFT's, or a tensor file with the config of such a folder beside it.

    Raises:
        ConfigError: adapter_config.json is not a JSON object.
        CheckpointError: a file is missing or damaged, or the adapter does not fit the model; names the first mismatch.
        RequestError: the adapter is in PEFT's layout and of a kind that is not supported.
    """
    put_adapter(model, read_adapter(path))


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter in mlx-lm's layout or PEFT's.

    Args:
        path: a folder, or a tensor file with its config beside it.

    Raises:
        ConfigError, CheckpointError, RequestError: as `load_adapter`.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        peft = "peft_type" in read_config(path.parent)
        return read_peft(path.parent, path.name) if peft else read_folder(path.parent, path.name)
    return read_peft(path) if is_peft(path) else read_folder(path)


def put_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter on a model, in place of one that it already has.

    Raises:
        CheckpointError: the adapter does not fit the model, which stays unchanged.
    """
    check_fit(model, adapter)
    if adapter.kind == FULL:
        remove_adapter(model)
        model.load_weights(list(adapter.tensors.items()), strict=False)
        return
    linears = _linear_layers(model)
    make: type[Any] = DoRALinear if adapter.kind == "dora" else LoRALinear
    _install(
        model,
        {path: make(linears[path], *adapter.of(path), adapter.scale, adapter.dropout) for path in adapter.paths},
    )


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Checks that the layers and shapes of an adapter fit a model, and that it covers the layers that it claims.

    Raises:
        CheckpointError: names the first layer that does not fit.
    """
    if adapter.kind == FULL:
        return _check_full(model, adapter)
    linears, total = _linear_layers(model), len(model.layers)
    for path in adapter.paths:
        layer, key = place(path)
        if path not in linears:
            raise CheckpointError(
                f"{adapter.source}: {path} is not a linear layer of this model, which has layers 0 to {total - 1}; "
                "the adapter is for another model"
            )
        (width, out), (a, b, *_) = _dimensions(linears[path]), adapter.of(path)
        if (a.shape[0], b.shape[1]) != (width, out):
            raise CheckpointError(
                f"{adapter.source}: {path} has lora_a {list(a.shape)} and lora_b {list(b.shape)}; the layer needs "
                f"[{width}, R] and [R, {out}]; the adapter is for another model"
            )
        if adapter.keys is not None and key not in adapter.keys:
            raise CheckpointError(f"{adapter.source}: {path} is not among the keys in its config, {[*adapter.keys]}")
    count, used = adapter.num_layers, {layer for layer, _ in map(place, adapter.paths) if layer >= 0}
    if count is None or not used:
        return
    expected = set(adapter.only_layers or range(total - count if 0 < count < total else 0, total))
    if differing := used ^ expected:
        layer = min(differing)
        raise CheckpointError(
            f"{adapter.source}: num_layers is {count} and this model has {total}, so the adapter must be for layers "
            f"{min(expected)} to {max(expected)}, but it has {'no ' if layer in expected else ''}tensors for {layer}; "
            "the adapter is for another model"
        )


def current_adapter(model: nn.Module, source: str) -> Adapter:
    """A snapshot of the adapter of a model; without an adapter, of everything that is not frozen.

    Args:
        model: the model; training it further does not change the result.
        source: the name for it in messages.
    """
    for layer in adapter_layers(model).values():
        return Adapter(layer.kind, layer.scale, layer.dropout, adapter_parameters(model), source)
    return Adapter(FULL, 1.0, 0.0, dict(tree_flatten(model.trainable_parameters())), source)


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The trained tensors of a model's adapter, by their names in adapters.safetensors; empty without an adapter."""
    return {
        f"{path}.{part}": array
        for path, layer in adapter_layers(model).items()
        for part, array in zip(PARTS[layer.kind], layer.adapter(), strict=True)
    }


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes exactly as its base does, bit for bit.

    Do not take a gradient through it under checkpointing: backward runs the blocks again, after the context has ended.
    """
    layers = adapter_layers(model).values()
    before = [layer.on for layer in layers]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in zip(layers, before, strict=True):
            layer.on = on


def remove_adapter(model: nn.Module) -> None:
    """Removes the adapter of a model, if it has one."""
    model.update_modules(tree_unflatten([(path, layer.linear) for path, layer in adapter_layers(model).items()]))


def draw_dropout(model: nn.Module) -> None:
    """Draws the dropout masks to use until the next call, from MLX's global random state.

    Call it once before each forward and backward pass. Gradient checkpointing runs a layer a second time; without this
    call the second run would draw other masks than the loss used.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.dropout]
    if layers:
        keys = mx.random.randint(0, 2**32, (len(layers), 2), mx.uint32)
        for layer, key in zip(layers, keys, strict=True):
            layer._dropout_key = key


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model's adapter, by path, in the model's order."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    return dict(sorted(found.items(), key=lambda item: place(item[0])))


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's base, by path, adapted or not."""
    adapted = adapter_layers(model)
    found: dict[str, nn.Module] = {path: layer.linear for path, layer in adapted.items()}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and path.removesuffix(".linear") not in adapted:
            found[path] = module
    return found


def _dimensions(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a dense or a quantised linear layer."""
    out, width = linear.weight.shape
    return width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width, out


def _install(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    remove_adapter(model)
    model.update_modules(tree_unflatten(list(layers.items())))
    model.freeze()
    for layer in layers.values():
        layer.train(model.training)
        layer.unfreeze(recurse=False, keys=list(PARTS[layer.kind]))


def _check_full(model: nn.Module, adapter: Adapter) -> None:
    """Checks the weights of full fine-tuning as `check_fit` does."""
    own = {name.replace(".linear.", "."): array for name, array in tree_flatten(model.parameters())}
    for name, array in adapter.tensors.items():
        expected = own.get(name)
        if expected is None or not name.endswith("weight") or not mx.issubdtype(expected.dtype, mx.floating):
            raise CheckpointError(f"{adapter.source}: {name} is not a trainable tensor of this model")
        if expected.shape != array.shape:
            raise CheckpointError(
                f"{adapter.source}: {name} has shape {list(array.shape)}, but in this model {list(expected.shape)}; "
                "the weights are for another model"
            )


def _row_squares(linear: nn.Module) -> mx.array:
    """The sums of squares of the rows of a layer's matrix, [out], in fp32."""
    parts = []
    for first in range(0, linear.weight.shape[0], _ROWS):
        rows = linear.weight[first : first + _ROWS]
        if isinstance(linear, nn.QuantizedLinear):
            biases = linear.get("biases")
            rows = mx.dequantize(
                rows,
                linear.scales[first : first + _ROWS],
                None if biases is None else biases[first : first + _ROWS],
                group_size=linear.group_size,
                bits=linear.bits,
                mode=linear.mode,
            )
        parts.append(mx.square(rows.astype(mx.float32)).sum(axis=1))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _check_options(
    rank: int, scale: float, dropout: float, keys: Sequence[str], num_layers: int, total: int, kind: str
) -> None:
    if kind not in PARTS:
        raise RequestError(f"{kind!r} is not a kind of adapter; there are {' and '.join(PARTS)}")
    if rank < 1:
        raise RequestError(f"rank {rank} is out of range; it must be at least 1")
    if not math.isfinite(scale) or scale <= 0:
        raise RequestError(f"scale {scale} is out of range; it must be a number above 0")
    if not 0 <= dropout < 1:
        raise RequestError(f"dropout {dropout} is out of range; it must be a number from 0 to below 1")
    if not 1 <= num_layers <= total:
        raise RequestError(
            f"num_layers {num_layers} is out of range; the model has {total} layers, so it must be from 1 to {total}"
        )
    unknown = [key for key in keys if key not in DEFAULT_KEYS]
    if unknown or not keys or len({*keys}) != len(keys):
        raise RequestError(f"keys {[*keys]!r:.200} must be one or more of {', '.join(DEFAULT_KEYS)}, each once")
