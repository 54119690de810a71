"""Adapters that mlx-lm's own training writes, loaded with its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.folder import CONFIG_FILE
from phi4_mlx.errors import CheckpointError
from tests.conftest import TinyCheckpoint

# Past the boundary of LongRoPE, where mlx-lm's single table is the right one.
IDS = mx.random.randint(0, 512, (1, 70), key=mx.random.key(1))
ALL = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]

Train = Callable[..., tuple[Path, Path]]


@pytest.fixture
def trained(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Train:
    """`trained(base's config, **options of mlx_lm.lora)` -> (base, adapter folder) after three updates."""
    from mlx_lm.lora import CONFIG_DEFAULTS, run

    def train(config: dict[str, Any], quantize: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Path]:
        base = tiny_checkpoint("base", **config)
        if quantize is not None:
            from mlx_lm.convert import convert

            convert(str(base), str(tmp_path / "quantised"), quantize=True, q_group_size=32, **quantize)
            base = tmp_path / "quantised"
        (tmp_path / "data").mkdir()
        for split in ("train", "valid"):
            lines = [json.dumps({"text": f"the {split} line {n} of a few words"}) for n in range(4)]
            (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
        given = {
            "model": str(base), "train": True, "data": str(tmp_path / "data"),
            "adapter_path": str(tmp_path / "adapter"), "iters": 3, "batch_size": 2,
            "learning_rate": 2e-3, "max_seq_length": 64,
        }  # fmt: skip
        run(SimpleNamespace(**CONFIG_DEFAULTS | given | options))
        return base, tmp_path / "adapter"

    return train


def check(base: Path, adapter: Path) -> None:
    """Checks that both loaders compute the same logits, and not the base's."""
    from mlx_lm.utils import load_adapters, load_model

    theirs = load_adapters(load_model(base)[0], str(adapter)).eval()
    ours, _ = load(base, adapter_path=adapter)
    assert mx.abs(ours(IDS) - theirs(IDS)).max() < 1e-4
    assert mx.abs(ours(IDS) - load(base)[0](IDS)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [1, -1])
@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        ("lora", None),
        ("lora", {}),
        ("lora", {"quant_predicate": "mixed_3_6"}),
        ("lora", {"q_bits": 8}),
        ("dora", None),
        ("dora", {}),
        ("full", None),
    ],
)
def test_every_type_of_fine_tuning(trained: Train, num_layers: int, kind: str, quantize: dict[str, Any] | None) -> None:
    """It trains neither DoRA on 3 bits nor quantised weights."""
    check(*trained({}, quantize, fine_tune_type=kind, num_layers=num_layers))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "keys",
    [
        ALL,
        ["mlp.down_proj"],
        ["lm_head"],
        ["lm_head", "self_attn.o_proj"],
        ["model.layers.0.self_attn.o_proj"],
        ["model.layers.0.self_attn.o_proj", "mlp.down_proj"],
    ],
)
def test_keys_within_a_layer_and_whole_paths(trained: Train, kind: str, keys: list[str]) -> None:
    parameters = {"rank": 3, "scale": 7.5, "dropout": 0.25, "keys": keys}
    options = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    check(*trained({"tie_word_embeddings": False}, **options))


@pytest.mark.slow
def test_an_adapter_of_the_embedding_is_refused_by_name(trained: Train) -> None:
    parameters = {"rank": 3, "scale": 7.5, "dropout": 0.0, "keys": ["model.embed_tokens", "mlp.down_proj"]}
    base, adapter = trained({}, num_layers=2, lora_parameters=parameters)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens is an embedding, and only linear layers"):
        load(base, adapter_path=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["lora"], {}, None, 1, "qlora"])
def test_another_type_of_fine_tuning_is_refused_by_name(trained: Train, kind: Any) -> None:
    base, adapter = trained({}, num_layers=1)
    raw = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(raw | {"fine_tune_type": kind}))
    with pytest.raises(CheckpointError, match=r"fine_tune_type .* is not known; known are lora, dora, full"):
        load(base, adapter_path=adapter)
