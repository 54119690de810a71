"""GGUF files of the architecture phi3, for llama.cpp and Ollama, written tensor by tensor."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.checkpoint import check_vocabulary, load_config, load_tokenizer_and_format
from phi4_mlx.config.fields import Config
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.convert.exact import exact_parameters
from phi4_mlx.convert.package import check_room
from phi4_mlx.errors import RequestError
from phi4_mlx.export.gguf_metadata import add_config, add_vocabulary
from phi4_mlx.export.gguf_tensor import GGUFTensor
from phi4_mlx.export.modelfile import exact_context, modelfile
from phi4_mlx.export.templates import go_template, jinja_template
from phi4_mlx.export.vocabulary import Vocabulary, read_vocabulary
from phi4_mlx.files.atomic import whole_or_absent
from phi4_mlx.hub import resolve
from phi4_mlx.tokens.chat_format import CHAT_FORMATS, ChatFormat
from phi4_mlx.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("F16", "BF16", "Q8_0")
GGUF_FILE, MODELFILE = "model.gguf", "Modelfile"


@dataclass(frozen=True)
class Exported:
    """The result of an export to GGUF.

    Attributes:
        nbytes: of the file.
        exact_context: tokens to allocate at most for the short RoPE table, 0 if llama.cpp cannot allocate so few; None
            if the model has one table.
    """

    nbytes: int
    exact_context: int | None


def write_gguf(
    model: str | Path,
    target: str | Path,
    adapter_path: str | Path | None = None,
    kind: str = "F16",
    revision: str | None = None,
    *,
    chat_format: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Exported:
    """Writes a folder with model.gguf and a Modelfile for Ollama, whole or not at all.

    Args:
        model: a folder or a Hub id.
        target: the new folder; must not exist yet.
        adapter_path: an adapter to merge into the weights; None for none.
        kind: of the matrices, one of `TYPES`; vectors are F32.
        revision: a commit, branch or tag of the Hub repository.
        chat_format: overrides the recognised chat format; a key of `CHAT_FORMATS`.
        progress: called with (bytes done, total bytes) of the source.

    Raises:
        RequestError: the target exists or cannot be written, llama.cpp cannot run such a model, a number is too large
            for `kind`, or the package gguf is not installed.
        ConfigError, CheckpointError, TokenizerError: model or adapter is missing, damaged or not supported, or the
            adapter does not fit the model.
    """
    if kind not in TYPES:
        raise RequestError(f"type {kind!r:.40} is not known; known are {', '.join(TYPES)}")
    package = find_spec("gguf")
    if package is None or package.origin is None:  # a folder of that name in the current one has no origin
        raise RequestError(
            f"the package gguf, which writes GGUF files, is not installed: {sys.executable} -m pip install 'gguf>=0.19'"
        )
    if Path(target).suffix == ".gguf":
        raise RequestError(f"{target} is the name of a file; name a folder, for {GGUF_FILE} and {MODELFILE} in it")
    from gguf import GGUFWriter

    with whole_or_absent(Path(target)) as out:
        folder = resolve(model, revision)
        config = _carried(folder, load_config(folder))
        tokenizer = load_tokenizer_and_format(folder, chat_format)
        check_vocabulary(folder, tokenizer, config)
        turns = CHAT_FORMATS[tokenizer.chat_format.name]
        vocabulary = read_vocabulary(folder, tokenizer, turns.end, config.vocab_size)
        adapter = None if adapter_path is None else read_adapter(Path(os.path.expanduser(adapter_path)))
        tensors = [GGUFTensor(each, kind) for each in exact_parameters(folder, config, adapter)]
        check_room(out, sum(tensor.nbytes for tensor in tensors))
        writer = GGUFWriter(out / GGUF_FILE, "phi3")
        add_config(writer, config, _name(model, adapter_path, vocabulary), kind)
        add_vocabulary(writer, vocabulary)
        writer.add_chat_template(jinja_template(turns, vocabulary))
        _write(writer, tensors, dict(_factors(config)), progress or (lambda done, total: None))
        boundary = config.original_max_position_embeddings if config.rope_scaling else None
        context = exact_context(boundary) if boundary else None
        text = modelfile(GGUF_FILE, go_template(turns), _stops(tokenizer, turns), context)
        (out / MODELFILE).write_text(text, encoding="utf-8")
        return Exported((out / GGUF_FILE).stat().st_size, context)


def _carried(folder: Path, config: Config) -> ModelConfig:
    """The config of a model that llama.cpp's phi3 computes exactly; RequestError for any other."""
    if type(config) is not ModelConfig:  # a multimodal one is a subclass
        raise RequestError(
            f"{folder} is a model of type {config.model_type}, which llama.cpp cannot run exactly; GGUF is for "
            "Phi-4-mini, Phi-3.5-mini and Phi-4 (phi3); --format mlx writes a package"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise RequestError(
            f"{folder}: head_dim {config.head_dim} times {config.num_attention_heads} heads is not hidden_size "
            f"{config.hidden_size}, as llama.cpp's phi3 needs; use --format hf"
        )
    return config


def _name(model: str | Path, adapter_path: str | Path | None, vocabulary: Vocabulary) -> str:
    """The name of the model in the file's metadata."""
    parts = [Path(os.path.abspath(os.path.expanduser(each))).name for each in (model, adapter_path) if each is not None]
    name = " + ".join(parts)
    # For "phi3" or "phi-3" in a name, llama.cpp removes the white space after control tokens, and fails without these.
    if vocabulary.strips_after and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= {*vocabulary.tokens}:
        return f"{name} + phi3"
    return re.sub("(?i)(phi)-?3", r"\1 3", name)


def _stops(tokenizer: Tokenizer, chat_format: ChatFormat) -> list[str]:
    """The texts of the tokens that end an answer, that of a turn's end first."""
    texts = {text for text, token in tokenizer.control_ids.items() if token in tokenizer.eos_ids}
    return [str(chat_format.end), *sorted(texts - {chat_format.end})]


def _write(
    writer: GGUFWriter,
    tensors: list[GGUFTensor],
    factors: Mapping[str, Any],
    progress: Callable[[int, int], object],
) -> None:
    """Writes the file, the metadata first."""
    import numpy as np
    from gguf import GGMLQuantizationType

    total, done = sum(tensor.parameter.input_bytes for tensor in tensors), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for tensor in tensors:
        tensor.progress = advance
        raw = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw)
    for name, array in factors.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in (*tensors, *factors.values()):
            writer.write_tensor_data(each)
    finally:
        writer.close()


def _factors(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The two RoPE tables by the name of their tensor."""
    import numpy as np

    if config.rope_scaling:
        for name, table in (("long", config.rope_scaling.long_factor), ("short", config.rope_scaling.short_factor)):
            yield f"rope_factors_{name}.weight", np.array(table, np.float32)
