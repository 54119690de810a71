"""The metadata of a GGUF file that llama.cpp reads for the architecture phi3.

Source: the GGUF specification (ggml's docs/gguf.md), and llama.cpp's src/models/phi3.cpp and src/llama-vocab.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.export.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter


def add_config(writer: GGUFWriter, config: ModelConfig, name: str, kind: str) -> None:
    """Adds the shapes and the RoPE settings.

    Args:
        writer: of the file.
        config: of the model.
        name: of the model, for people.
        kind: the type of the matrices.
    """
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
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


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds the tokenizer."""
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
