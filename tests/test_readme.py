"""The README's commands and snippets run as printed, on the embedded package, and print what it shows.

A block that cannot run here (a download, an install) has this line above it: `<!-- not run: reason -->`. A `text` block
is the standard output of the block before it, whole but for lines of three dots.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block of the README.

    Attributes:
        line: of its beginning.
        language: after its fence.
        text: inside it.
        why_not_run: the reason above it, or None.
        shown: the text block right after it, or None.
    """

    line: int
    language: str
    text: str
    why_not_run: str | None
    shown: str | None


def blocks() -> list[Block]:
    """All fenced blocks, in order."""
    readme = README.read_text(encoding="utf-8")
    found = list(FENCE.finditer(readme))
    shown = [
        after["text"] if after["language"] == "text" and not readme[m.end() : after.start()].strip() else None
        for m, after in pairwise(found)
    ]
    return [
        Block(readme[: m.start()].count("\n") + 1, m["language"], m["text"], m["why"], output)
        for m, output in zip(found, [*shown, None], strict=True)
    ]


SHELL = [block for block in blocks() if block.language == "sh" and not block.why_not_run]
MAKE = [block for block in SHELL if "make " in block.text]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, with this Python first on the path and the Hub offline."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(folder)
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def shows(shown: str, output: str) -> bool:
    """True if a text block is the output; a line of three dots in it stands for any lines."""
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in shown.splitlines())
    return re.fullmatch(pattern, output) is not None


def test_a_text_block_is_compared_whole() -> None:
    assert shows("a\n...\nb\n", "a\nx\ny\nb\n") and shows("...\nb\n", "b\n") and shows("a.\n", "a.\n")
    for other in ("ab\n", "a.\nb\n", "x\na.\n", "a.", ""):
        assert not shows("a.\n", other)


def test_every_block_names_its_language() -> None:
    assert blocks()
    assert {block.language for block in blocks()} <= {"sh", "python", "text", "json"}


def test_the_two_make_commands_at_the_top_exist() -> None:
    first = SHELL[0]
    assert first.line <= 5
    for line in first.text.splitlines():
        command = line.partition("#")[0].split()
        assert command[0] == "make"
        done = run(["make", "--dry-run", "-C", str(ROOT), *command[1:]], ROOT)
        assert done.returncode == 0, done.stderr
    assert "make chat" in first.text and "make test" in first.text


def marks(block: Block) -> list[pytest.MarkDecorator]:
    """`slow` for blocks that train or measure."""
    slow = "phi4_mlx.lora" in block.text or "phi4_mlx benchmark" in block.text
    return [pytest.mark.slow] if slow else []


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"line {b.line}", marks=marks(b)) for b in SHELL if b not in MAKE]
)
def test_shell_commands_run(block: Block, tmp_path: Path) -> None:
    done = run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert block.shown is None or shows(block.shown, done.stdout), done.stdout


@pytest.mark.slow
def test_python_snippets_run_in_order(tmp_path: Path) -> None:
    snippets = [block for block in blocks() if block.language == "python" and not block.why_not_run]
    assert snippets
    done = run([sys.executable, "-c", "\n".join(block.text for block in snippets)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert shows("".join(block.shown or "" for block in snippets), done.stdout), done.stdout
