"""Engines of the demo, and a scripted engine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.server.engine import process as process_module
from phi4_mlx.server.engine import supervisor as supervisor_module
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.settings import Settings
from tests.conftest import Demo
from tests.unit.server.engine.harness import MakeEngine
from tests.unit.server.engine.scripted import ENGINE

LIMIT_BYTES = 2**26  # of keys and values, and of the prefix cache


@pytest.fixture
def make_engine(demo: Demo) -> MakeEngine:
    """`make_engine(**settings)` -> an engine of the demo."""

    def make(**settings: Any) -> Engine:
        limits = {"kv_limit_bytes": LIMIT_BYTES, "prefix_limit_bytes": LIMIT_BYTES}
        return Engine(*demo, Settings("demo", **(limits | settings)))

    return make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scripted engine; its file `how` says how the engine starts."""
    name = f"scripted_engine_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(process_module.loop, "run", importlib.import_module(name).run)
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0, 0.01, 0.02))
    monkeypatch.setattr(supervisor_module, "RESTART_S", 0.0)
    monkeypatch.setattr(process_module, "TICK_S", 0.05)
    return tmp_path
