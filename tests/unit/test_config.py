"""config.json: both layouts, the presets, and the fields that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import ConfigError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.models.text import Model
from tests.conftest import DATA
from tests.presets import PRESETS

PHI_4_MINI = json.loads((DATA / "phi-4-mini-instruct" / "config.json").read_text())


def changed(**fields: Any) -> dict[str, Any]:
    return {**PHI_4_MINI, **fields}


def scaling(**fields: Any) -> dict[str, Any]:
    return changed(rope_scaling={**PHI_4_MINI["rope_scaling"], **fields})


def test_the_official_config_equals_the_preset() -> None:
    assert ModelConfig.from_dict(PHI_4_MINI) == PRESETS["phi-4-mini"]


def test_cos_and_sin_are_scaled_by_the_attention_factor() -> None:
    found = PRESETS["phi-4-mini"].rope_scaling
    assert found is not None
    assert found.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert found.attention_factor == pytest.approx(1.190238, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("phi-4-mini", 3_836_021_760, 194),
        ("phi-3.5-mini", 3_821_079_552, 195),
        ("phi-4", 14_659_507_200, 243),
        ("phi-4-reasoning", 14_659_507_200, 243),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int, tensors: int) -> None:
    shapes = tree_flatten(Model(PRESETS[name]).parameters())  # lazy: no weights are allocated
    assert sum(array.size for _, array in shapes) == parameters
    assert len(shapes) == tensors


def test_phi_4_mini_has_the_published_tensor_shapes() -> None:
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(Model(PRESETS["phi-4-mini"]).parameters())}
    layer = {name.split(".", 3)[3]: shape for name, shape in shapes.items() if name.startswith("model.layers.31.")}
    assert layer == {
        "input_layernorm.weight": (3072,),
        "self_attn.qkv_proj.weight": (5120, 3072),
        "self_attn.o_proj.weight": (3072, 3072),
        "post_attention_layernorm.weight": (3072,),
        "mlp.gate_up_proj.weight": (16384, 3072),
        "mlp.down_proj.weight": (3072, 8192),
    }
    assert shapes["model.embed_tokens.weight"] == (200064, 3072)
    assert shapes["model.norm.weight"] == (3072,)
    assert "lm_head.weight" not in shapes


def test_the_transformers_5_layout_is_read() -> None:
    raw = {k: v for k, v in PHI_4_MINI.items() if k not in ("rope_scaling", "rope_theta", "partial_rotary_factor")}
    raw["rope_parameters"] = PHI_4_MINI["rope_scaling"] | {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert ModelConfig.from_dict(raw) == PRESETS["phi-4-mini"]
    del raw["original_max_position_embeddings"]  # the value in rope_parameters is used instead
    assert ModelConfig.from_dict(raw) == PRESETS["phi-4-mini"]


def test_presets_survive_a_round_trip() -> None:
    for preset in PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


@pytest.mark.parametrize("extra", [{"attention_factor": 1.5}, {"factor": 8.0}])
def test_an_explicit_attention_factor_survives_a_round_trip(extra: dict[str, float]) -> None:
    config = ModelConfig.from_dict(scaling(**extra))
    expected = extra.get("attention_factor", math.sqrt(1 + math.log(8) / math.log(4096)))
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(expected)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_fields_without_effect_are_ignored() -> None:
    same = changed(
        sliding_window=None, attention_dropout=0.1, resid_pdrop=0.1, full_attn_mod=1, use_cache=False, 
        unsloth_version="1", attention_bias=None, head_dim=128, hidden_act="swish", rope_traditional=False,
    )  # fmt: skip
    assert ModelConfig.from_dict(same) == PRESETS["phi-4-mini"]
    assert ModelConfig.from_dict(changed(sliding_window=2**60)) == PRESETS["phi-4-mini"]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (changed(model_type="llama"), "model_type 'llama'"),
        ({}, "model_type None"),
        (changed(attention_bias=True), "attention_bias"),
        (changed(mlp_bias=True), "mlp_bias"),
        (changed(lm_head_bias=True), "lm_head_bias"),
        (changed(hidden_act="gelu"), "hidden_act"),
        (changed(sliding_window=2047), "sliding_window 2047"),
        (changed(sliding_window="4096"), "sliding_window"),
        (changed(rope_traditional=True), "rope_traditional"),
        (changed(tie_word_embeddings=10**5000), "tie_word_embeddings"),
        (changed(num_local_experts=16), "num_local_experts"),
        (scaling(type="linear"), "rope type 'linear'"),
        (scaling(type="yarn2"), "rope type 'yarn2'"),
        (scaling(type="llama3", high_freq_factor=4.0), "rope type 'llama3'"),
        (scaling(long_mscale=1.2), "long_mscale"),
        (scaling(short_factor=[1.0] * 47), "short_factor"),
        (scaling(long_factor="1"), "long_factor"),
        (scaling(long_factor=[0.0] * 48), "long_factor"),
        (scaling(long_factor=[float("nan")] * 48), "long_factor"),
        (changed(rope_scaling="longrope"), "rope_scaling"),
        (changed(hidden_size=3073), "hidden_size 3073"),
        (changed(hidden_size="3072"), "hidden_size"),
        (changed(hidden_size=True), "hidden_size"),
        (changed(num_hidden_layers=0), "num_hidden_layers"),
        (changed(num_hidden_layers=10**12), "num_hidden_layers"),
        (changed(num_hidden_layers=2**20), "num_hidden_layers"),
        (changed(vocab_size=2**31), "vocab_size"),
        (changed(vocab_size=10**5000), "vocab_size"),
        (changed(rope_theta=10**400), "rope_theta"),
        (changed(num_key_value_heads=7), "num_key_value_heads 7"),
        (changed(partial_rotary_factor=1.5), "partial_rotary_factor"),
        (changed(partial_rotary_factor=0.01), "partial_rotary_factor"),
        (changed(rope_theta=-1), "rope_theta"),
        (changed(rms_norm_eps=float("inf")), "rms_norm_eps"),
        (changed(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (changed(tie_word_embeddings=1), "tie_word_embeddings"),
        (changed(original_max_position_embeddings=1), "original_max_position_embeddings"),
        (changed(quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
        (changed(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}), "gptq"),
        (changed(quantization={"group_size": 64, "bits": 4, "lm_head": 5}), "lm_head"),
        (changed(quantization={"group_size": 64, "bits": 4, "lm_head": {"bits": 4, "foo": 1}}), "lm_head"),
        (changed(quantization={"group_size": 64, "bits": 4, "mode": "nf4"}), "nf4"),
        (changed(quantization={"group_size": 64, "bits": "4"}), "bits"),
        (changed(vocab_size=None), "vocab_size"),
    ],
)
def test_unsupported_fields_are_refused_by_name(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: [^\n]*$") as caught:
        ModelConfig.from_dict(raw)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"x"', "\x00"])
def test_a_file_without_a_json_object_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json[^\n]*$"):
        read_json(path)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)
