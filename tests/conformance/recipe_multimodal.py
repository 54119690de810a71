"""A tiny Phi-4-multimodal, drawn from NumPy's seeded generator instead of stored: config, weights, LoRAs, media.

Each tensor has a seed of its own, made from its name, so the reference, which has tensors that are never used, and this
project build the same model. Shapes and names are those of transformers' `Phi4MultimodalForCausalLM`.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

BOUNDARY = 64
CROP, PATCH = 112, 14
GRID = CROP // PATCH
IMAGE_TOKEN, AUDIO_TOKEN = 510, 511
RANKS = {"vision": 4, "speech": 6}
MODES = ("language", "vision", "speech", "vision_speech")
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FRAMES = {"short": 83, "one_window": 4000, "two_windows": 4400}
GREEDY = 24  # tokens that are decoded behind a picture, across the RoPE boundary

EXTEND = "model.embed_tokens_extend."


def config(**overrides: Any) -> dict[str, Any]:
    """config.json in transformers' native layout."""
    pairs = 6
    raw: dict[str, Any] = {
        "architectures": ["Phi4MultimodalForCausalLM"],
        "model_type": "phi4_multimodal",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 16 * BOUNDARY,
        "original_max_position_embeddings": BOUNDARY,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
            "long_factor": [1.0 + 1.5 * i for i in range(pairs)],
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": CROP, "crop_size": CROP, "patch_size": PATCH, "image_token_id": IMAGE_TOKEN,
        },
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 24, "num_blocks": 2, "num_attention_heads": 4,
            "nemo_conv_channels": 16, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
            "bias_max_distance": 20, "audio_token_id": AUDIO_TOKEN,
        },
    }  # fmt: skip
    return raw | overrides


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint in the native layout, unused ones too, with torch's shapes."""
    D, F, K = raw["hidden_size"], raw["intermediate_size"], raw["num_key_value_heads"]
    head = D // raw["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (raw["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(raw["num_hidden_layers"]):
        found |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,),
                "self_attn.qkv_proj": (D + 2 * K * head, D),
                "self_attn.o_proj": (D, D),
                "post_attention_layernorm": (D,),
                "mlp.gate_up_proj": (2 * F, D),
                "mlp.down_proj": (D, F),
            }.items()
        }
    vision = {f"{EXTEND}image_embed.{name}": shape for name, shape in _vision(raw["vision_config"], D).items()}
    audio = {f"{EXTEND}audio_embed.{name}": shape for name, shape in _audio(raw["audio_config"], D).items()}
    head = {} if raw["tie_word_embeddings"] else {"lm_head.weight": (raw["vocab_size"], D)}
    return found | vision | audio | head


def _linear(name: str, out: int, width: int, *ones: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width, *ones), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _vision(raw: dict[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    D, F, p = raw["hidden_size"], raw["intermediate_size"], raw["patch_size"]
    found: dict[str, tuple[int, ...]] = {
        "global_img_feature_extensor": (1, 1, D),
        "sub_img_feature_extensor": (1, 1, 1, D),
        "img_processor.embeddings.patch_embedding.weight": (D, 3, p, p),
        "img_processor.embeddings.patch_embedding.bias": (D,),
        "img_processor.embeddings.position_embedding.weight": ((raw["crop_size"] // p) ** 2, D),
        **_linear("img_projection_up", hidden, D),
        **_linear("img_projection_down", hidden, hidden),
    }
    for i in range(raw["num_hidden_layers"]):
        at = f"img_processor.encoder.layers.{i}."
        found |= _norm(f"{at}layer_norm1", D) | _norm(f"{at}layer_norm2", D)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"{at}self_attn.{name}", D, D)
        found |= _linear(f"{at}mlp.fc1", F, D) | _linear(f"{at}mlp.fc2", D, F)
    head = "img_processor.head."
    return (
        found
        | _norm("img_processor.post_layernorm", D)
        | {f"{head}probe": (1, 1, D), f"{head}attention.in_proj_weight": (3 * D, D)}
        | {f"{head}attention.in_proj_bias": (3 * D,)}
        | _linear(f"{head}attention.out_proj", D, D)
        | _norm(f"{head}layernorm", D)
        | _linear(f"{head}mlp.fc1", F, D)
        | _linear(f"{head}mlp.fc2", D, F)
    )


def _audio(raw: dict[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    D, F, C, H = raw["hidden_size"], raw["intermediate_size"], raw["nemo_conv_channels"], raw["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {
        "encoder.encoder_embedding.global_mean": (80,),
        "encoder.encoder_embedding.global_invstd": (80,),
        "encoder.relative_attention_bias_layer.bias_values.weight": (2 * raw["bias_max_distance"], H),
        **_linear("encoder.embed.out", D, 10 * C),
    }
    for i, width, taps in ((0, 1, 3), (2, 1, 3), (3, C, 1), (5, 1, 3), (6, C, 1)):
        found |= _linear(f"encoder.embed.conv.{i}", C, width, taps, taps)
    for i in range(raw["num_blocks"]):
        at = f"encoder.encoders.{i}."
        for name in ("layer_norm", "layer_norm_att", "conv.layer_norm"):
            found |= _norm(at + name, D)
        for part in ("feed_forward_in", "feed_forward_out"):
            found |= _norm(f"{at}{part}.layer_norm", D)
            found |= _linear(f"{at}{part}.gate_up_proj", 2 * F, D) | _linear(f"{at}{part}.down_proj", D, F)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found |= _linear(f"{at}self_attn.{name}", D, D)
        found |= _linear(f"{at}conv.glu.ext_pw_conv_1d", 2 * D, D, 1)
        found |= {f"{at}conv.glu.b1": (1, D, 1), f"{at}conv.glu.b2": (1, D, 1)}
        found |= _linear(f"{at}conv.dw_sep_conv_1d.dw_conv", D, 1, 3)
        found |= _linear(f"{at}conv.dw_sep_conv_1d.pw_conv", D, D, 1) | _linear(f"{at}conv.ext_pw_conv_1d", D, D, 1)
    for name in ("speech", "vision_speech"):
        found |= _linear(f"up_proj_for_{name}", hidden, D) | _linear(f"down_proj_for_{name}", hidden, hidden)
    return found


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A tensor of the checkpoint in fp32: norms near 1, biases small, matrices with variance 1/fan-in."""
    noise = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape, dtype=np.float32)
    if name.endswith("invstd") or (len(shape) == 1 and "norm" in name and name.endswith("weight")):
        return 1 + np.float32(0.1) * noise
    if name.endswith("global_mean"):
        return np.float32(0.5) * noise
    if "extensor" in name or len(shape) == 1 or name.endswith((".b1", ".b2")):
        return np.float32(0.5 if "extensor" in name else 0.1) * noise
    fan_in = 4 if "position" in name or "bias_values" in name else int(np.prod(shape[1:]))
    return noise * np.float32(fan_in**-0.5)


def weights(raw: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors in the native layout, with torch's shapes."""
    return {name: tensor(name, shape, seed) for name, shape in shapes(raw).items()}


def lora(raw: dict[str, Any], name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A LoRA in PEFT's layout without a prefix: path.lora_A.weight [R, in] and path.lora_B.weight [out, R]."""
    found = {}
    for path, (out, width) in adapted(raw).items():
        for part, shape in (("lora_A", (RANKS[name], width)), ("lora_B", (out, RANKS[name]))):
            found[f"{path}.{part}.weight"] = np.float32(0.5) * tensor(f"{path}.{part}.{name}", shape, seed)
    return found


def adapted(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of the matrices that the LoRAs adapt."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes(raw).items()
        if name.removesuffix(".weight").endswith(PROJECTIONS) and ".layers." in name and "extend" not in name
    }


def merged(raw: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """Matrices W + 2 B A, with a LoRA in them."""
    parts = lora(raw, name)
    return {
        f"{path}.weight": tensor(f"{path}.weight", shape)
        + 2 * parts[f"{path}.lora_B.weight"] @ parts[f"{path}.lora_A.weight"]
        for path, shape in adapted(raw).items()
    }


def picture() -> tuple[np.ndarray, tuple[int, int]]:
    """A padded picture, uint8 [CROP, 2 CROP, 3], and the size of what is not padding."""
    content = (CROP - 2 * PATCH, 2 * CROP - 3 * PATCH)
    pixels = np.full((CROP, 2 * CROP, 3), 255, np.uint8)
    drawn = np.random.default_rng(5).integers(0, 256, (*content, 3), dtype=np.uint8)
    pixels[: content[0], : content[1]] = drawn
    return pixels, content


def pixels() -> np.ndarray:
    """Random crops, global view first, float32 [3, CROP, CROP, 3]."""
    return np.random.default_rng(6).standard_normal((3, CROP, CROP, 3), dtype=np.float32)


def mask() -> np.ndarray:
    """The patches of `picture` that are not padding, bool [3, GRID, GRID]."""
    valid = np.zeros((GRID, 2 * GRID), bool)
    valid[: GRID - 2, : 2 * GRID - 3] = True
    return np.stack([np.ones((GRID, GRID), bool), valid[:, :GRID], valid[:, GRID:]])


IMAGE_TOKENS = (GRID // 2) * (GRID // 2 + 1) + 1 + 3 * (7 + 1)  # of `picture`


def features(name: str) -> np.ndarray:
    """Log-mel frames, float32 [FRAMES[name], 80]."""
    return 2 * np.random.default_rng(7 + FRAMES[name]).standard_normal((FRAMES[name], 80), dtype=np.float32)


def prompt(mode: str) -> list[int]:
    """Ids of a prompt with the media of a mode: `picture`, the short clip, both or none."""
    ids = [490, 5, 6, 7]
    if "vision" in mode:
        ids += [IMAGE_TOKEN] * IMAGE_TOKENS
    if "speech" in mode:
        ids += [AUDIO_TOKEN] * -(-FRAMES["short"] // 8)
    return [*ids, 20, 21, 22, 491, 492]
