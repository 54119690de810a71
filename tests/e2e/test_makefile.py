"""`make` in a checkout: the environment is made with one line of progress, and a failure of pip is shown whole.

A stand-in for pip prints a hundred lines, so that no test installs anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pexpect
import pytest

from tests.conftest import ROOT

PIP = """
import os, sys, time
for n in range(100):
    print(f"Downloading package_{n}-1.0-py3-none-any.whl ({n} MB)", flush=True)
if os.environ.get("PIP_WAITS"):
    time.sleep(60)
if os.environ.get("PIP_FAILS"):
    sys.exit("ERROR: no space left on device")
"""
STAMP = ".venv/runtime.stamp"
HINT = "source .venv/bin/activate"


# Not as a part of the `make test` that may run these tests.
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an environment whose pip is the stand-in; nothing is installed yet."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False)
    (packages,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(PIP)
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words], cwd=folder, env=OUTSIDE | environment, capture_output=True, text=True, timeout=120
    )


def test_a_first_run_prints_two_lines_to_standard_error(checkout: Path) -> None:
    done = make(checkout, STAMP, PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (0, "")
    first, last = done.stderr.splitlines()
    assert first.startswith("Installing into .venv, once") and HINT in last
    assert HINT in (ROOT / "README.md").read_text()
    again = make(checkout, STAMP)
    assert again.stderr == "" and "up to date" in again.stdout


def test_a_terminal_shows_one_line_that_changes_in_place(checkout: Path) -> None:
    seen, status = pexpect.run(
        f"make {STAMP} PYTHON={sys.executable}", cwd=str(checkout), env=OUTSIDE | {"TERM": "xterm"}, timeout=120,
        withexitstatus=True, encoding="utf-8",
    )  # fmt: skip
    assert status == 0
    assert "\r\x1b[KInstalling into .venv, once: Downloading package_99-1.0 (99 MB)" in seen
    rows = [row.rpartition("\r\x1b[K")[2] for row in seen.replace("\r\n", "\n").split("\n")]
    assert len(rows) == 2 and HINT in rows[0] and not rows[1]


@pytest.mark.parametrize("target", [STAMP, ".venv/dev.stamp"])
def test_a_failure_shows_all_that_pip_printed(target: str, checkout: Path) -> None:
    if target != STAMP:
        (checkout / STAMP).touch()
    done = make(checkout, target, PYTHON=sys.executable, PIP_FAILS="1")
    assert done.returncode == 2
    assert done.stderr.count("Downloading package_") == 100
    assert "ERROR: no space left on device\nmake: not installed, for the reason above" in done.stderr
    assert not (checkout / target).exists() and HINT not in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_it_with_a_line(checkout: Path) -> None:
    child = pexpect.spawn(
        "make", [STAMP, f"PYTHON={sys.executable}"], cwd=str(checkout), timeout=60, encoding="utf-8",
        env=OUTSIDE | {"TERM": "xterm", "PIP_WAITS": "1"},
    )  # fmt: skip
    child.expect(re.escape("package_99"))
    child.sendintr()
    child.expect("stopped; the next make goes on")
    child.expect(pexpect.EOF)
    assert "Traceback" not in child.before
    assert not (checkout / STAMP).exists()
    child.close()


def test_without_a_python_it_says_how_to_get_one(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh", "test", "rm"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = make(checkout, STAMP, PATH=str(tools))
    assert done.returncode == 2
    assert "no Python 3.10 or newer" in done.stderr and "make PYTHON=" in done.stderr
