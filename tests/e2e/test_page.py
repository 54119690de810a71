"""The chat page in a real browser: its policy lets its own script run, and the script finds the server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server_process import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000",
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def browse(server: Server, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [str(CHROMIUM), *QUIET, f"--user-data-dir={folder}", *options, server.url]
    return subprocess.run(words, capture_output=True, text=True, timeout=90)


def test_the_page_runs_under_its_policy_and_shows_the_model(server: Server, tmp_path: Path) -> None:
    done = browse(server, tmp_path, "--enable-logging=stderr", "--dump-dom")
    assert 'id="model-name"' in done.stdout and ">demo<" in done.stdout  # written by the script, from /v1/models
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr


def test_the_page_can_be_looked_at_on_a_phone(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "phone.png"
    browse(server, tmp_path / "profile", f"--screenshot={picture}", "--window-size=500,844")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
