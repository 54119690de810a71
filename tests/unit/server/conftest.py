"""A server in this process, shared by a module's tests."""

from __future__ import annotations

import pytest

from tests.unit.server.in_process import InProcessServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> InProcessServer:
    return InProcessServer(tmp_path_factory.mktemp("server"))
