"""Models that ranks hold together are those of one process: answers, bytes and exchanges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from phi4_mlx.adapters.layers import load_adapter, read_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.split_logits import LEAST
from tests.adapters import adapted, save_adapter, train_a_little
from tests.conftest import write_tiny_checkpoint
from tests.local_ranks import run_ranks
from tests.rank_runs import answers
from tests.tiny_multimodal import write_tiny_multimodal
from tests.tiny_sambay import write_tiny_sambay

SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
LAYERS = 2
RUN: dict[str, Any] = {"tokens": 64, "batch": [None] * 8}
SAMPLING = [
    {"temp": 1.0, "seed": 3},
    {"temp": 0.7, "top_p": 0.8, "seed": 4},
    {"temp": 1.2, "top_k": 9, "min_p": 0.05, "seed": 5},
    {"temp": 0.9, "top_p": 0.95, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {9: 4}, "seed": 6},
]


def write_quantized(folder: Path, source: Path, mixed: bool = False, **scheme: Any) -> Path:
    """Quantises the checkpoint at `source`; with `mixed`, some layers in 8 bits."""
    folder.mkdir()
    model = load_model(source)
    raw = json.loads((source / "config.json").read_text())
    scheme = {"group_size": 32, "bits": 4, **scheme}
    wide = {"group_size": 64, "bits": 8}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return hasattr(module, "to_quantized") and (wide if mixed and "layers.1." in path else scheme)

    nn.quantize(model, class_predicate=settings)
    paths = {path for path, module in model.named_modules() if hasattr(module, "bits")}
    raw["quantization"] = {**scheme, **{path: wide for path in paths if mixed and "layers.1." in path}}
    (folder / "config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def write_adapter(folder: Path, model_folder: Path, kind: str, seed: int, **options: Any) -> Path:
    """A trained adapter of a model."""
    model = load_model(model_folder)
    adapted(model, kind, seed, **options)
    train_a_little(model, seed)
    save_adapter(model, folder, {})
    return folder


def write_full(folder: Path, model_folder: Path) -> Path:
    """A fully fine-tuned model's weights, as training writes them."""
    model = load_model(model_folder)
    model.update(tree_map(lambda array: array * 1.05, model.parameters()))
    model.unfreeze()
    save_adapter(model, folder, {})
    return folder


def on_ranks(folder: Path, runs: dict[str, dict[str, Any]], size: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank found."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(runs))
    run_ranks(folder, "tests.rank_runs", str(plan), size=size)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]
    return {case: [rank[case] for rank in ranks] for case in runs}


def alone(run: dict[str, Any]) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a case in this process, and its answers."""
    model = load_model(Path(run["folder"]))
    if "adapter" in run:
        load_adapter(model, Path(run["adapter"]))
    for name, path in run.get("adapters", {}).items():
        assert model.adapters is not None
        model.adapters.add(name, read_adapter(Path(path)))
    return model, answers(model, run)


def check_equal(run: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Checks that rank 0 found what this process finds, and with tensor parallel all ranks the same."""
    _, expected = alone(run)
    for name, value in expected.items():
        if name == "logits":
            assert np.abs(np.array(ranks[0]["logits"]) - np.array(value)).max() < 1e-4
        else:
            assert ranks[0][name] == value, name
    if run["parallel"] == "tensor":
        for rank in ranks[1:]:
            assert {name: rank[name] for name in expected} == {name: ranks[0][name] for name in expected}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    tiny = write_tiny_checkpoint(folder / "tiny", **SHAPE, vocab_size=500)
    untied = write_tiny_checkpoint(folder / "untied", seed=1, shards=2, tie_word_embeddings=False)
    four = write_quantized(folder / "four", tiny)
    mixed = write_quantized(folder / "mixed", tiny, mixed=True, bits=3)
    nvfp4 = write_quantized(folder / "nvfp4", tiny, mode="nvfp4", group_size=16)
    flash = write_tiny_sambay(folder / "flash")
    multimodal = write_tiny_multimodal(folder / "multimodal")
    mxfp4 = write_quantized(folder / "mxfp4", tiny, mode="mxfp4")
    lora = write_adapter(folder / "lora", tiny, "lora", 1)
    dora = write_adapter(folder / "dora", tiny, "dora", 2)
    full = write_full(folder / "full", tiny)
    short = {"tokens": 8}
    return {
        "tensor": {**RUN, "folder": str(tiny), "parallel": "tensor", "exchanges": True},
        "tensor, 4 bits": {**RUN, "folder": str(four), "parallel": "tensor"},
        "tensor, mixed bits": {**short, "folder": str(mixed), "parallel": "tensor"},
        "tensor, nvfp4": {**short, "folder": str(nvfp4), "parallel": "tensor"},
        "tensor, untied": {**short, "folder": str(untied), "parallel": "tensor"},
        "tensor, sampled": {"folder": str(tiny), "parallel": "tensor", "sampling": SAMPLING},
        "tensor, masked": {"folder": str(tiny), "parallel": "tensor", "sampling": SAMPLING[1:3], "masked": True},
        "tensor, LoRA": {**short, "folder": str(four), "parallel": "tensor", "adapter": str(lora)},
        "tensor, DoRA": {**short, "folder": str(tiny), "parallel": "tensor", "adapter": str(dora)},
        "tensor, full": {**short, "folder": str(tiny), "parallel": "tensor", "adapter": str(full)},
        "tensor, named adapters": {
            "folder": str(tiny), "parallel": "tensor", "adapters": {"one": str(lora), "two": str(dora)},
            "batch": [None, "one", "two", "one"],
        },
        "pipeline": {**RUN, "folder": str(tiny), "parallel": "pipeline", "exchanges": True},
        "pipeline, 4 bits": {**RUN, "folder": str(four), "parallel": "pipeline"},
        "pipeline, mxfp4": {**short, "folder": str(mxfp4), "parallel": "pipeline"},
        "pipeline, flash": {**short, "batch": [None] * 3, "folder": str(flash), "parallel": "pipeline"},
        "pipeline, multimodal": {**short, "picture": True, "folder": str(multimodal), "parallel": "pipeline"},
        "pipeline, untied": {**short, "folder": str(untied), "parallel": "pipeline"},
        "pipeline, LoRA": {**short, "folder": str(four), "parallel": "pipeline", "adapter": str(lora)},
        "pipeline, full": {**short, "folder": str(tiny), "parallel": "pipeline", "adapter": str(full)},
        "pipeline, named adapters": {
            "folder": str(tiny), "parallel": "pipeline", "adapters": {"one": str(lora), "two": str(dora)},
            "batch": [None, "one", "two", "one"],
        },
    }  # fmt: skip


@pytest.mark.slow
def test_two_ranks_answer_as_one_process_does(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    found = on_ranks(folder, runs)
    failures = {}
    for case, run in runs.items():
        try:
            check_equal(run, found[case])
        except AssertionError as error:
            failures[case] = str(error)[:300]
    assert not failures
    sums, gathered = found["tensor"][0]["exchanges"], 2 * (2 * LEAST + 2) * 4  # of two ranks
    assert (sums.pop("all_sum"), sums.pop("all_gather"), sums.pop("all_gather bytes")) == (2 * LAYERS + 1, 1, gathered)
    assert sums == {"all_sum bytes": (2 * LAYERS + 1) * 4 * SHAPE["hidden_size"]}
    for rank in found["pipeline"]:
        width = 4 * SHAPE["hidden_size"]
        assert rank["exchanges"] == {"send": 1, "send bytes": width, "recv": 1, "recv bytes": width}
