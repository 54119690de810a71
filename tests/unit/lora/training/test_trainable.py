"""The parameters that a run trains."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_flatten

from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.trainable import make_trainable
from tests.conformance.recipe_multimodal import EXTEND
from tests.tiny_multimodal import make_tiny_multimodal


@pytest.mark.parametrize("options", [{"num_layers": -1}, {"num_layers": 1}])
def test_full_fine_tuning_on_text_leaves_the_towers_as_they_are(options: dict[str, Any]) -> None:
    model = make_tiny_multimodal()
    make_trainable(model, Settings(model="any", data="any", fine_tune_type="full", **options))
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained and not any(name.startswith(EXTEND) for name in trained)
    assert ("model.embed_tokens.weight" in trained) == (options["num_layers"] == -1)
