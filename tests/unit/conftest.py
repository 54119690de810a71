"""A tiny model of every kind, for tests of what holds for all of them; copies of data sets for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data sets in the formats of the public ones, as `--data` takes it; their cache is their own."""
    from phi4_mlx.evaluation.lm_tasks import quieten
    from tests.data.evaluation import make

    quieten()
    import datasets

    folder = tmp_path_factory.mktemp("copies")
    make.main(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield folder
