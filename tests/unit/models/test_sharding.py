"""The shares of ranks on paper, and the bytes that they really read and hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import load_model, read_config, stored_tensors
from phi4_mlx.checkpoint_share import load_share, share_adapter
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.safetensors import TensorInfo
from phi4_mlx.models.sharding import check_share, choose_parallel, share_pieces, share_plan
from phi4_mlx.models.share import Parallel, Share, part_of
from phi4_mlx.models.text import Model
from tests.conftest import tiny_config_dict, write_tiny_checkpoint
from tests.presets import PRESETS
from tests.tiny_sambay import sambay_config_dict

WAYS: tuple[Parallel, ...] = ("tensor", "pipeline")


def infos_of(config: Any, bits: int | None = None) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint in bfloat16, or in `bits`, of a config; no weight is computed."""
    model = Model(config)
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, 64, bits)
    return {
        name: TensorInfo(name_of(array.dtype), tuple(array.shape), 0, 0)
        for name, array in tree_flatten(model.parameters())
    }


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("preset", ["phi-4-mini", "phi-4"])
def test_a_rank_of_two_holds_at_most_55_percent_of_a_published_model(
    preset: str, parallel: Parallel, bits: int | None
) -> None:
    config = PRESETS[preset]
    infos = infos_of(config, bits)
    check_share(config, parallel, 2, infos)
    (whole,) = share_plan(config, infos, "pipeline", 1)
    plan = share_plan(config, infos, parallel, 2)
    assert max(plan) <= 0.55 * whole
    if parallel == "pipeline":
        assert sum(plan) == whole


def test_ranks_of_a_pipeline_hold_about_as_much() -> None:
    config = PRESETS["phi-4-mini"]
    plan = share_plan(config, infos_of(config, 4), "pipeline", 8)
    assert max(plan[1:]) - min(plan[1:]) <= 0.03 * sum(plan)  # a block; the embedding is rank 0's
    assert plan[0] <= 0.19 * sum(plan)


@pytest.mark.parametrize(("preset", "sizes"), [("phi-4-mini", {2, 4, 8}), ("phi-4", {2, 5, 10})])
def test_published_models_split_by_their_heads(preset: str, sizes: set[int]) -> None:
    config, found = PRESETS[preset], set()
    infos = infos_of(config, 4)
    for size in range(2, 17):
        try:
            check_share(config, "tensor", size, infos)
            found.add(size)
        except RequestError:
            pass
    assert found == sizes


@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_hold_every_number_once(parallel: Parallel, size: int) -> None:
    """But for norms, which all ranks of tensor parallel have."""
    config = read_config(tiny_config_dict(num_attention_heads=12, num_key_value_heads=4, num_hidden_layers=5))
    infos = infos_of(config)
    held: dict[str, list[tuple[int, int]]] = {}
    for rank in range(size):
        for piece in share_pieces(config, Share(parallel, rank, size), infos).values():
            held.setdefault(piece.name, []).extend(piece.ranges or ((0, infos[piece.name].shape[0]),))
    assert held.keys() == infos.keys()
    for name, ranges in held.items():
        axis = int(parallel == "tensor" and name.endswith(("o_proj.weight", "down_proj.weight")))
        if not name.endswith("norm.weight"):
            covered = sorted(index for start, end in ranges for index in range(start, end))
            assert covered == [*range(infos[name].shape[axis])], name


def test_rows_are_dealt_in_whole_units() -> None:
    assert [part_of(500, rank, 4, 8) for rank in range(4)] == [(0, 120), (120, 248), (248, 376), (376, 500)]


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 2, "num_attention_heads to be a multiple of 2"),
        ({}, 3, "num_key_value_heads to be a multiple of 3, and this model has 2; use --parallel pipeline"),
        ({"num_key_value_heads": 1}, 2, "num_key_value_heads to be a multiple of 2, and this model has 1"),
        ({"intermediate_size": 161}, 2, "intermediate_size to be a multiple of 2, and this model has 161"),
        ({"vocab_size": 8}, 2, "its 8 ids make 1, fewer than 2 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(fields: dict[str, int], size: int, message: str) -> None:
    config = read_config(tiny_config_dict(**fields))
    with pytest.raises(RequestError, match=message):
        check_share(config, "tensor", size)
    assert choose_parallel(config, size, "jaccl")[0] == "pipeline"
    check_share(config, "pipeline", 2)


def test_groups_that_would_be_cut_are_refused_by_name() -> None:
    config = read_config(tiny_config_dict(hidden_size=192, intermediate_size=192))
    with pytest.raises(RequestError, match=r"o_proj between whole groups of its quantisation, and it has 3 in a row"):
        check_share(config, "tensor", 2, infos_of(config, 4))
    assert choose_parallel(config, 2, "jaccl", infos_of(config, 4))[0] == "pipeline"


def test_more_ranks_than_blocks_are_refused() -> None:
    with pytest.raises(RequestError, match="3 ranks cannot share 2 blocks; start at most 2"):
        check_share(read_config(tiny_config_dict()), "pipeline", 3)
    with pytest.raises(RequestError, match="6 ranks cannot share 8 blocks, the last 4 of which stay together"):
        check_share(read_config(sambay_config_dict()), "pipeline", 6)
    with pytest.raises(RequestError, match="is for decoders of model_type phi3, and this one is phi4flash"):
        check_share(read_config(sambay_config_dict()), "tensor", 2)


def test_the_way_is_chosen_with_a_reason() -> None:
    config = PRESETS["phi-4-mini"]
    assert choose_parallel(config, 2, "jaccl")[0] == "tensor"
    assert choose_parallel(config, 2, "ring")[0] == "pipeline"
    assert "ring" in choose_parallel(config, 2, "ring")[1]
    assert "num_attention_heads" in choose_parallel(config, 5, "jaccl")[1]


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a part of a file."""
    found: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        part = pread(descriptor, size, offset)
        found.append(len(part))
        return part

    monkeypatch.setattr(os, "pread", counting)
    return found


@pytest.mark.parametrize("parallel", WAYS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_and_holds_what_the_plan_says(
    tmp_path: Path, bytes_read: list[int], parallel: Parallel, rank: int
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=12, dtype=mx.bfloat16, shards=3)
    config = load_model(folder).config
    infos = stored_tensors(folder, config).infos
    model = load_share(folder, Share(parallel, rank, 2), mx.distributed.init())
    plan = share_plan(config, infos, parallel, 2)
    assert sum(bytes_read) == model.weights_bytes == plan[rank]
    assert plan[rank] <= 0.55 * load_model(folder).weights_bytes


class Place:
    """A group of two, as one rank sees it."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: 2)


@pytest.mark.parametrize("layer", ["model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj"])
def test_ranks_of_a_pipeline_agree_on_the_dtype_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4, dtype=mx.bfloat16)
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    mx.eval(weights)
    mx.save_safetensors(file, {n: w.astype(mx.float32) if n.startswith(layer) else w for n, w in weights.items()})
    crossed: list[mx.Dtype] = []

    def send(x: mx.array, to: int, group: Any) -> mx.array:
        crossed.append(x.dtype)
        return x

    def recv(shape: tuple[int, ...], dtype: mx.Dtype, source: int, group: Any) -> mx.array:
        crossed.append(dtype)
        return mx.zeros(shape, dtype)

    monkeypatch.setattr(mx.distributed, "send", send)
    monkeypatch.setattr(mx.distributed, "recv", recv)
    for rank in (0, 1):
        place: Any = Place(rank)
        model = load_share(folder, Share("pipeline", rank, 2), place)
        model.hidden(mx.array([[1, 2]]), model.make_cache())
    assert crossed == [mx.float32] * 4


def test_damage_is_reported_as_for_a_whole_model(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.1.input_layernorm.weight"][3] = mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm\.weight contains NaN or infinity"):
        load_share(folder, Share("pipeline", 1, 2), mx.distributed.init())
    del weights["model.norm.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):  # which this rank does not have
        load_share(folder, Share("pipeline", 1, 2), mx.distributed.init())


def test_an_adapter_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    from tests.adapters import adapted, save_adapter

    folder = write_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    other = load_model(write_tiny_checkpoint(tmp_path / "other", num_hidden_layers=5))
    adapted(other, num_layers=1)
    save_adapter(other, tmp_path / "adapter", {})
    for rank in range(2):
        share = load_share(folder, Share("pipeline", rank, 2), mx.distributed.init())
        with pytest.raises(CheckpointError, match="layers 0 to 3; the adapter is for another model"):
            share_adapter(share, tmp_path / "adapter")
