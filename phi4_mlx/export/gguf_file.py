"""GGUF files of the architecture phi3, for llama.cpp and Ollama, written tensor by tensor.

Source: the GGUF specification (ggml's docs/gguf.md), and llama.cpp's src/models/phi3.cpp and src/llama-vocab.cpp.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx

from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.checkpoint import check_vocabulary, load_config
from phi4_mlx.config.fields import Config
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.convert.exact import ExactParameter, exact_parameters
from phi4_mlx.convert.package import check_room
from phi4_mlx.errors import RequestError
from phi4_mlx.export.modelfile import exact_context, modelfile
from phi4_mlx.export.templates import go_template, jinja_template
from phi4_mlx.export.vocabulary import Vocabulary, read_vocabulary
from phi4_mlx.files.atomic import whole_or_absent
from phi4_mlx.hub import resolve
from phi4_mlx.tokens.chat_format import ChatFormat, recognise
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("F16", "BF16", "Q8_0")
GGUF_FILE, MODELFILE = "model.gguf", "Modelfile"

_Q8_0_GROUP = 32  # numbers of a row that share a scale in F16: 34 bytes
_F16_LARGEST = 65504

# Name in a checkpoint, without ".weight" -> name in GGUF.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Exported:
    """The result of an export to GGUF.

    Attributes:
        nbytes: of the file.
        exact_context: tokens to allocate at most for the short RoPE table; None if the model has one table.
        boundary: tokens up to which the model itself uses the short table; None if it has one.
    """

    nbytes: int
    exact_context: int | None
    boundary: int | None


def write_gguf(
    model: str | Path,
    target: str | Path,
    adapter_path: str | Path | None = None,
    kind: str = "F16",
    revision: str | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Exported:
    """Writes a folder with model.gguf and a Modelfile for Ollama, whole or not at all.

    Args:
        model: a folder or a Hub id.
        target: the new folder; must not exist yet.
        adapter_path: an adapter to merge into the weights; None for none.
        kind: of the matrices, one of `TYPES`; vectors are F32.
        revision: a commit, branch or tag of the Hub repository.
        progress: called with (bytes done, total bytes) of the source.

    Raises:
        RequestError: the target exists or cannot be written, llama.cpp cannot run such a model, a number is too large
            for `kind`, or the package gguf is not installed.
        ConfigError, CheckpointError, TokenizerError: model or adapter is missing, damaged or not supported, or the
            adapter does not fit the model.
    """
    if kind not in TYPES:
        raise RequestError(f"type {kind!r:.40} is not known; known are {', '.join(TYPES)}")
    if find_spec("gguf") is None:
        raise RequestError(
            f"the package gguf, which writes GGUF files, is not installed: {sys.executable} -m pip install 'gguf>=0.17'"
        )
    if Path(target).suffix == ".gguf":
        raise RequestError(f"{target} is the name of a file; name a folder, for {GGUF_FILE} and {MODELFILE} in it")
    with whole_or_absent(Path(target)) as out:
        folder = resolve(model, revision)
        config = _carried(folder, load_config(folder))
        tokenizer = load_tokenizer(folder)
        check_vocabulary(folder, tokenizer, config)
        chat_format = recognise(folder, tokenizer)
        vocabulary = read_vocabulary(folder, tokenizer, chat_format.end, config.vocab_size)
        adapter = None if adapter_path is None else read_adapter(Path(os.path.expanduser(adapter_path)))
        tensors = [_Tensor(each, _type_of(each, kind)) for each in exact_parameters(folder, config, adapter)]
        check_room(out, sum(tensor.nbytes for tensor in tensors))
        path = out / GGUF_FILE
        _write(path, _name(model, adapter_path, vocabulary), config, vocabulary, jinja_template(chat_format, vocabulary), tensors, kind, progress)
        boundary = config.original_max_position_embeddings if config.rope_scaling else None
        context = exact_context(boundary) if boundary else None
        text = modelfile(GGUF_FILE, go_template(chat_format), _stops(tokenizer, chat_format), context)
        (out / MODELFILE).write_text(text, encoding="utf-8")
        return Exported(path.stat().st_size, context, boundary)


def _carried(folder: Path, config: Config) -> ModelConfig:
    """The config of a model that llama.cpp's phi3 computes exactly; RequestError for any other."""
    if not isinstance(config, ModelConfig):
        raise RequestError(
            f"{folder} is a model of type {config.model_type}, which llama.cpp cannot run exactly; GGUF is for "
            "Phi-4-mini, Phi-3.5-mini and Phi-4 (phi3); --format mlx keeps it as a package"
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
    # llama.cpp removes the white space after control tokens for this word in a name, if the vocabulary has these.
    if vocabulary.strips_after and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= {*vocabulary.tokens}:
        parts.append("phi3")
    return " + ".join(parts)


def _stops(tokenizer: Tokenizer, chat_format: ChatFormat) -> list[str]:
    """The texts of the tokens that end an answer, that of a turn's end first."""
    texts = {text for text, token in tokenizer.control_ids.items() if token in tokenizer.eos_ids}
    return [str(chat_format.end), *sorted(texts - {chat_format.end})]


def _type_of(parameter: ExactParameter, kind: str) -> str:
    """The type of a tensor: F32 for vectors, F16 for matrices whose rows Q8_0 does not divide."""
    if len(parameter.inputs[0].info.shape) == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and parameter.width % _Q8_0_GROUP else kind


class _Tensor:
    """A tensor of the file that is read, computed and written in blocks of rows, in the place of a NumPy array."""

    def __init__(self, parameter: ExactParameter, kind: str):
        self.parameter, self.kind = parameter, kind
        self.progress: Callable[[int], object] = lambda count: None

    @property
    def name(self) -> str:
        """Its name in the file."""
        path = self.parameter.path.removesuffix(".weight")
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        return f"blk.{found[1]}.{_NAMES[found[2]]}.weight" if found else f"{_NAMES[path]}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, or the length of a vector."""
        rows = self.parameter.rows
        return (rows,) if len(self.parameter.inputs[0].info.shape) == 1 else (rows, self.parameter.width)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        numbers = math.prod(self.shape)
        return numbers // _Q8_0_GROUP * 34 if self.kind == "Q8_0" else numbers * (4 if self.kind == "F32" else 2)

    def tofile(self, file: BinaryIO) -> None:
        """Writes its bytes, as the method of NumPy's arrays."""
        for first, last in self.parameter.blocks():
            file.write(self._bytes(first, last))
            self.progress(self.parameter.input_bytes * (last - first) // self.parameter.rows)
        mx.clear_cache()

    def _bytes(self, first: int, last: int) -> memoryview:
        rows = self.parameter.exact(first, last)
        if self.kind == "Q8_0":
            import numpy as np
            from gguf import GGMLQuantizationType, quants

            largest = mx.abs(rows).max().item() / 127  # the scale of its group, in F16
            data = memoryview(quants.quantize(np.array(rows), GGMLQuantizationType.Q8_0)).cast("B")
        else:
            rounded = rows.astype({"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[self.kind])
            largest = mx.abs(rounded).max().item()
            data = memoryview(rounded.view(mx.uint8))
        if not largest <= (_F16_LARGEST if self.kind == "Q8_0" else sys.float_info.max):
            raise RequestError(
                f"{self.parameter.name} has numbers too large for {self.kind}{self.parameter.such_as(first, last)}; "
                "use --type BF16"
            )
        return data


def _write(
    path: Path,
    name: str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    template: str,
    tensors: list[_Tensor],
    kind: str,
    progress: Callable[[int, int], object] | None,
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "phi3")
    _add_config(writer, config, name, kind)
    _add_vocabulary(writer, vocabulary)
    writer.add_chat_template(template)
    factors = dict(_factors(config))
    for tensor in tensors:
        raw = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw)
    for each, array in factors.items():
        writer.add_tensor_info(each, array.shape, array.dtype, array.nbytes)
    total, done = sum(tensor.parameter.input_bytes for tensor in tensors), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            tensor.progress = advance
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]
        for array in factors.values():
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _factors(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The two RoPE tables by the name of their tensor."""
    import numpy as np

    if config.rope_scaling:
        for name, table in (("long", config.rope_scaling.long_factor), ("short", config.rope_scaling.short_factor)):
            yield f"rope_factors_{name}.weight", np.array(table, np.float32)


def _add_config(writer: GGUFWriter, config: ModelConfig, name: str, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type({"F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}.get(
        kind, LlamaFileType.MOSTLY_Q8_0
    ))  # fmt: skip
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.rotary_dims)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(0)  # none, which llama.cpp tells from a field that is missing
    if config.rope_scaling:
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(config.rope_scaling.attention_factor)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    adders = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id,
        "eom": writer.add_eom_token_id, "unknown": writer.add_unk_token_id, "padding": writer.add_pad_token_id,
    }  # fmt: skip
    for meaning, token in vocabulary.ids.items():
        adders[meaning](token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
