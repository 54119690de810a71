"""The published Phi-4-multimodal by its config and its headers; the numbers are holes in a sparse file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi4_mlx.files.safetensors import tensor_bytes
from tests.conformance import recipe_multimodal as recipe
from tests.tiny_multimodal import original_name, write_tokenizer

RANKS = {"vision": 256, "speech": 320}
_AUDIO = {
    "activation": "swish", "attention_dim": 1024, "attention_heads": 16, "batch_norm": False, "bias_in_glu": True,
    "causal": True, "chunk_size": -1, "cnn_layer_norm": True, "conv_activation": "swish", "conv_glu_type": "swish",
    "depthwise_multiplier": 1, "depthwise_seperable_out_channel": 1024, "dropout_rate": 0.0,
    "encoder_embedding_config": {"input_size": 80}, "ext_pw_kernel_size": 1, "ext_pw_out_channel": 1024,
    "input_layer": "nemo_conv", "input_size": 80, "kernel_size": 3, "left_chunk": 18, "linear_units": 1536,
    "nemo_conv_settings": {"conv_channels": 1024}, "num_blocks": 24,
    "relative_attention_bias_args": {"t5_bias_max_distance": 500, "type": "t5"}, "time_reduction": 8,
}  # fmt: skip


def published_config() -> dict[str, Any]:
    """config.json as published, apart from LongRoPE's numbers."""
    return {
        "architectures": ["Phi4MMForCausalLM"], "model_type": "phi4mm", "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 200064, "hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": False,
        "lm_head_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "sliding_window": 262144, "full_attn_mod": 1, "interpolate_factor": 1, "bos_token_id": 199999,
        "eos_token_id": 199999, "pad_token_id": 199999, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]},
        "img_processor": None,
        "audio_processor": {"name": "cascades", "config": _AUDIO},
        "embd_layer": {
            "embedding_cls": "image_audio",
            "audio_embd_layer": {
                "compression_rate": 8, "downsample_rate": 1, "embedding_cls": "audio", "projection_cls": "mlp",
                "enable_gradient_checkpointing": True, "use_conv_downsample": False, "use_qformer": False,
            },
            "image_embd_layer": {
                "crop_size": 448, "embedding_cls": "tune_image", "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d", "projection_cls": "mlp", "use_hd_transform": True,
                "enable_gradient_checkpointing": True, "with_learnable_separator": True,
            },
        },
        "vision_lora": {"dp": 0.0, "layer": "layers.*((self_attn\\.(qkv_proj|o_proj))|(mlp\\.(gate_up|down)_proj))",
                        "lora_alpha": 512, "r": 256},
        "speech_lora": {"dp": 0.01, "layer": "((layers.*self_attn\\.(qkv|o)_proj)|(layers.*mlp\\.(gate_up|down)_proj))",
                        "lora_alpha": 640, "r": 320},
    }  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint without its LoRAs, in the native layout."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
    audio = {"hidden_size": 1024, "intermediate_size": 1536, "num_blocks": 24, "num_attention_heads": 16}
    return recipe.shapes(
        published_config()
        | {"vision_config": vision | {"crop_size": 448}}
        | {"audio_config": audio | {"nemo_conv_channels": 1024, "bias_max_distance": 500}}
    )


def write_published_shapes(folder: Path) -> Path:
    """Writes a folder with the published names, shapes and dtypes, and LoRAs that are zero but for one number each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config()))
    write_tokenizer(folder)
    shapes = published_shapes()
    tensors = {original_name(name): shape for name, shape in shapes.items()}
    for path, (out, width) in (
        (name.removesuffix(".weight"), shape) for name, shape in shapes.items() if _adapted(name)
    ):
        for adapter, rank in RANKS.items():
            tensors[f"{path}.lora_A.{adapter}.weight"] = (rank, width)
            tensors[f"{path}.lora_B.{adapter}.weight"] = (out, rank)
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + tensor_bytes("BF16", shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
        for adapter in RANKS:
            start, _ = header[f"model.layers.31.mlp.down_proj.lora_B.{adapter}.weight"]["data_offsets"]
            file.seek(8 + len(raw) + start)
            file.write(b"\x80\x3f")  # 1.0
    return folder


def _adapted(name: str) -> bool:
    return ".layers." in name and "extend" not in name and name.removesuffix(".weight").endswith(recipe.PROJECTIONS)
