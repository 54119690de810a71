"""A folder or a Hub id -> (model, tokenizer), every tensor accounted for.

Reads Hugging Face folders, packages of our converter and mlx-lm packages. Names, shapes and dtypes of all tensors are
checked from the headers before any weight is read.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.adapters.shipped import add_shipped, shipped_adapters
from phi4_mlx.config.fields import MODEL_FOLDER, QUANTIZATION_MODES, Config, brief
from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from phi4_mlx.files.dtypes import FLOATS, name_of
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.lazy_arrays import unchanged
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.files.safetensors import Stored, TensorInfo, read_header, weight_files
from phi4_mlx.hub import resolve
from phi4_mlx.models import multimodal_names, sambay, text
from phi4_mlx.models.dequantized import dequantize_products
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.padded import PaddedLinear, padded_width
from phi4_mlx.models.safe import safe, switched_off
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.suggestion import suggestion
from phi4_mlx.tokens.chat_format import CHAT_FORMATS, ChatFormat, recognise, recognise_flash
from phi4_mlx.tokens.prompt import MediaSettings
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        config: a parsed config.json -> the kind's config; raises ConfigError.
        model: config -> the model, with lazy random weights.
        chat_format: (folder, tokenizer) -> the chat format of a package.
        native_name: the name of a tensor in a file -> the model's.
        lora_part: the name of a tensor in a file -> (adapter, name in PEFT's layout) of a LoRA's; None for any other.
        is_unused: (the model's name, config) -> True for a tensor that no computation reads.
        media: folder -> what the model reads beside text; None for text alone.
        loras: config -> (rank, alpha) of each LoRA that a checkpoint can bring along; see `shipped_adapters`.
    """

    config: Callable[[Mapping[str, Any]], Config]
    model: Callable[[Any], LanguageModel]
    chat_format: Callable[[Path, Tokenizer], ChatFormat]
    native_name: Callable[[str], str] = lambda name: name
    lora_part: Callable[[str], tuple[str, str] | None] = lambda name: None
    is_unused: Callable[[str, Any], bool] = lambda name, config: False
    media: Callable[[Path], MediaSettings | None] = lambda folder: None
    loras: Callable[[Any], Mapping[str, tuple[int, float] | None]] = lambda config: {}


def _multimodal_config(raw: Mapping[str, Any]) -> Config:
    from phi4_mlx.config.multimodal import MultimodalConfig  # with the towers, a tenth of the start of a text model

    return MultimodalConfig.from_dict(raw)


def _multimodal_model(config: Any) -> LanguageModel:
    from phi4_mlx.models.multimodal import Model

    return Model(config)


def _media_settings(folder: Path) -> MediaSettings:
    from phi4_mlx.config.multimodal import MultimodalConfig
    from phi4_mlx.tokens.media.image import MAX_CROPS, MOST_CROPS

    config, preprocessor = load_config(folder), folder / "preprocessor_config.json"
    assert isinstance(config, MultimodalConfig)
    given = read_json(preprocessor).get("dynamic_hd") if os.path.lexists(preprocessor) else None
    max_crops, vision, audio = MAX_CROPS if given is None else given, config.vision, config.audio
    if type(max_crops) is not int or not 1 <= max_crops <= MOST_CROPS:
        raise ConfigError(
            f"{preprocessor}: dynamic_hd must be a whole number from 1 to {MOST_CROPS}, not {brief(max_crops)}"
        )
    return MediaSettings(vision.crop_size, max_crops, vision.image_token_id, audio.audio_token_id)


_MULTIMODAL = Kind(
    _multimodal_config,
    _multimodal_model,
    recognise,
    multimodal_names.native_name,
    multimodal_names.lora_part,
    multimodal_names.is_unused,
    _media_settings,
    lambda config: config.loras,
)

# model_type in config.json -> the kind.
KINDS: dict[str, Kind] = {
    "phi3": Kind(ModelConfig.from_dict, text.Model, recognise),
    "phi4flash": Kind(SambaYConfig.from_dict, sambay.Model, recognise_flash),
    "phi4mm": _MULTIMODAL,
    "phi4_multimodal": _MULTIMODAL,
}

# Names that another program gives to the same tensors -> the program.
_FOREIGN_NAMES = {
    r"transformer\.": "TensorRT-LLM",
    r"(blk\.\d+|token_embd|output_norm)\.": "llama.cpp",
    r"(backbone|model\.layers\.\d+\.mixer)\.": "mamba_ssm",
    r"model\.layers\.\d+\.(mamba|self_attn|mlp\.\w+_proj|attn\.(A$|attn|mamba|qkv|lambda_|subln))": "vLLM or SGLang",
}
_HUGGING_FACE = "get the folder that is published on Hugging Face"


def load(
    path_or_hf_repo: str | Path,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    revision: str | None = None,
    *,
    verify: bool = False,
    chat_format: str | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
        path_or_hf_repo: a folder, a Hub id ("owner/name"), or the name of an embedded package, such as "demo".
        adapter_path: a folder with a LoRA adapter to put on the model.
        lazy: leaves the weights on disk until they are first used.
        revision: a commit, branch or tag of the Hub repository.
        verify: checks every file against the package's manifest of SHA-256 hashes first.
        chat_format: overrides the recognised chat format; a key of `phi4_mlx.tokens.chat_format.CHAT_FORMATS`.

    Returns:
        (model, tokenizer)

    Raises:
        ConfigError: config.json needs maths that is not implemented; a JSON file or a chat template is damaged.
        CheckpointError: weights are missing, damaged, unexpected or of another shape; the Hub cannot be reached.
        TokenizerError: the tokenizer's files are missing or damaged, or it has more ids than the embedding has rows.
        RequestError: the chat format is unknown, or `PHI4_MLX_SAFE` has an unknown name.
    """
    switched_off()  # refuses a wrong name before the weights are read
    folder = resolve(path_or_hf_repo, revision)
    if verify:
        verify_manifest(folder)
    with shared_stream():  # so that any thread may use the model
        model = load_model(folder)
        tokenizer = load_tokenizer_and_format(folder, chat_format, model.config.model_type)
        check_vocabulary(folder, tokenizer, model.config)
        if adapter_path is not None:
            load_adapter(model, Path(adapter_path))
        if not lazy:
            with unchanged(f"the weights of {folder}"):
                mx.eval([array for name, array in tree_flatten(model.parameters()) if not model.on_demand(name)])
    return model, tokenizer


def load_tokenizer_and_format(folder: Path, chat_format: str | None = None, model_type: str = "phi3") -> Tokenizer:
    """The tokenizer of a folder, with its chat format.

    Args:
        folder: of the package.
        chat_format: overrides the recognised chat format.
        model_type: the kind of model whose chat formats are tried; a key of `KINDS`.

    Raises:
        ConfigError, TokenizerError, RequestError: as for `load`.
    """
    tokenizer = load_tokenizer(folder)
    if chat_format is not None and chat_format not in CHAT_FORMATS:
        names = sorted(CHAT_FORMATS)
        raise RequestError(
            f"chat format {chat_format!r} is unknown; known are {', '.join(names)}{suggestion(chat_format, names)}"
        )
    known = CHAT_FORMATS[chat_format] if chat_format else None
    tokenizer.chat_format = known or KINDS[model_type].chat_format(folder, tokenizer)
    tokenizer.media = KINDS[model_type].media(folder)
    return tokenizer


def check_vocabulary(folder: Path, tokenizer: Tokenizer, config: Config) -> None:
    """Raises TokenizerError if the tokenizer has more ids than the embedding has rows; MLX would read past them."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids and the embedding {config.vocab_size:,} rows; "
            "get both from one source"
        )


def load_config(folder: Path) -> Config:
    """The config of a folder, of the kind that its `model_type` names.

    Raises:
        ConfigError: config.json is missing or not JSON, or needs maths that is not implemented.
    """
    return read_config(read_json(folder / "config.json", if_missing=MODEL_FOLDER))


def read_config(raw: Mapping[str, Any]) -> Config:
    """The config in a parsed config.json, of the kind that its `model_type` names.

    Raises:
        ConfigError: the kind is unknown, or a field is refused.
    """
    name = raw.get("model_type")
    if name is None and "architecture" in raw:
        raise ConfigError(
            f"config.json has architecture {brief(raw['architecture'])} and no model_type, as those of TensorRT-LLM; "
            f"{_HUGGING_FACE}"
        )
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"config.json: model_type {brief(name)} is not supported; supported are {', '.join(KINDS)}")
    return KINDS[name].config(raw)


def load_model(folder: Path) -> LanguageModel:
    """The model of a folder; its weights stay on disk until they are used.

    Raises:
        ConfigError: config.json needs maths that is not implemented.
        CheckpointError: weights are missing, damaged, unexpected or of another shape.
    """
    config = load_config(folder)
    tensors = stored_tensors(folder, config)
    model = empty_model(config, tensors.infos)
    tensors = tensors.shaped(model)
    wanted = check_tensors(model, tensors.infos)
    weights = []
    with unchanged(f"the weights of {folder}"):
        files = {path: mx.load(str(path)) for path in sorted({stored.path for stored in tensors.model.values()})}
        for name, stored in tensors.model.items():
            if name in wanted:
                weights.append((name, files[stored.path][stored.name].reshape(stored.info.shape)))
        check_finite(folder, [each for each in weights if not model.on_demand(each[0])])
    model.load_weights(weights)
    model.eval()
    add_shipped(model, shipped_with(model, folder, tensors))
    return model


def shipped_with(model: LanguageModel, folder: Path, tensors: StoredTensors) -> dict[str, Adapter]:
    """The LoRAs of a checkpoint by name; see `shipped_adapters`."""
    return shipped_adapters(model, folder, tensors.loras, KINDS[model.config.model_type].loras(model.config))


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint, in its files.

    Attributes:
        model: the model's name -> the tensor, without unused ones.
        loras: adapter -> name in PEFT's layout without a prefix -> the tensor, of LoRAs beside the matrices.
    """

    model: dict[str, Stored]
    loras: dict[str, dict[str, Stored]]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """The model's name -> dtype, shape and place."""
        return {name: stored.info for name, stored in self.model.items()}

    def shaped(self, model: nn.Module) -> StoredTensors:
        """The same without trailing ones of a shape that the model does not have, as of pointwise convolutions."""
        found = dict(self.model)
        for name, array in tree_flatten(model.parameters()):
            if name in found and set(found[name].info.shape[array.ndim :]) == {1}:
                info = replace(found[name].info, shape=found[name].info.shape[: array.ndim])
                found[name] = replace(found[name], info=info)
        return replace(self, model=found)


def stored_tensors(folder: Path, config: Config) -> StoredTensors:
    """The tensors in a folder's files of weights, from the headers.

    Raises:
        CheckpointError: a file is missing or damaged, or two tensors stand for one of the model's.
    """
    kind = KINDS[config.model_type]
    model: dict[str, Stored] = {}
    loras: dict[str, dict[str, Stored]] = {}
    for path in sorted(set(weight_files(folder).values())):
        for name, info in read_header(path).items():
            own, stored = kind.native_name(name), Stored(path, name, info)
            if part := kind.lora_part(name):
                loras.setdefault(part[0], {})[part[1]] = stored
            elif own in model:
                raise CheckpointError(f"{folder} has both {model[own].name} and {name}, which are one tensor; keep one")
            elif not kind.is_unused(own, config):
                model[own] = stored
    return StoredTensors(model, loras)


def check_finite(folder: Path, weights: Iterable[tuple[str, mx.array]]) -> None:
    """Refuses NaN and infinity outside the matrices, which are large and whose NaN shows in the logits."""
    matrix = (".weight", ".scales", ".biases")
    small = {name: array for name, array in weights if array.ndim != 2 or not name.endswith(matrix)}
    if not small:
        return
    for name, total in zip(small, mx.stack([(0 * array).sum() for array in small.values()]).tolist(), strict=True):
        if total != 0:
            raise CheckpointError(
                f"{folder}: {name} contains NaN or infinity; the checkpoint is damaged, download it again"
            )


def share_weights(model: LanguageModel, config: Config | None = None) -> LanguageModel:
    """Another model over the same arrays, with the same adapters by name; an adapter on one is not on the other.

    Another `config` must have the same shapes.
    """
    parameters = model.parameters()
    flat = tree_flatten(parameters)
    infos = {name: TensorInfo(name_of(array.dtype), tuple(array.shape), 0, 0) for name, array in flat}
    twin = empty_model(config or model.config, infos)
    twin.update(parameters)
    twin.eval()
    if twin.adapters is not None and model.adapters is not None:
        twin.adapters.share(model.adapters)
    return twin


def empty_model(config: Config, infos: Mapping[str, TensorInfo]) -> LanguageModel:
    """The model with lazy random weights, quantised where the checkpoint has scales.

    The shapes of a matrix and of its packed weight and scales leave one answer for mode, bits and group size, whatever
    the map in config.json says: mlx-lm omits layers from it, and some tools write it wrongly.

    Args:
        config: the config.
        infos: the tensors of the checkpoint by name; empty for a dense model.

    Raises:
        CheckpointError: there are scales, and config.json has no 'quantization', or no quantisation has such shapes.
    """
    model = KINDS[config.model_type].model(config)
    scaled = {name.removesuffix(".scales") for name in infos if name.endswith(".scales")}
    if not scaled:
        return model
    if config.quantization is None:
        raise CheckpointError(f"{min(scaled)} is quantised, but config.json has no 'quantization' that describes it")

    claimed = config.quantization

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        quantised = path in scaled and hasattr(module, "to_quantized") and f"{path}.weight" in infos
        return quantised and _scheme(path, module, infos, claimed)

    nn.quantize(model, class_predicate=settings)
    if safe("products"):
        dequantize_products(model)
    return model


def _scheme(
    path: str, module: nn.Module, infos: Mapping[str, TensorInfo], quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """Mode, bits and group size of a quantised matrix [rows, columns], from its shapes; what is claimed goes first."""
    rows, columns = module.weight.shape
    weight, scales = infos[f"{path}.weight"], infos[f"{path}.scales"]
    claimed = (quantization.get(path), quantization)
    claims = [
        {key: each.get(key) for key in ("mode", "bits", "group_size")} for each in claimed if isinstance(each, Mapping)
    ]
    schemes: list[dict[str, Any]] = [
        {"mode": mode, "bits": bits, "group_size": group_size}
        for mode, (widths, sizes) in QUANTIZATION_MODES.items()
        for bits, group_size in itertools.product(widths, sizes)
    ]
    for scheme in sorted(schemes, key=lambda scheme: scheme not in claims):
        bits, group_size = scheme["bits"], scheme["group_size"]
        width = padded_width(columns, group_size) if isinstance(module, PaddedLinear) else columns
        shapes = (rows, width * bits / 32), (rows, width / group_size)
        if (weight.shape, scales.shape) == shapes and (scales.dtype in FLOATS) == (scheme["mode"] == "affine"):
            return scheme
    raise CheckpointError(
        f"{path} is quantised in a way that does not fit: weight {weight.dtype} {list(weight.shape)} and scales "
        f"{scales.dtype} {list(scales.shape)} for a matrix {[rows, columns]}; get config and weights from one source"
    )


def check_tensors(model: LanguageModel, infos: Mapping[str, TensorInfo]) -> set[str]:
    """Compares a checkpoint's headers with the model.

    Returns:
        The names to load: all except those that the model derives from others.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    expected = dict(tree_flatten(model.parameters()))
    missing = sorted(expected.keys() - infos.keys())
    extra = sorted(name for name in infos.keys() - expected.keys() if not _derived(name, model.config))
    if missing and extra:
        raise CheckpointError(
            f"{_some(missing)} missing from the checkpoint and {_some(extra)} unexpected: it has the tensors of "
            f"{_program(extra, expected)}; {_HUGGING_FACE}"
        )
    if missing:
        raise CheckpointError(
            f"{_some(missing)} missing from the checkpoint; it is incomplete or of another architecture"
        )
    if extra:
        raise CheckpointError(f"{_some(extra)} unexpected: the model that config.json describes does not have them")
    for name, array in expected.items():
        found = infos[name]
        if found.shape != tuple(array.shape):
            permuted = sorted(found.shape) == sorted(array.shape)
            other = f": the axes are in the order of another program; {_HUGGING_FACE}" if permuted else ""
            raise CheckpointError(
                f"{name} has shape {list(found.shape)}; config.json asks for {list(array.shape)}{other}"
            )
        kinds = FLOATS if mx.issubdtype(array.dtype, mx.floating) else (name_of(array.dtype),)
        if found.dtype not in kinds:
            raise CheckpointError(f"{name} has dtype {found.dtype}; it must be {' or '.join(kinds)}")
    return set(expected)


def _derived(name: str, config: Config) -> bool:
    """True for tensors that some checkpoints carry and the model computes: a tied head, the RoPE frequencies."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name.startswith("lm_head."))


def _program(names: Iterable[str], expected: Iterable[str]) -> str:
    """The program whose naming pattern matches some of `names`, and none of the model's own."""
    for pattern, program in _FOREIGN_NAMES.items():
        if any(re.match(pattern, name) for name in names) and not any(re.match(pattern, name) for name in expected):
            return program
    return "another program or architecture"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 3 else ''}) are" if len(names) > 1 else f"{shown} is"
