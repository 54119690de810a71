"""Adapters against Hugging Face's PEFT, in both directions: golden_peft.npz and peft/, from make_golden_peft.py.

In fp32 with logits of unit scale, on both sides of the LongRoPE boundary: maximum absolute difference 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter, load_adapter
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.lora.export import from_peft, to_peft
from phi4_mlx.models.text import Model
from tests.adapters import save_adapter
from tests.conformance import recipe
from tests.conformance import recipe_adapters as adapters

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden_peft.npz")
TOLERANCE = 1e-4


def base() -> Model:
    model = Model(ModelConfig.from_dict(recipe.config(adapters.BASE)))
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    weights = recipe.weights(adapters.BASE, shapes)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return model.eval()


def differences(model: Model, case: str) -> list[float]:
    ids = mx.array(recipe.tokens(adapters.BASE)[None])
    return [float(np.abs(np.array(model(ids[:, :T]))[0] - GOLDEN[f"{case}/logits{T}"]).max()) for T in adapters.LENGTHS]


def made_here(case: str) -> Model:
    """The base with an adapter of `OURS`."""
    model = base()
    add_adapter(model, **adapters.OURS[case])
    made = adapters.tensors(case, {name: tuple(a.shape) for name, a in adapter_parameters(model).items()})
    for path, layer in adapter_layers(model).items():
        layer.update({name.rpartition(".")[2]: mx.array(a) for name, a in made.items() if name.startswith(path)})
    return model.eval()


@pytest.mark.parametrize("case", adapters.THEIRS)
def test_an_adapter_saved_by_peft_gives_the_same_logits_here(case: str, tmp_path: Path) -> None:
    direct, imported = base(), base()
    assert min(differences(direct, case)) > 0.5
    load_adapter(direct, HERE / "peft" / case)
    assert max(differences(direct, case)) < TOLERANCE
    (tmp_path / "config.json").write_text(json.dumps(recipe.config(adapters.BASE)))
    from_peft(HERE / "peft" / case, tmp_path / "imported", tmp_path)
    load_adapter(imported, tmp_path / "imported")
    assert max(differences(imported, case)) < TOLERANCE
    save_adapter(imported, tmp_path / "again", {})
    load_adapter(imported, tmp_path / "again")
    assert max(differences(imported, case)) < TOLERANCE


@pytest.mark.parametrize("case", adapters.OURS)
def test_an_exported_adapter_gives_the_same_logits_in_peft(case: str, tmp_path: Path) -> None:
    """PEFT computed the stored logits from files equal to those written here."""
    model = made_here(case)
    assert max(differences(model, case)) < TOLERANCE
    assert min(differences(base(), case)) > 0.5
    save_adapter(model, tmp_path / "adapter", {})
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    files = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    for name, data in files.items():
        assert data == GOLDEN[f"{case}/{name}"].tobytes(), name


@pytest.mark.parametrize("case", adapters.THEIRS)
def test_import_then_export_keeps_the_tensors(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(recipe.config(adapters.BASE)))
    from_peft(HERE / "peft" / case, tmp_path / "ours", tmp_path)
    to_peft(tmp_path / "ours", tmp_path / "theirs")
    before = mx.load(str(HERE / "peft" / case / "adapter_model.safetensors"))
    after = mx.load(str(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    model = base()
    load_adapter(model, tmp_path / "theirs")
    assert max(differences(model, case)) < TOLERANCE
