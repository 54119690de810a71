"""Engines of the demo."""

from __future__ import annotations

from typing import Any

import pytest

from phi4_mlx.server.engine.engine import Engine, Settings
from tests.conftest import Demo
from tests.unit.server.engine.harness import MakeEngine

LIMIT_BYTES = 2**26  # of keys and values, and of the prefix cache


@pytest.fixture
def make_engine(demo: Demo) -> MakeEngine:
    """`make_engine(**settings)` -> an engine of the demo."""

    def make(**settings: Any) -> Engine:
        limits = {"kv_limit_bytes": LIMIT_BYTES, "prefix_limit_bytes": LIMIT_BYTES}
        return Engine(*demo, Settings("demo", **(limits | settings)))

    return make
