"""Any JSON in any field of config.json: a config that survives a round trip, or an error in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from phi4_mlx.checkpoint import KINDS, read_config
from phi4_mlx.errors import ConfigError
from tests.conftest import tiny_config_dict
from tests.property.test_package_files import VALUES
from tests.tiny_multimodal import multimodal_config_dict
from tests.tiny_sambay import sambay_config_dict

WRITERS: dict[str, Callable[..., dict[str, Any]]] = {
    "phi3": tiny_config_dict,
    "phi4flash": sambay_config_dict,
    "phi4mm": lambda: multimodal_config_dict("original"),
    "phi4_multimodal": multimodal_config_dict,
}
ABSENT: dict[str, dict[str, Any]] = {  # fields that the tiny configs leave out
    "phi3": {"head_dim": None, "sliding_window": None, "attention_bias": False, "rope_parameters": None},
    "phi4flash": {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto", "mamba_conv_bias": True},
}
ABSENT["phi4flash"] |= {"layer_types": None, "mb_per_layer": 2, "mlp_bias": False}
ABSENT["phi4mm"] = ABSENT["phi4_multimodal"] = {"full_attn_mod": 1, "interpolate_factor": 1}
QUANTIZATION = {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"group_size": 32, "bits": 8}}
JUNK = [*VALUES, 4, 6, 8, 16, 2**24, 2**24 + 1, 10**5000, [10**5000], "auto", "sliding_attention", [None, 16] * 4]


def check(raw: dict[str, Any]) -> None:
    try:
        config = read_config(raw)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json: ") and len(str(error)) <= 1500
        return
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", KINDS)
def test_any_json_in_any_field_is_a_config_or_refused(kind: str) -> None:
    valid = WRITERS[kind]() | ABSENT[kind] | {"hidden_act": "silu", "quantization": QUANTIZATION}
    check(valid)
    for name in valid:
        check({key: value for key, value in valid.items() if key != name})
        for value in JUNK:
            check(valid | {name: value})
    for name in QUANTIZATION:
        for value in JUNK:
            check(valid | {"quantization": QUANTIZATION | {name: value}})
    draw = random.Random(1)
    for _ in range(2000):
        check(valid | {draw.choice([*valid]): draw.choice(JUNK) for _ in range(3)})
    for path in _inner(valid):
        for value in JUNK:
            check(_changed(valid, path, value))


def _inner(raw: dict[str, Any]) -> list[tuple[str, ...]]:
    """Paths of the fields within objects."""
    found: list[tuple[str, ...]] = []
    for name, value in raw.items():
        if isinstance(value, dict):
            found += [(name, inner) for inner in value] + [(name, *path) for path in _inner(value)]
    return found


def _changed(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    return raw | {head: _changed(raw[head], tuple(rest), value) if rest else value}
