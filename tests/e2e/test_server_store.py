"""A server with `--prompt-cache-dir`: what it has answered is found again after its end, orderly or not."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import Server, serving
from tests.e2e.test_server_snapshots import answer, body
from tests.tiny_sambay import write_tiny_sambay
from tests.waiting import until

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
SYSTEM = "You are a careful teller of numbers. " * 12


def asked(server: Server, model: str, **more: Any) -> tuple[str, int, int]:
    return answer(server.post(CHAT, body(system=SYSTEM) | {"model": model} | more))


def stored(server: Server) -> int:
    return int(server.metrics()["prefix_cache_disk_entries"])


@pytest.mark.parametrize("kind", ["demo", "tiny"])
def test_prompts_are_found_after_a_dead_engine_and_after_an_end(tmp_path: Path, kind: str) -> None:
    model = "demo" if kind == "demo" else str(write_tiny_sambay(tmp_path / "tiny", max_position_embeddings=65536))
    options = ("--model", model, "--prompt-cache-dir", str(tmp_path / "store"))
    with serving(*options) as server:
        said, length, cached = asked(server, kind)
        assert cached == 0 and any(f"; prompt caches in {tmp_path / 'store'}; " in line for line in server.lines)
        until(lambda: stored(server) > 0)  # within seconds, not at the end alone
        os.kill(server.engine, signal.SIGKILL)
        until(lambda: server.metrics().get("prefix_cache_disk_entries", 0) > 0)
        again = asked(server, kind)
        assert again[:2] == (said, length) and again[2] >= 0.85 * length
        assert server.metrics()["prefix_cache_disk_hits_total"] == 1
        longer = "And now something else. " * 6
        _, length_of_longer, _ = asked(server, kind, messages=body(longer, SYSTEM)["messages"])
    # Stopped at once after that answer: it was in memory alone.
    with serving(*options) as server:
        assert asked(server, kind) == (said, length, length - 1)
        _, _, cached = asked(server, kind, messages=body(longer, SYSTEM)["messages"])
        assert cached == length_of_longer - 1
        assert server.metrics()["prefix_cache_disk_failures_total"] == 0
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    files = list((tmp_path / "store").iterdir())
    assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert not [file for file in files if file.name.startswith(".")]


def test_a_disk_that_refuses_writes_costs_one_line(tmp_path: Path) -> None:
    """A limit of the size of files stands for a full disk: the error comes in the middle of a write as well."""
    more = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    with serving("--prompt-cache-dir", str(tmp_path / "store"), more=more) as server:
        first = asked(server, "demo")
        until(lambda: server.metrics()["prefix_cache_disk_failures_total"] == 1)
        assert asked(server, "demo") == (first[0], first[1], first[1] - 1)
        asked(server, "demo", messages=body("Another one.", SYSTEM)["messages"])
    lines = [line for line in server.lines if "cannot be written" in line]
    assert len(lines) == 1 and "File too large; 60 s without one" in lines[0], server.lines
    assert not list((tmp_path / "store").iterdir())
