"""The layer that a LoRA adapter puts in the place of a linear one, and the adapter folder it comes from.

The folder is mlx-lm's: `adapters.safetensors` with `<layer path>.lora_a` and `.lora_b`, and `adapter_config.json`.

Source: LoRA (arXiv 2106.09685), equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from phi4_mlx.config import read_json
from phi4_mlx.errors import CheckpointError
from phi4_mlx.tensor_file import TensorInfo, read_header


class LoRALinear(nn.Module):
    """y = linear(x) + scale * (x a) b, over a dense or a quantised linear layer.

    Attributes:
        lora_a: [in, R].
        lora_b: [R, out].
    """

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float):
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = lora_a, lora_b
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(x.dtype)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Puts the adapter of a folder on a model; the adapter's tensors say which layers it is for.

    Raises:
        ConfigError: adapter_config.json is missing or no JSON object.
        CheckpointError: it is no LoRA adapter, or its tensors do not fit the model.
    """
    config = read_json(folder / "adapter_config.json")
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if kind != "lora" or isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise CheckpointError(f"{folder}: fine_tune_type {kind!r} with scale {scale!r} is no LoRA adapter known here")

    path = folder / "adapters.safetensors"
    infos = read_header(path)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.QuantizedLinear))}
    targets = sorted({name.rpartition(".")[0] for name in infos})
    for target in targets:
        if target not in linears or not {f"{target}.lora_a", f"{target}.lora_b"} <= infos.keys():
            raise CheckpointError(f"{path}: {target!r} is no linear layer of this model with both lora_a and lora_b")
        _check_shapes(path, target, linears[target], infos)
    if not targets or len(infos) != 2 * len(targets):
        raise CheckpointError(
            f"{path} holds {len(infos)} tensors for {len(targets)} layers; each takes lora_a and lora_b"
        )

    arrays = mx.load(str(path))
    layers = [(t, LoRALinear(linears[t], arrays[f"{t}.lora_a"], arrays[f"{t}.lora_b"], scale)) for t in targets]
    model.update_modules(tree_unflatten(layers))
    model.eval()


def _check_shapes(path: Path, target: str, linear: nn.Module, infos: Mapping[str, TensorInfo]) -> None:
    out, width = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        width = width * 32 // linear.bits  # packed into words of 32 bits
    a, b = infos[f"{target}.lora_a"], infos[f"{target}.lora_b"]
    if len(a.shape) != 2 or a.shape[0] != width or b.shape != (a.shape[1], out):
        raise CheckpointError(
            f"{path}: {target} has lora_a {list(a.shape)} and lora_b {list(b.shape)}; "
            f"the layer asks for [{width}, R] and [R, {out}]"
        )
    if not {a.dtype, b.dtype} <= {"BF16", "F16", "F32"}:
        raise CheckpointError(f"{path}: {target} holds {a.dtype} and {b.dtype}; only BF16, F16 and F32 can serve")
