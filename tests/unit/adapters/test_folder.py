"""Adapter folders: in the layout of mlx-lm and Swift, written whole or not at all, refused where they do not fit."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import load
from phi4_mlx.adapters.folder import CHECKSUMS_FILE, CONFIG_FILE, TENSORS_FILE, read_folder
from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter, load_adapter
from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error
from phi4_mlx.files.safetensors import read_header
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model
from tests.adapters import adapted, save_adapter
from tests.damage import flipped_bits, some_bytes

TinyModel = Callable[..., Model]
SHORT = mx.array([[5, 6, 7, 8]])
LONG = mx.random.randint(
    0, 512, (1, 90), key=mx.random.key(9)
)  # past the boundary, where mlx-lm's single table is right
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """An adapter of rank 4 for all linear layers of both blocks."""
    save_adapter(adapted(tiny_model()), tmp_path / "adapter", {})
    return tmp_path / "adapter"


def rewrite(folder: Path, tensors: dict[str, mx.array | None] | None = None, **config: Any) -> Path:
    """Changes an adapter: tensors by name, None to drop one; fields of its config, those of lora_parameters too."""
    path = folder / TENSORS_FILE
    kept = dict(mx.load(str(path)))
    mx.eval(kept)
    kept |= tensors or {}
    mx.save_safetensors(str(path), {name: array for name, array in kept.items() if array is not None})
    raw = json.loads((folder / CONFIG_FILE).read_text())
    for key, value in config.items():
        place = raw["lora_parameters"] if key in raw["lora_parameters"] else raw
        place.pop(key, None)
        if value is not None:
            place[key] = value
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    return folder


# --- writing ---


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_saved_adapter_is_loaded_unchanged(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    model = adapted(tiny_model(), kind, dropout=0.125)
    save_adapter(model, tmp_path / "deep" / "down", {})
    again = tiny_model()
    load_adapter(again, tmp_path / "deep" / "down")
    saved, loaded = adapter_parameters(model), adapter_parameters(again)
    assert saved.keys() == loaded.keys() == read_header(tmp_path / "deep" / "down" / TENSORS_FILE).keys()
    assert all(mx.array_equal(saved[name], loaded[name]) for name in saved)
    assert mx.array_equal(model(SHORT), again(SHORT))
    assert adapter_layers(again)[DOWN].dropout == 0.125


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_saved_as_half_precision(tiny_model: TinyModel, tmp_path: Path, dtype: mx.Dtype) -> None:
    model = adapted(tiny_model())
    model.set_dtype(dtype)
    save_adapter(model, tmp_path, {})
    load_adapter(tiny_model(), tmp_path)
    saved = mx.load(str(tmp_path / TENSORS_FILE))
    assert all(mx.array_equal(saved[name], array) for name, array in adapter_parameters(model).items())
    assert {array.dtype for array in saved.values()} == {dtype}


def test_the_config_is_the_one_that_mlx_lm_and_swift_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    """mlx-swift-lm requires fine_tune_type, num_layers (never -1), rank and scale; mlx-lm requires dropout too."""
    model = adapted(tiny_model(num_hidden_layers=3), num_layers=2, keys=Model.lora_keys[1:3])
    save_adapter(model, tmp_path, {"model": "some/model", "iters": 5, "num_layers": -1})
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.gate_up_proj", "self_attn.o_proj"]},
        "model": "some/model",
        "iters": 5,
    }
    assert type(config["num_layers"]) is type(config["lora_parameters"]["rank"]) is int
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, TENSORS_FILE, CHECKSUMS_FILE]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_reads_it_the_same_way(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, bits: int | None
) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base = tiny_checkpoint(max_position_embeddings=1024, num_hidden_layers=3)
    ours, _ = load(base)
    theirs, _ = load_model(base)
    for model in (ours, theirs):
        if bits:
            nn.quantize(model, group_size=32, bits=bits)
    save_adapter(adapted(ours, kind, num_layers=2, keys=Model.lora_keys[:3]), tmp_path / "a", {})
    without = theirs(LONG)
    load_adapters(theirs, str(tmp_path / "a"))
    assert mx.abs(ours(LONG) - theirs.eval()(LONG)).max() < 1e-4
    assert mx.abs(ours(LONG) - without).max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("num_layers", [1, 16, -1])
def test_what_mlx_lm_has_trained_is_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, num_layers: int
) -> None:
    """With its defaults: 16 layers although the model has fewer, -1 for all, and no keys."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    base = tiny_checkpoint(max_position_embeddings=1024)
    theirs, _ = load_model(base)
    theirs.freeze()
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    # Their command replaces -1 by the number of layers; the config keeps the -1.
    linear_to_lora_layers(theirs, 2 if num_layers == -1 else num_layers, parameters, use_dora=kind == "dora")
    random = iter(mx.random.split(mx.random.key(0), 100))
    for module in theirs.modules():
        if hasattr(module, "lora_b"):
            module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape, key=next(random))
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / TENSORS_FILE), dict(tree_flatten(theirs.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "seed": 0}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    ours, _ = load(base, adapter_path=folder)
    assert mx.abs(ours(LONG) - theirs.eval()(LONG)).max() < 1e-4
    assert len(adapter_layers(ours)) == (4 if num_layers == 1 else 8)


def test_full_fine_tuning_is_saved_in_such_a_folder_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    tuned = tiny_model(seed=1).unfreeze()
    tuned.model.embed_tokens.freeze()
    save_adapter(tuned, tmp_path / "full", {})
    assert "model.embed_tokens.weight" not in read_header(tmp_path / "full" / TENSORS_FILE)
    tuned.model.embed_tokens = tiny_model().model.embed_tokens
    ours, theirs, over = tiny_model(), tiny_model(), adapted(tiny_model())
    for model in (ours, over):
        load_adapter(model, tmp_path / "full")
        assert mx.array_equal(model(SHORT), tuned(SHORT))
    load_adapters(theirs, str(tmp_path / "full"))
    assert mx.array_equal(theirs(SHORT), tuned(SHORT))


def test_whole_weights_of_any_kind_are_loaded_again(any_model: Callable[..., LanguageModel], tmp_path: Path) -> None:
    """Biases and vectors too, each in its own dtype."""
    tuned, model = any_model(seed=1).unfreeze(), any_model()
    save_adapter(tuned, tmp_path, {})
    load_adapter(model, tmp_path)
    assert mx.array_equal(model(SHORT), tuned(SHORT))


def test_whole_weights_of_another_model_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_adapter(tiny_model(num_hidden_layers=3).unfreeze(), tmp_path, {})
    for model in (tiny_model(), adapted(tiny_model())):
        with pytest.raises(CheckpointError, match=r"layers\.2\..* is not a trainable tensor of this model"):
            load_adapter(model, tmp_path)
    save_adapter(tiny_model(vocab_size=600).unfreeze(), tmp_path, {})
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight has shape \[600, 96\], but in this model \[512, 96\]"
    ):
        load_adapter(tiny_model(), tmp_path)
    quantised = tiny_model()
    nn.quantize(quantised, group_size=32, bits=4)
    tensors = {"model.layers.0.mlp.down_proj.weight": mx.zeros(quantised.layers[0].mlp.down_proj.weight.shape)}
    scales = {"model.layers.0.mlp.down_proj.scales": mx.zeros(quantised.layers[0].mlp.down_proj.scales.shape)}
    (tmp_path / CHECKSUMS_FILE).unlink()
    for held in (tensors, scales):
        mx.save_safetensors(str(tmp_path / TENSORS_FILE), held)
        with pytest.raises(CheckpointError, match="is not a trainable tensor"):
            load_adapter(quantised, tmp_path)


# --- whole or not at all ---


@pytest.mark.parametrize("fault_at", range(1, 8))
def test_a_save_that_fails_leaves_the_old_adapter_whole(
    tiny_model: TinyModel, folder: Path, monkeypatch: pytest.MonkeyPatch, fault_at: int
) -> None:
    """A full disk is reported by a flush or a rename. New tensors beside the old config could be loaded by mistake."""
    before = {name: (folder / name).read_bytes() for name in (TENSORS_FILE, CONFIG_FILE)}
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fault_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    newer = adapted(tiny_model(), keys=Model.lora_keys, seed=5)
    with pytest.raises(OSError, match="No space"):
        save_adapter(newer, folder, {})
    lists = [CHECKSUMS_FILE] if fault_at <= 2 else []  # without one, the files are taken as they are
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSORS_FILE, *lists]
    assert (folder / TENSORS_FILE).read_bytes() == before[TENSORS_FILE]
    monkeypatch.undo()
    load_adapter(tiny_model(), folder)
    save_adapter(newer, folder, {})
    assert (folder / TENSORS_FILE).read_bytes() != before[TENSORS_FILE]


def test_what_a_killed_run_left_is_removed(tiny_model: TinyModel, folder: Path) -> None:
    (folder / f".{TENSORS_FILE}.999999999-0.partial").write_bytes(b"half a file")  # no process has this number
    save_adapter(adapted(tiny_model()), folder, {})
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSORS_FILE, CHECKSUMS_FILE]


# --- refusals ---


def test_a_file_cut_short_anywhere_is_refused(tiny_model: TinyModel, folder: Path) -> None:
    path = folder / TENSORS_FILE
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"adapters\.safetensors is damaged"):
            load_adapter(tiny_model(), folder)


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{DOWN}.lora_b": None}, {}, f"{DOWN} lacks lora_b"),
        ({f"{DOWN}.m": zeros(96)}, {}, f"{DOWN}.m is left over.* lora adapter has lora_a, lora_b"),
        ({"model.norm.weight": zeros(96)}, {}, r"model\.norm\.weight is left over"),
        ({"lora_a": zeros(96, 4)}, {}, "lora_a is left over"),
        ({f"{DOWN}.lora_b": zeros(3, 96)}, {}, r"lora_b \[3, 96\].*must be"),
        ({f"{DOWN}.lora_b": zeros(96)}, {}, r"lora_b \[96\].*must be"),
        ({f"{DOWN}.lora_a": zeros(161, 4)}, {}, r"lora_a \[161, 4\].*needs \[160, R\]"),
        ({f"{DOWN}.lora_b": zeros(4, 97)}, {}, r"lora_b \[4, 97\].*\[R, 96\]"),
        ({f"{DOWN}.lora_a": zeros(160, 5), f"{DOWN}.lora_b": zeros(5, 96)}, {}, "has rank 5.*rank is 4"),
        ({f"{DOWN}.lora_b": zeros(4, 96, dtype=mx.int32)}, {}, "lora_b has dtype I32"),
        ({f"{DOWN}.lora_b": zeros(4, 96) / 0}, {}, "lora_b contains NaN or inf"),
        ({"model.layers.2.mlp.down_proj.lora_a": zeros(160, 4), "model.layers.2.mlp.down_proj.lora_b": zeros(4, 96)},
         {}, r"layers\.2\.mlp\.down_proj is not a linear layer of this model, which has layers 0 to 1"),
        ({}, {"rank": 8}, r"layers\.0\.mlp\.down_proj has rank 4.*rank is 8"),
        ({}, {"num_layers": 1}, "num_layers is 1.*layers 1 to 1, but it has tensors for 0"),
        ({}, {"keys": ["mlp.down_proj"]}, r"gate_up_proj is not among the keys"),
        ({}, {"keys": "mlp.down_proj"}, "names of layers"),
        ({}, {"scale": None}, "scale None"),
        ({}, {"scale": True}, "scale True"),
        ({}, {"scale": float("nan")}, "scale nan"),
        ({}, {"dropout": 1.5}, r"dropout 1\.5"),
        ({}, {"lora_parameters": None}, "no lora_parameters"),
        ({}, {"fine_tune_type": "full"}, r"lora_a is not a trainable tensor of this model"),
        ({}, {"fine_tune_type": "loha"}, "'loha' is not known; known are lora, dora, full"),
        ({}, {"fine_tune_type": ["lora"]}, r"\['lora'\] is not known; known are lora, dora, full"),
        ({f"model.layers.{'1' * 6000}.x.lora_a": mx.ones((2, 4))}, {}, "lacks lora_b"),
        ({}, {"fine_tune_type": "dora"}, "lacks m"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tiny_model: TinyModel, folder: Path, tensors: dict[str, mx.array | None], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(tiny_model(), rewrite(folder, tensors, **config))
    assert "\n" not in str(caught.value)


def test_an_adapter_for_fewer_layers_than_the_model_has_is_refused(tiny_model: TinyModel, folder: Path) -> None:
    """All of its tensors have a place, but it was made for the last two layers, which are other ones here."""
    with pytest.raises(CheckpointError, match=r"num_layers is 2 .*has 3, so .*layers 1 to 2, but it has tensors for 0"):
        load_adapter(tiny_model(num_hidden_layers=3), folder)
    with pytest.raises(CheckpointError, match=r"num_layers is -1.*layers 0 to 2, but it has no tensors for 2"):
        load_adapter(tiny_model(num_hidden_layers=3), rewrite(folder, num_layers=-1))


def test_an_empty_file_is_not_an_adapter(tiny_model: TinyModel, folder: Path) -> None:
    mx.save_safetensors(str(folder / TENSORS_FILE), {})
    (folder / CHECKSUMS_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no tensors"):
        load_adapter(tiny_model(), folder)


def test_missing_files_are_named(tiny_model: TinyModel, folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    with pytest.raises(Phi4Error, match=r"adapters\.safetensors cannot be read: No such file"):
        load_adapter(tiny_model(), folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        load_adapter(tiny_model(), folder)
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        load_adapter(tiny_model(), folder)
    with pytest.raises(CheckpointError, match="nowhere holds no"):
        load_adapter(tiny_model(), tmp_path / "nowhere")


def test_every_flipped_bit_of_an_adapter_that_we_wrote_is_refused(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    model, draw = tiny_model(), random.Random(4)
    add_adapter(model, rank=2)
    save_adapter(model, tmp_path, {})
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["adapter_config.json", "adapters.safetensors", "adapters.sha256"]
    for file in files:
        for _ in flipped_bits(file, some_bytes(file, 100, draw), draw):
            with pytest.raises(Phi4Error) as refused:
                read_folder(tmp_path)
            assert "\n" not in str(refused.value)
    read_folder(tmp_path)


def test_an_adapter_that_was_edited_names_the_way_out(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny_model()
    add_adapter(model, rank=2, scale=2.0)
    save_adapter(model, tmp_path, {})
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"scale": 2.0', '"scale": 3.0'))
    with pytest.raises(CheckpointError, match=r"config.json is damaged or has been changed.*on purpose, remove"):
        read_folder(tmp_path)
    (tmp_path / "adapters.sha256").unlink()
    assert read_folder(tmp_path).scale == 3.0
