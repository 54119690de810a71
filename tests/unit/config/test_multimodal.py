"""The config of Phi-4-multimodal: both layouts, their defaults, and the fields that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import read_config
from phi4_mlx.config.multimodal import AudioConfig, LoRAConfig, MultimodalConfig, VisionConfig
from phi4_mlx.errors import ConfigError
from phi4_mlx.models.multimodal import Model
from tests.multimodal_shapes import published_config
from tests.tiny_multimodal import multimodal_config_dict

NATIVE = multimodal_config_dict("native")


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a path such as "vision_config.crop_size"."""
    raw = json.loads(json.dumps(raw))
    *heads, last = path.split(".")
    inner = raw
    for head in heads:
        inner = inner.setdefault(head, {})
    inner[last] = value
    return raw


def test_the_published_config_has_the_sizes_of_the_published_towers() -> None:
    config = MultimodalConfig.from_dict(published_config())
    assert config.vision == VisionConfig() and config.vision.used_layers == 26 and config.vision.grid == 32
    assert config.audio == AudioConfig(bias_max_distance=500)
    assert (config.vision_lora, config.speech_lora) == (LoRAConfig(256, 512), LoRAConfig(320, 640))
    assert (config.head_dim, config.rotary_dims, config.tie_word_embeddings) == (128, 96, True)
    assert config.model_type == "phi4mm"


def test_the_published_model_has_the_published_number_of_parameters() -> None:
    """4,743,988,032 with the last layer, the last norm and the head, which are unused; statistics are not counted."""
    model = Model(MultimodalConfig.from_dict(published_config()))
    sizes = [array.size for name, array in tree_flatten(model.parameters()) if "encoder_embedding" not in name]
    D, F = 1152, 4304
    block = 4 * D * (D + 1) + D * F + F + D * F + D + 4 * D
    head = D + 4 * D * (D + 1) + 2 * D + 2 * D * F + F + D
    assert sum(sizes) + block + 2 * D + head == 4_743_988_032


def test_both_layouts_give_one_config() -> None:
    original, native = (read_config(multimodal_config_dict(layout)) for layout in ("original", "native"))
    assert isinstance(original, MultimodalConfig) and isinstance(native, MultimodalConfig)
    assert (original.vision, original.audio) == (native.vision, native.audio)
    assert (original.model_type, native.model_type) == ("phi4mm", "phi4_multimodal")


def test_the_defaults_of_transformers_hold_in_its_layout_alone() -> None:
    config = MultimodalConfig.from_dict({"model_type": "phi4_multimodal"})
    assert (config.num_attention_heads, config.tie_word_embeddings, config.audio.bias_max_distance) == (32, False, 1000)
    assert config.rope_scaling is None and config.vision == VisionConfig()
    with pytest.raises(ConfigError, match="hidden_size"):
        MultimodalConfig.from_dict({"model_type": "phi4mm"})


@pytest.mark.parametrize("raw", [NATIVE, multimodal_config_dict("original"), published_config()])
def test_a_config_survives_a_round_trip(raw: dict[str, Any]) -> None:
    config = read_config(raw)
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("full_attn_mod", 2),
        ("interpolate_factor", 2),
        ("attention_bias", True),
        ("sliding_window", 100),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.num_channels", 1),
        ("vision_config.image_size", 448),
        ("vision_config.crop_size", 100),
        ("vision_config.crop_size", [112, 56]),
        ("vision_config.patch_size", 112),
        ("vision_config.num_attention_heads", 5),
        ("vision_config.feature_layer", 4),
        ("vision_config.feature_layer", "last"),
        ("vision_config.image_token_id", -1),
        ("vision_config.image_token_id", 511),
        ("vision_config.image_token_id", 512),
        ("audio_config.activation", "relu"),
        ("audio_config.conv_activation", "relu"),
        ("audio_config.conv_glu_type", "sigmoid"),
        ("audio_config.nemo_activation", "gelu"),
        ("audio_config.bias_symmetric", True),
        ("audio_config.chunk_size", 18),
        ("audio_config.downsample_rate", 2),
        ("audio_config.time_reduction", 4),
        ("audio_config.input_size", 128),
        ("audio_config.depthwise_multiplier", 2),
        ("audio_config.ext_pw_out_channel", 64),
        ("audio_config.depthwise_separable_out_channel", 64),
        ("audio_config.num_attention_heads", 5),
        ("embd_layer.image_embd_layer.hd_transform_order", "glb_sub"),
        ("embd_layer.image_embd_layer.use_hd_transform", False),
        ("embd_layer.image_embd_layer.image_token_compression_cls", "linear"),
        ("embd_layer.image_embd_layer.projection_cls", "linear"),
        ("embd_layer.audio_embd_layer.use_qformer", True),
        ("embd_layer.audio_embd_layer.use_conv_downsample", True),
        ("embd_layer.audio_embd_layer.compression_rate", 4),
        ("audio_processor.name", "whisper"),
        ("audio_processor.config.batch_norm", True),
        ("audio_processor.config.bias_in_glu", False),
        ("audio_processor.config.causal", False),
        ("audio_processor.config.ext_pw_kernel_size", 3),
        ("audio_processor.config.input_layer", "conv2d"),
        ("audio_processor.config.nemo_conv_settings.subsampling", "striding"),
        ("audio_processor.config.nemo_conv_settings.is_causal", True),
        ("audio_processor.config.relative_attention_bias_args.type", "alibi"),
        ("audio_processor.config.relative_attention_bias_args.t5_bias_symmetric", True),
        ("vision_lora.r", 0),
        ("vision_lora.use_dora", True),
    ],
)
def test_maths_that_is_not_done_is_refused_by_the_name_of_its_field(path: str, value: Any) -> None:
    name = path.rpartition(".")[2]
    with pytest.raises(ConfigError, match=name) as refused:
        MultimodalConfig.from_dict(changed(NATIVE, path, value))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_the_ids_of_slots_may_stand_beside_the_fields_of_the_text() -> None:
    config = MultimodalConfig.from_dict(published_config() | {"image_token_id": 90, "audio_token_id": 91})
    assert (config.vision.image_token_id, config.audio.audio_token_id) == (90, 91)
