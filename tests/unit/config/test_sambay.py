"""config.json of Phi-4-mini-flash-reasoning: its three layouts, its context, its tensors, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.config.sambay import TRAINED_CONTEXT, SambaYConfig
from phi4_mlx.errors import ConfigError
from phi4_mlx.models.sambay import Model
from tests.tiny_sambay import sambay_config_dict

# As published, without the fields that name Python code.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Phi4FlashForCausalLM"], "attention_dropout": 0.0, "pad_token_id": 199999,
    "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "hidden_act": "silu", "hidden_size": 2560,
    "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-5, "max_position_embeddings": 262144,
    "_attn_implementation": "flash_attention_2", "mb_per_layer": 2, "model_type": "phi4flash",
    "num_attention_heads": 40, "num_hidden_layers": 32, "num_key_value_heads": 20, "resid_pdrop": 0.0,
    "sliding_window": 512, "torch_dtype": "bfloat16", "tie_word_embeddings": True, "transformers_version": "4.46.1",
    "use_cache": True, "mlp_bias": False, "lm_head_bias": False, "vocab_size": 200064,
}  # fmt: skip
CONFIG = SambaYConfig.from_dict(PUBLISHED)
WINDOWS = [512 if i % 2 and i < 16 else None for i in range(32)]
# What the published config class writes again: every argument of its own, also those that nothing reads.
SAVED = PUBLISHED | {
    "_name_or_path": "microsoft/Phi-4-mini-flash-reasoning", "auto_map": {"AutoConfig": "configuration_phi4flash.X"},
    "sliding_window": WINDOWS, "rope_theta": 10000.0, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": 160, "mamba_conv_bias": True, "mamba_proj_bias": False, "dtype": "bfloat16",
}  # fmt: skip


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


def kinds(windowed: str = "sliding_attention", other: str = "full_attention") -> list[str]:
    return [other if size is None else windowed for size in WINDOWS]


@pytest.mark.parametrize(
    "raw",
    [
        SAVED,
        without(SAVED, "tie_word_embeddings"),  # a default of transformers, which it does not write
        SAVED | {"mamba_dt_rank": "auto"},
        SAVED | {"sliding_window": [size and WINDOWS for size in WINDOWS]},  # read and saved twice
        PUBLISHED | {"layer_types": kinds()},
        SAVED | {"layer_types": kinds()},
        PUBLISHED | {"layer_types": kinds(other="mamba")},
        PUBLISHED | {"hidden_act": "swish", "quantization_config": None, "mb_per_layer": None},
        PUBLISHED | {"max_position_embeddings": TRAINED_CONTEXT},
    ],
)
def test_every_layout_gives_the_published_config(raw: dict[str, Any]) -> None:
    assert SambaYConfig.from_dict(raw) == CONFIG


def test_the_published_config_has_the_published_shapes() -> None:
    assert (CONFIG.sliding_window, CONFIG.head_dim, CONFIG.mamba_width, CONFIG.mamba_dt_rank) == (512, 64, 5120, 160)
    assert (CONFIG.mamba_d_state, CONFIG.mamba_d_conv, CONFIG.tie_word_embeddings) == (16, 4, True)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 12}, {"mamba_expand": 3, "mamba_dt_rank": 7}])
def test_a_config_survives_a_round_trip(changes: dict[str, Any]) -> None:
    settings = {"group_size": 64, "bits": 4}
    config = SambaYConfig.from_dict(PUBLISHED | changes | {"quantization": settings})
    assert SambaYConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.quantization == settings


@pytest.mark.parametrize(("said", "context"), [(262144, 65536), (65537, 65536), (65536, 65536), (65535, 65535)])
def test_the_context_ends_where_the_training_did_and_says_so(said: int, context: int) -> None:
    config = SambaYConfig.from_dict(PUBLISHED | {"max_position_embeddings": said})
    assert config.max_position_embeddings == context
    assert ("trained for no more" in config.context_note) == (context == TRAINED_CONTEXT)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor at full size, from the architecture rather than from the model."""
    D, E, F, N, R, Dh = 2560, 5120, 10240, 16, 160, 64
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (200064, D)}
    shapes |= {f"final_layernorm.{part}": (D,) for part in ("weight", "bias")}
    mamba: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * E, D), "conv1d.weight": (E, 1, 4), "conv1d.bias": (E,), "x_proj.weight": (R + 2 * N, E),
        "dt_proj.weight": (E, R), "dt_proj.bias": (E,), "A_log": (E, N), "D": (E,), "out_proj.weight": (D, E),
    }  # fmt: skip
    gated: dict[str, tuple[int, ...]] = {"in_proj.weight": (E, D), "out_proj.weight": (D, E)}
    inner = {f"inner_cross_attn.lambda_{name}": (Dh,) for name in ("q1", "k1", "q2", "k2")}
    for i in range(32):
        columns = D if i > 17 else 2 * D  # above the full attention, queries alone
        attention: dict[str, tuple[int, ...]] = {
            "Wqkv.weight": (columns, D), "Wqkv.bias": (columns,), "out_proj.weight": (D, D), "out_proj.bias": (D,),
            "inner_cross_attn.subln.weight": (2 * Dh,), **inner,
        }  # fmt: skip
        mixer = attention if i % 2 else mamba if i <= 16 else gated
        shapes |= {f"layers.{i}.attn.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"layers.{i}.mlp.fc1.weight": (2 * F, D), f"layers.{i}.mlp.fc2.weight": (D, F)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"layers.{i}.{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    return {f"model.{name}": shape for name, shape in shapes.items()}


def test_every_tensor_has_its_published_name_and_shape() -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = {name: tuple(array.shape) for name, array in tree_flatten(Model(CONFIG).parameters())}
    assert mx.get_peak_memory() - before < 2**20  # lazy: no weights are allocated
    assert found == expected_shapes()
    assert len(found) == 434
    sizes = {name: int(mx.prod(mx.array(shape, mx.int64)).item()) for name, shape in found.items()}
    assert sum(sizes.values()) == 3_852_562_944
    in_float32 = sum(size for name, size in sizes.items() if name.endswith("A_log") or "lambda_" in name)
    assert 2 * (3_852_562_944 + in_float32) == 7_706_608_640  # the total of the published index


def tiny(**fields: Any) -> dict[str, Any]:
    return sambay_config_dict(**fields)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (tiny(num_hidden_layers=4), "num_hidden_layers 4 must be a multiple of 4 from 8 on"),
        (tiny(num_hidden_layers=10), "num_hidden_layers 10 must be a multiple of 4 from 8 on"),
        (tiny(num_hidden_layers=31), "num_hidden_layers 31"),
        (tiny(num_hidden_layers=0), "num_hidden_layers must be a whole number from 1 to 1,000, not 0"),
        (tiny(num_hidden_layers=2**20), "num_hidden_layers must be a whole number from 1 to 1,000"),
        (tiny(sliding_window=0), "sliding_window must be a whole number from 1 to 16,777,216, not 0"),
        (tiny(sliding_window=-5), "sliding_window must be a whole number from 1 to 16,777,216, not -5"),
        (tiny(sliding_window=True), "sliding_window must be a whole number from 1 to 16,777,216, not True"),
        (tiny(sliding_window="512"), "sliding_window must be a whole number from 1 to 16,777,216, not '512'"),
        (tiny(sliding_window=1.5), "sliding_window"),
        (tiny(sliding_window=None), "sliding_window must be a whole number from 1 to 16,777,216, not None"),
        (tiny(sliding_window=[]), "sliding_window []"),
        (tiny(sliding_window=[None] * 8), "sliding_window [None, None"),
        (tiny(sliding_window=[16] * 8), "must have one size at the layers [1, 3] of 8, and null elsewhere"),
        (tiny(sliding_window=[None, 16, None, 17, None, None, None, None]), "must have one size"),
        (tiny(sliding_window=[None, 16, None, 16]), "must have one size"),
        (tiny(sliding_window=[None, 0, None, 0, *[None] * 4]), "sliding_window must be a whole number"),
        (tiny(sliding_window=[None, 10**5000, None, 16, *[None] * 4]), "number of thousands of digits"),
        (tiny(layer_types=["full_attention"] * 8), "layer_types"),
        (tiny(layer_types=["sliding_attention"] * 8), "'sliding_attention' at the layers [1, 3] of 8 alone"),
        (tiny(layer_types="sliding_attention"), "layer_types 'sliding_attention'"),
        (tiny(layer_types=[[], {}, None, 1, 2, 3, 4, 5]), "layer_types"),
        (tiny(num_key_value_heads=1), "num_key_value_heads 1 must be even"),
        (tiny(num_key_value_heads=3, num_attention_heads=6, hidden_size=66), "num_key_value_heads 3 must be even"),
        (tiny(num_key_value_heads=6), "num_attention_heads 8 a multiple of it"),
        (tiny(hidden_size=60), "hidden_size 60 is not a multiple of num_attention_heads 8"),
        (tiny(hidden_size=0), "hidden_size"),
        (tiny(vocab_size=None), "vocab_size must be a whole number"),
        (tiny(max_position_embeddings=None), "max_position_embeddings"),
        (tiny(mb_per_layer=3), "mb_per_layer = 3 is not supported; only 2 is"),
        (tiny(mamba_conv_bias=False), "mamba_conv_bias = False is not supported; only True is"),
        (tiny(mamba_proj_bias=True), "mamba_proj_bias = True"),
        (tiny(mlp_bias=True), "mlp_bias = True"),
        (tiny(lm_head_bias=True), "lm_head_bias = True"),
        (tiny(qk_norm=True), "qk_norm = True is not supported; only False is"),
        (tiny(quantize_activations=True), "quantize_activations = True"),
        (tiny(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0 is not supported; only None is"),
        (tiny(num_local_experts=16), "num_local_experts = 16"),
        (tiny(hidden_act=None), "hidden_act = None"),
        (tiny(hidden_act="gelu"), "hidden_act = 'gelu' is not supported; only 'silu' is"),
        (tiny(mamba_d_state=0), "mamba_d_state"),
        (tiny(mamba_d_conv=0), "mamba_d_conv"),
        (tiny(mamba_expand=1.5), "mamba_expand"),
        (tiny(mamba_expand=2**20), "mamba_expand must be a whole number from 1 to 262,144"),
        (tiny(mamba_dt_rank="all"), "mamba_dt_rank must be a whole number from 1 to 16,777,216, not 'all'"),
        (tiny(mamba_dt_rank=0), "mamba_dt_rank"),
        (tiny(layer_norm_eps=0), "layer_norm_eps must be a number above 0"),
        (tiny(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
        (tiny(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    ],
)
def test_bad_configs_are_refused_by_name(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: [^\n]*$") as caught:
        SambaYConfig.from_dict(raw)
    assert named in str(caught.value)
