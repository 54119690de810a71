"""The shape of a model: its config and the dtype and shape of each tensor, without a byte of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import empty_model, load_config, read_config
from phi4_mlx.checkpoint_share import tensor_infos
from phi4_mlx.config.fields import Config
from phi4_mlx.files.dtypes import mlx_dtype, name_of
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.safetensors import TensorInfo, tensor_bytes
from phi4_mlx.models.model import LanguageModel

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Shape:
    """The shape of a model.

    Attributes:
        config: of the model.
        infos: name of a tensor -> its dtype and shape.
        dtype: of hidden states.
        from_config: True if there are no weights, and the tensors follow from config.json.
    """

    config: Config
    infos: Mapping[str, TensorInfo]
    dtype: mx.Dtype
    from_config: bool = False

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(info.dtype, info.shape) for info in self.infos.values())

    def model(self) -> LanguageModel:
        """An empty model of this shape; its weights are never computed."""
        model = empty_model(self.config, self.infos)
        model.set_dtype(self.dtype)
        return model


def read_shape(path: Path) -> Shape:
    """Reads the shape of a model.

    Args:
        path: its folder, or its config.json; of files of weights only the headers are read.

    Raises:
        ConfigError: config.json is missing, or needs maths that is not implemented.
        CheckpointError: a header is damaged, or tensors are missing.
    """
    if path.is_dir() and any(path.glob("*.safetensors")):
        config = load_config(path)
        infos = tensor_infos(path, config)
        norm = next(info for name, info in infos.items() if name.endswith("norm.weight"))
        return Shape(config, infos, mlx_dtype(norm.dtype))
    raw = read_json(path / "config.json" if path.is_dir() else path)
    config = read_config(raw)
    dtype = _DTYPES.get(str(raw.get("dtype", raw.get("torch_dtype"))), mx.bfloat16)
    model = empty_model(config, {})
    if config.quantization is not None:
        _quantize(model, config.quantization)
    model.set_dtype(dtype)
    arrays = tree_flatten(model.parameters())
    infos = {
        name: TensorInfo("F32" if model.in_float32(name) else name_of(array.dtype), tuple(array.shape), 0, 0)
        for name, array in arrays
    }
    return Shape(config, infos, dtype, from_config=True)


def _quantize(model: LanguageModel, quantization: Mapping[str, Any]) -> None:
    """Quantises what config.json says, all that may be quantised by default."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path, True)
        return model.quantizable(path, module) and (dict(own) if isinstance(own, Mapping) else bool(own))

    keys = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    nn.quantize(model, class_predicate=settings, **keys)


def matrix_weights(model: LanguageModel) -> int:
    """The weights of the matrices within the blocks, each multiplied once for every token of a prompt."""
    count = 0
    for layer in model.layers:
        for _, module in layer.named_modules():
            if isinstance(module, nn.QuantizedLinear):
                count += module.weight.size * 32 // module.bits
            elif isinstance(module, nn.Linear):
                count += module.weight.size
    return count
