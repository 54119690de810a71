"""A tiny model of every kind, for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.models.model import LanguageModel
from tests.kinds import MAKERS, WRITERS


@pytest.fixture(params=MAKERS)
def any_model(request: pytest.FixtureRequest) -> Callable[..., LanguageModel]:
    """`any_model(seed=0, **config)` -> a model of each kind."""
    return MAKERS[request.param]


@pytest.fixture(params=WRITERS)
def any_checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """`any_checkpoint(name="tiny", seed=0, **config)` -> the folder of a model of each kind."""

    def write(name: str = "tiny", **options: Any) -> Path:
        return WRITERS[request.param](tmp_path / name, **options)

    return write
