"""Names of tensors in the published checkpoints of Phi-4-multimodal, and those that no computation reads.

The original checkpoint wraps each adapted matrix (`base_layer`), keeps both LoRAs beside it (`lora_A.vision`), and
names projections by their place in a sequence. Ours are the names of transformers.

Source: `convert_phi4_multimodal_weights_to_hf.py` in transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi4_mlx.config.multimodal import MultimodalConfig

EXTEND = "model.embed_tokens_extend."  # prefix of the towers

_RENAMED = tuple(
    (re.compile(rf"{re.escape(EXTEND)}{pattern}"), EXTEND + new)
    for pattern, new in (
        (r"image_embed\.glb_GN$", "image_embed.global_img_feature_extensor"),
        (r"image_embed\.sub_GN$", "image_embed.sub_img_feature_extensor"),
        (r"image_embed\.img_projection\.0\.", "image_embed.img_projection_up."),
        (r"image_embed\.img_projection\.2\.", "image_embed.img_projection_down."),
        (r"(audio_embed\.encoder\.encoders\.\d+\.feed_forward_\w+)\.net\.0\.linear\.", r"\1.gate_up_proj."),
        (r"(audio_embed\.encoder\.encoders\.\d+\.feed_forward_\w+)\.net\.2\.", r"\1.down_proj."),
        (r"(audio_embed\.encoder\.encoders\.\d+\.self_attn)\.linear_([qkv])\.", r"\1.\2_proj."),
        (r"(audio_embed\.encoder\.encoders\.\d+\.self_attn)\.linear_out\.", r"\1.o_proj."),
        (r"audio_embed\.audio_projection\.speech\.0\.", "audio_embed.up_proj_for_speech."),
        (r"audio_embed\.audio_projection\.speech\.2\.", "audio_embed.down_proj_for_speech."),
        (r"audio_embed\.audio_projection\.vision\.0\.", "audio_embed.up_proj_for_vision_speech."),
        (r"audio_embed\.audio_projection\.vision\.2\.", "audio_embed.down_proj_for_vision_speech."),
    )
)
_LORA = re.compile(r"(model\.layers\.\d+\..+)\.lora_([AB])\.(vision|speech)\.weight")
_TOWER = re.escape(EXTEND) + r"image_embed\.img_processor\."
_UNUSED = re.compile(rf"{_TOWER}(post_layernorm|head)\.")  # the features come from an earlier layer
_ENCODER_LAYER = re.compile(rf"{_TOWER}encoder\.layers\.(\d{{1,9}})\.")


def native_name(name: str) -> str:
    """Our name of a tensor of either layout."""
    for pattern, new in _RENAMED:
        renamed, count = pattern.subn(new, name)
        if count:
            return renamed
    return name.replace(".base_layer.", ".") if name.startswith("model.layers.") else name


def lora_part(name: str) -> tuple[str, str] | None:
    """(adapter, name in PEFT's layout without a prefix) of a LoRA's tensor beside its matrix; None for any other."""
    found = _LORA.fullmatch(name)
    return (found[3], f"{found[1]}.lora_{found[2]}.weight") if found else None


def is_unused(name: str, config: MultimodalConfig) -> bool:
    """True for a tensor of the vision tower, by our name, behind the features: the last layers, norm and head."""
    layer = _ENCODER_LAYER.match(name)
    if layer:
        return config.vision.used_layers <= int(layer[1]) < config.vision.num_hidden_layers
    return _UNUSED.match(name) is not None
