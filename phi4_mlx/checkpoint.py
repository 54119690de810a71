"""A folder or a Hub id -> (model, tokenizer), every tensor accounted for.

It reads a Hugging Face folder as it is, a package of our converter, and an mlx-lm package. Names, shapes and kinds of
all tensors are checked from the headers, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.config import ModelConfig
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.dtypes import FLOATS, name_of
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.files.safetensors import TensorInfo, read_header, weight_files
from phi4_mlx.hub import resolve
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.chat_format import CHAT_FORMATS, recognise
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer


def load(
    path_or_hf_repo: str | Path,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    revision: str | None = None,
    *,
    verify: bool = False,
    chat_format: str | None = None,
) -> tuple[Model, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
        path_or_hf_repo: a folder, a Hub id ("owner/name"), or "demo", the package embedded here.
        adapter_path: a folder with a LoRA adapter to put on the model.
        lazy: leaves the weights on disk until they are first used.
        revision: a commit, branch or tag of the Hub repository.
        verify: checks every file against the package's manifest of SHA-256 hashes first.
        chat_format: overrides the recognised chat format, by its name in `phi4_mlx.tokens.chat_format.CHAT_FORMATS`.

    Returns:
        (model, tokenizer)

    Raises:
        ConfigError: config.json asks for maths that is not done here; a JSON file or a chat template is damaged.
        CheckpointError: weights are missing, damaged, left over or of another shape; the Hub cannot be reached.
        TokenizerError: the tokenizer's files are missing or damaged.
        RequestError: no such chat format.
    """
    folder = resolve(path_or_hf_repo, revision)
    if verify:
        verify_manifest(folder)
    model = load_model(folder)
    tokenizer = load_tokenizer_and_format(folder, chat_format)
    if adapter_path is not None:
        load_adapter(model, Path(adapter_path))
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer


def load_tokenizer_and_format(folder: Path, chat_format: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, with its chat format.

    Raises:
        ConfigError, TokenizerError, RequestError: as `load`.
    """
    tokenizer = load_tokenizer(folder)
    if chat_format is not None and chat_format not in CHAT_FORMATS:
        raise RequestError(f"chat format {chat_format!r} is not known; known are {', '.join(sorted(CHAT_FORMATS))}")
    tokenizer.chat_format = CHAT_FORMATS[chat_format] if chat_format else recognise(folder, tokenizer)
    return tokenizer


def load_model(folder: Path) -> Model:
    """The model of a folder, its weights still on disk until they are used.

    Raises:
        ConfigError: config.json asks for maths that is not done here.
        CheckpointError: weights are missing, damaged, left over or of another shape.
    """
    config = ModelConfig.from_folder(folder)
    files = weight_files(folder)
    infos = {name: info for path in sorted(set(files.values())) for name, info in read_header(path).items()}
    model = empty_model(config, infos)
    wanted = check_tensors(model, infos)
    weights = []
    for path in sorted(set(files.values())):
        weights += [(name, array) for name, array in mx.load(str(path)).items() if name in wanted]
    model.load_weights(weights)
    return model.eval()


def share_weights(model: Model) -> Model:
    """Another model over the same arrays: what is put on the one, such as an adapter, is not on the other."""
    parameters = model.parameters()
    twin = empty_model(model.config, [name for name, _ in tree_flatten(parameters)])
    twin.update(parameters)
    return twin.eval()


def empty_model(config: ModelConfig, names: Iterable[str]) -> Model:
    """The model with lazy random weights, quantised where the checkpoint's tensor `names` hold scales.

    Raises:
        CheckpointError: there are scales, and config.json does not say how they were made.
    """
    model, quantization = Model(config), config.quantization
    scaled = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    if not scaled:
        return model
    if quantization is None:
        raise CheckpointError(
            f"{min(scaled)} is quantised, and config.json does not say how; 'quantization' is missing there"
        )
    settings = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        if path not in scaled or not hasattr(module, "to_quantized"):
            return False
        return settings | own if isinstance(own, dict) else True

    try:
        nn.quantize(model, **settings, class_predicate=predicate)
    except ValueError as error:
        raise CheckpointError(f"config.json: quantization {settings} does not fit the model: {error}") from None
    return model


def check_tensors(model: Model, infos: Mapping[str, TensorInfo]) -> set[str]:
    """Holds a checkpoint's headers against the model.

    Returns:
        The names to load: all but those that the model derives from others.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a kind that cannot serve.
    """
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - infos.keys()):
        raise CheckpointError(
            f"{_some(missing)} missing from the checkpoint; it is incomplete or of another architecture"
        )
    extra = sorted(name for name in infos.keys() - expected.keys() if not _derived(name, model.config))
    if extra:
        raise CheckpointError(
            f"{_some(extra)} left over: config.json describes a model without; they do not belong together"
        )
    for name, array in expected.items():
        found = infos[name]
        if found.shape != tuple(array.shape):
            raise CheckpointError(f"{name} has shape {list(found.shape)}; config.json asks for {list(array.shape)}")
        kinds = FLOATS if mx.issubdtype(array.dtype, mx.floating) else (name_of(array.dtype),)
        if found.dtype not in kinds:
            raise CheckpointError(f"{name} holds {found.dtype} numbers; only {' or '.join(kinds)} can serve there")
    return set(expected)


def _derived(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints carry though the model computes them: a tied head, the RoPE frequencies."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name.startswith("lm_head."))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 3 else ''}) are" if len(names) > 1 else f"{shown} is"


