"""Exported dense folders against transformers: golden_export.npz, from make_golden_export.py.

In fp32 with logits of unit scale, on both sides of the LongRoPE boundary: maximum absolute difference 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.export.dense_folder import write_dense
from phi4_mlx.files.safetensors import read_header
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from tests.conformance import recipe_export as recipe

GOLDEN = np.load(Path(__file__).with_name("golden_export.npz"))
TOLERANCE = 1e-4


def differences(model: LanguageModel, case: str) -> list[float]:
    ids = mx.array(recipe.tokens(case)[None])
    found = {T: np.array(model(ids[:, :T]))[0, -recipe.ROWS :] for T in recipe.LENGTHS}
    return [float(np.abs(logits - GOLDEN[f"{case}/logits{T}"]).max()) for T, logits in found.items()]


@pytest.mark.parametrize("case", recipe.BASES)
def test_transformers_gives_the_logits_of_the_model_and_its_adapter(case: str, tmp_path: Path) -> None:
    """transformers computed the stored logits from folders equal to those written here."""
    source, adapter = recipe.write_source(case, tmp_path)
    write_dense(source, tmp_path / "out", adapter)
    model = load_model(resolve(source))
    if adapter:
        assert min(differences(model, case)) > 0.5
        load_adapter(model, adapter)
    assert max(differences(model, case)) < TOLERANCE
    assert max(differences(load_model(tmp_path / "out"), case)) < TOLERANCE
    assert (tmp_path / "out" / "config.json").read_text() == str(GOLDEN[f"{case}/config"])
    found = {name: [*info.shape] for name, info in read_header(tmp_path / "out" / "model.safetensors").items()}
    assert found == json.loads(str(GOLDEN[f"{case}/shapes"]))
