"""The adapter of a model: added, loaded, read, switched off, removed.

An adapter's layers wrap the base's own, unchanged and not copied, so the base model stays available.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.adapters.folder import FULL, PARTS, Adapter, place, read_config, read_folder
from phi4_mlx.adapters.linear import DoRALinear, LoRALinear
from phi4_mlx.adapters.peft import is_peft, read_peft
from phi4_mlx.adapters.quantized import dense
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.terminal.amount import amount


def add_adapter(
    model: nn.Module,
    *,
    rank: int = 8,
    scale: float = 20.0,
    dropout: float = 0.0,
    keys: Sequence[str] | None = None,
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
        keys: the linear layers to adapt, by their path in a block; None for the model's `lora_keys`. A block without
            such a layer is skipped.
        num_layers: the number of blocks to adapt, counted from the last one; None for all.
        kind: "lora" or "dora".
        seed: seed of the random numbers in `lora_a`.

    Raises:
        RequestError: an option is out of its limits.
    """
    total = len(model.layers)
    count = total if num_layers is None else num_layers
    _check_options(rank, scale, dropout, count, total, kind)
    linears = linear_layers(model)
    if keys is not None:
        _check_keys(keys, model.lora_keys, linears, range(total - count, total))
    wanted = (f"model.layers.{n}.{key}" for n in range(total - count, total) for key in keys or model.lora_keys)
    paths = [path for path in wanted if path in linears]
    most = max(min(_dimensions(linears[path])) for path in paths)
    if rank > most:
        raise RequestError(f"rank {rank:,} is out of range; no matrix to adapt has a rank above {most:,}")
    layers: dict[str, LoRALinear] = {}
    for path, random in zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True):
        width, out = _dimensions(linears[path])
        bound = 1 / math.sqrt(width)
        a, b = mx.random.uniform(-bound, bound, (width, rank), key=random), mx.zeros((rank, out))
        layers[path] = _layer(kind, linears[path], (a, b), scale, dropout)
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


def read_adapter(path: Path, lazy: bool = False) -> Adapter:
    """Reads an adapter in mlx-lm's layout or PEFT's.

    Args:
        path: a folder, or a tensor file with its config beside it.
        lazy: leaves the numbers on the disk, as they are stored; `check_finite` reads them. Else quantised matrices
            become dense.

    Raises:
        ConfigError, CheckpointError, RequestError: as `load_adapter`.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        peft = "peft_type" in read_config(path.parent)
        adapter = read_peft(path.parent, path.name, lazy) if peft else read_folder(path.parent, path.name, lazy)
    else:
        adapter = read_peft(path, lazy=lazy) if is_peft(path) else read_folder(path, lazy=lazy)
    return adapter if lazy else dense(adapter)


def put_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Puts an adapter on a model, in place of one that it already has.

    Args:
        model: the model; everything except the adapter is frozen.
        adapter: the adapter; whole weights, if it is of the kind "full".

    Raises:
        CheckpointError: the adapter does not fit the model, which stays unchanged.
    """
    check_fit(model, adapter)
    if adapter.kind == FULL:
        remove_adapter(model)
        model.load_weights(list(adapter.tensors.items()), strict=False)
        if (named := getattr(model, "adapters", None)) is not None:
            named.replaced = True
        return
    linears = linear_layers(model)
    layers = {path: layer_of(linears[path], adapter, path) for path in adapter.paths}
    _install(model, layers)


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Checks that the layers and shapes of an adapter fit a model, and that it covers the layers that it claims.

    Args:
        model: the model, with or without another adapter.
        adapter: the adapter.

    Raises:
        CheckpointError: names the first layer that does not fit.
    """
    if adapter.kind == FULL:
        _check_full(model, adapter)
        return
    linears, total = linear_layers(model), len(model.layers)
    embeddings = {path for path, module in model.named_modules() if hasattr(module, "as_linear")}
    for path in adapter.paths:
        _, key = place(path)
        if path in embeddings:
            raise CheckpointError(
                f"{adapter.source}: {path} is an embedding, and only linear layers are adapted here; train without it"
            )
        if path not in linears:
            raise CheckpointError(
                f"{adapter.source}: {path} is not a linear layer of this model, which has layers 0 to {total - 1}; "
                "the adapter is for another model"
            )
        (width, out), (rows, rank, columns) = _dimensions(linears[path]), adapter.shape(path)
        if (rows, columns) != (width, out):
            raise CheckpointError(
                f"{adapter.source}: {path} has lora_a {[rows, rank]} and lora_b {[rank, columns]}; the layer needs "
                f"[{width}, R] and [R, {out}]; the adapter is for another model"
            )
        if adapter.keys is not None and key not in adapter.keys and path not in adapter.keys:
            raise CheckpointError(f"{adapter.source}: {path} is not among the keys in its config, {[*adapter.keys]}")
    _check_count(adapter, total)


def _check_count(adapter: Adapter, total: int) -> None:
    """Checks that the adapter covers the layers that its config claims, of `total` in the model."""
    count = adapter.num_layers
    counted = (place(path) for path in adapter.paths if adapter.keys is None or path not in adapter.keys)
    used = {layer for layer, _ in counted if layer >= 0}
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
    named = getattr(model, "adapters", None)  # adapters by name
    layers = [*adapter_layers(model).values(), *([] if named is None else [named])]
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
            layer.fix_dropout(key)


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model's adapter, by path, in the model's order."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    return dict(sorted(found.items(), key=lambda item: place(item[0])))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
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


def layer_of(linear: nn.Module, adapter: Adapter, path: str) -> LoRALinear:
    """The adapted layer at `path`."""
    return _layer(adapter.kind, linear, adapter.of(path), adapter.scale, adapter.dropout)


def _layer(kind: str, linear: nn.Module, tensors: tuple[mx.array, ...], scale: float, dropout: float) -> LoRALinear:
    """An adapted layer from its tensors: a, b, and for DoRA m, which a new layer takes from the linear one."""
    a, b, *m = tensors
    if kind == "dora":
        return DoRALinear(linear, a, b, m[0] if m else None, scale, dropout)
    return LoRALinear(linear, a, b, scale, dropout)


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
        quantised = name.endswith((".scales", ".biases"))
        if expected is None or quantised or not mx.issubdtype(expected.dtype, mx.floating):
            raise CheckpointError(f"{adapter.source}: {name} is not a trainable tensor of this model")
        if expected.shape != array.shape:
            raise CheckpointError(
                f"{adapter.source}: {name} has shape {list(array.shape)}, but in this model {list(expected.shape)}; "
                "the weights are for another model"
            )


def _check_options(rank: int, scale: float, dropout: float, num_layers: int, total: int, kind: str) -> None:
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
            f"num_layers {num_layers} is out of range; the model has {amount(total, 'layer')}, "
            f"so it must be from 1 to {total}"
        )


def _check_keys(keys: Sequence[str], usual: Sequence[str], linears: Iterable[str], layers: range) -> None:
    """Refuses a key that is repeated, that no block has, or that none of the blocks to adapt has."""
    places = {place(path) for path in linears}
    known = [*usual, *sorted({key for layer, key in places if layer >= 0} - {*usual})]
    if not keys or not {*keys} <= {*known} or len({*keys}) != len(keys):
        raise RequestError(f"keys {[*keys]!r:.200} must be linear layers of a block, each once: {', '.join(known)}")
    for key in keys:
        if not any((layer, key) in places for layer in layers):
            raise RequestError(
                f"keys: num_layers {len(layers)} leaves no layer with {key}; raise num_layers, or leave the key out"
            )
