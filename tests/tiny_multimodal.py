"""A tiny Phi-4-multimodal model with random weights, as an object and as a folder in each published layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from phi4_mlx.checkpoint import load_model
from phi4_mlx.models.multimodal import Model
from tests.conformance import recipe_multimodal as recipe
from tests.conftest import TOKENIZER

LAYOUTS = ("original", "native", "native-unprefixed", "base")

# Native names -> those of the original checkpoint.
_ORIGINAL_NAMES = {
    r"global_img_feature_extensor": "glb_GN",
    r"sub_img_feature_extensor": "sub_GN",
    r"img_projection_up": "img_projection.0",
    r"img_projection_down": "img_projection.2",
    r"(feed_forward_\w+)\.gate_up_proj": r"\1.net.0.linear",
    r"(feed_forward_\w+)\.down_proj": r"\1.net.2",
    r"(encoders\.\d+\.self_attn)\.([qkv])_proj": r"\1.linear_\2",
    r"(encoders\.\d+\.self_attn)\.o_proj": r"\1.linear_out",
    r"up_proj_for_speech": "audio_projection.speech.0",
    r"down_proj_for_speech": "audio_projection.speech.2",
    r"up_proj_for_vision_speech": "audio_projection.vision.0",
    r"down_proj_for_vision_speech": "audio_projection.vision.2",
}


def multimodal_config_dict(layout: str = "native", **overrides: Any) -> dict[str, Any]:
    """A small config.json in the original layout or in that of transformers."""
    raw = recipe.config(**overrides)
    if layout != "original":
        return raw
    audio = raw.pop("audio_config")
    vision = raw.pop("vision_config")
    return raw | {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "img_processor": vision,  # null in the published file, for sizes that are no tiny model's
        "embd_layer": {
            "embedding_cls": "image_audio",
            "audio_embd_layer": {
                "compression_rate": 8, "downsample_rate": 1, "embedding_cls": "audio", "projection_cls": "mlp",
                "enable_gradient_checkpointing": True, "use_conv_downsample": False, "use_qformer": False,
            },
            "image_embd_layer": {
                "crop_size": vision["crop_size"], "embedding_cls": "tune_image", "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d", "projection_cls": "mlp", "use_hd_transform": True,
                "enable_gradient_checkpointing": True, "with_learnable_separator": True,
            },
        },
        "audio_processor": {
            "name": "cascades",
            "config": {
                "activation": "swish", "attention_dim": audio["hidden_size"], "batch_norm": False,
                "attention_heads": audio["num_attention_heads"], "bias_in_glu": True, "causal": True,
                "chunk_size": -1, "cnn_layer_norm": True, "conv_activation": "swish", "conv_glu_type": "swish",
                "depthwise_multiplier": 1, "depthwise_seperable_out_channel": audio["hidden_size"],
                "dropout_rate": 0.0, "encoder_embedding_config": {"input_size": 80}, "ext_pw_kernel_size": 1,
                "ext_pw_out_channel": audio["hidden_size"], "input_layer": "nemo_conv", "input_size": 80,
                "kernel_size": 3, "left_chunk": 18, "linear_units": audio["intermediate_size"],
                "nemo_conv_settings": {"conv_channels": audio["nemo_conv_channels"]},
                "num_blocks": audio["num_blocks"], "time_reduction": 8, "audio_token_id": audio["audio_token_id"],
                "relative_attention_bias_args": {"t5_bias_max_distance": audio["bias_max_distance"], "type": "t5"},
            },
        },
        **{
            f"{name}_lora": {"dp": 0.0, "layer": "layers.*", "lora_alpha": 2 * rank, "r": rank}
            for name, rank in recipe.RANKS.items()
        },
    }  # fmt: skip


def original_name(name: str) -> str:
    """The name of a native tensor in the original layout."""
    for pattern, new in _ORIGINAL_NAMES.items():
        name = re.sub(rf"(?<=\.){pattern}(?=\.|$)", new, name)
    path = name.removesuffix(".weight")
    if ".layers." in name and "extend" not in name and path.endswith(recipe.PROJECTIONS):
        return f"{path}.base_layer.weight"
    return name


def write_tiny_multimodal(
    folder: Path, seed: int = 0, dtype: mx.Dtype = mx.float32, layout: str = "original", **overrides: Any
) -> Path:
    """Writes the model as a folder.

    Args:
        folder: is made if it does not exist.
        seed: of the weights.
        dtype: of the weights.
        layout: "original" with its LoRAs beside the matrices; "native" with them in folders as PEFT writes them, or
            "native-unprefixed" as PEFT does not; or "base", native without LoRAs.
        overrides: fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(multimodal_config_dict(layout, **overrides)))
    write_tokenizer(folder)
    raw = recipe.config(**overrides)
    tensors = recipe.weights(raw, seed)
    if layout == "original":
        tensors = {original_name(name): array for name, array in tensors.items()}
        for adapter in recipe.RANKS:
            for name, array in recipe.lora(raw, adapter, seed).items():
                tensors[name.replace(".weight", f".{adapter}.weight")] = array
    elif layout != "base":
        for adapter in recipe.RANKS:
            _write_peft(folder / f"{adapter}-lora", raw, adapter, seed, dtype, layout == "native")
    _save(folder / "model.safetensors", tensors, dtype)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Writes the tiny tokenizer, with the ids of the slots."""
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    slot = tokenizer["added_tokens"][0]
    for number, token in ((10, recipe.IMAGE_TOKEN), (11, recipe.AUDIO_TOKEN)):
        tokenizer["added_tokens"].append({**slot, "id": token, "content": f"<|endoftext{number}|>"})
    path.write_text(json.dumps(tokenizer))


def _write_peft(folder: Path, raw: dict[str, Any], adapter: str, seed: int, dtype: mx.Dtype, prefixed: bool) -> None:
    """Writes a LoRA in PEFT's layout."""
    folder.mkdir(exist_ok=True)
    rank = recipe.RANKS[adapter]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [*recipe.PROJECTIONS], "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model." if prefixed else ""
    tensors = {prefix + name: array for name, array in recipe.lora(raw, adapter, seed).items()}
    _save(folder / "adapter_model.safetensors", tensors, dtype)


def _save(path: Path, tensors: dict[str, np.ndarray], dtype: mx.Dtype) -> None:
    mx.save_safetensors(str(path), {name: mx.array(array).astype(dtype) for name, array in tensors.items()})


def make_tiny_multimodal(seed: int = 0, **overrides: Any) -> Model:
    """An fp32 model with both LoRAs, whose logits have unit scale."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(write_tiny_multimodal(Path(scratch), seed, **overrides))
        mx.eval(model.parameters())
    assert isinstance(model, Model)
    return model
