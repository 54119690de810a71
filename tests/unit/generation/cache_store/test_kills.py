"""Writers killed at random moments leave no file that can be read by half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_no_file_is_torn_and_the_limit_holds_after_kills(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.store_kills", str(tmp_path / "s"), str(kills)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["torn"] == [] and 0 < result["largest"] <= result["limit"]
    assert kills < 50 or result["left_half_written"] > 0  # some of them were killed in the middle of a file
