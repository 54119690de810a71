"""`python -m phi4_mlx.lora` in a terminal: progress within a step, Ctrl-C, and the commands that it advises."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.conftest import ROOT
from tests.e2e.server_process import HANG_S


@pytest.fixture
def options(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A tiny model and data in a folder whose name needs quotes."""
    folder = tmp_path / "my data"
    folder.mkdir()
    lines = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(20)]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        "--model", str(tiny_checkpoint()), "--data", "my data", "--adapter-path", "it's", "--max-seq-length", "64",
        "--learning-rate", "1e-3", "--lr-schedule", "constant", "--steps-per-eval", "1000", "--val-batches", "2",
    ]  # fmt: skip


def start(folder: Path, *words: str, columns: int = 100) -> pexpect.spawn:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    return pexpect.spawn(
        sys.executable, list(words), cwd=str(folder), env=environment, encoding="utf-8", timeout=HANG_S,
        dimensions=(24, columns),
    )  # fmt: skip


def end(child: pexpect.spawn) -> int | None:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def typed(command: str) -> list[str]:
    """The words of a command that was advised, as a shell reads them, after the name of Python."""
    python, *words = shlex.split(command)
    assert python == "python"
    return words


def test_a_run_is_stopped_and_made_longer_by_the_commands_that_it_advises(options: list[str], tmp_path: Path) -> None:
    child = start(tmp_path, "-m", "phi4_mlx.lora", *options, "--iters", "100000")
    child.expect(r"planning memory")
    child.expect(r"learning rate: constant at 0\.001")
    child.expect(r"step [\d,]+ of 100,000, +\d+%")
    child.sendintr()
    child.expect_exact("stopping after this step; Ctrl-C again ends the run at once, unsaved steps lost")
    child.expect(r"stopped at ([\d,]+) of 100,000; --resume goes on: (python -m phi4_mlx\.lora [^\r]+ --resume)\r\n")
    done, command = int(child.match[1].replace(",", "")), child.match[2]
    assert end(child) == 130 and done > 0
    assert child.before.rstrip().endswith("\x1b[2K") and "\x1b[?25h" in child.before  # no bar, and a cursor

    child = start(tmp_path, *typed(command), "--iters", str(done + 3))
    child.expect(rf"the run had 100,000 batches, and has {done + 3:,} now")
    child.expect(rf"from step {done:,} on")
    child.expect(r"learning rate: constant at 0\.001")
    child.expect(rf"step {done + 3:,}: loss")
    child.expect(r"chat with it: (python -m phi4_mlx [^\r]+)\r\n")
    chat = child.match[1]
    child.expect(r"make it a model of its own: (python -m phi4_mlx fuse [^\r]+)\r\n")
    fuse = child.match[1]
    assert end(child) == 0
    child = start(tmp_path, *typed(chat), "--prompt", "Say 3.", "--max-tokens", "5")
    assert end(child) == 0
    child = start(tmp_path, *typed(fuse), "--dequantize")
    child.expect(r"is not quantised; drop --dequantize")  # the tiny model is dense: the rest of the command was right
    assert end(child) == 2


def test_a_dry_run_advises_the_command_that_trains(options: list[str], tmp_path: Path) -> None:
    child = start(tmp_path, "-m", "phi4_mlx.lora", *options, "--dry-run", "--iters", "1")
    child.expect(r"train with: (python -m phi4_mlx\.lora [^\r]+)\r\n")
    command = child.match[1]
    assert end(child) == 0 and "--dry-run" not in command
    child = start(tmp_path, *typed(command))
    child.expect(r"step 1: loss")
    assert end(child) == 0


STUCK = """
import hashlib, sys
from phi4_mlx.lora.training import milestones
from phi4_mlx.lora.__main__ import main

evaluate = milestones.Milestones.evaluate
def stuck(self, results, grads, tick, before=0):
    tick(before, before + 0.5)
    if {where}:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # for many minutes, and no signal handler runs
    evaluate(self, results, grads, tick, before)
milestones.Milestones.evaluate = stuck
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("where", "shown", "answer"),
    [("grads", "step 1 of 9,", "stopping after this step; "),
     ("not grads", "validation batch 1 of 2,", "stopping after this validation; ")],
)  # fmt: skip
def test_a_computation_that_lasts_does_not_delay_the_answer(
    options: list[str], tmp_path: Path, where: str, shown: str, answer: str
) -> None:
    words = [*options, "--iters", "9", "--steps-per-eval", "1"]
    child = start(tmp_path, "-c", STUCK.format(where=where), *words)
    child.expect_exact(shown)
    child.sendintr()
    child.expect_exact(answer + "Ctrl-C again ends the run at once")
    child.expect_exact(shown)  # the bar is still there
    child.sendintr()
    assert end(child) == 130 and "\x1b[?25h" in child.before  # the cursor is shown again
    child = start(tmp_path, "-m", "phi4_mlx.lora", *options, "--iters", "1")
    child.expect(r"step 1: loss")  # nothing was left that would stand in the way
    assert end(child) == 0


LOADING = """
import hashlib, sys, time
from phi4_mlx.lora import run
from phi4_mlx.lora.__main__ import main

run.read_data = lambda *arguments: {wait}
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("wait", ["time.sleep(3600)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_it_stops_at_once(
    options: list[str], tmp_path: Path, number: signal.Signals, code: int, wait: str
) -> None:
    child = start(tmp_path, "-c", LOADING.format(wait=wait), *options)
    child.expect_exact("reading the data")
    child.kill(number)
    child.expect_exact("stopping: no step is under way, and nothing is lost")
    assert end(child) == code and "\x1b[?25h" in child.before
    assert not (tmp_path / "it's").exists() or "hashlib" in wait  # ended in a computation, it leaves its lock's file


def test_a_pipe_gets_lines_and_no_control_characters(options: list[str], tmp_path: Path) -> None:
    line = shlex.join([sys.executable, "-m", "phi4_mlx.lora", *options, "--iters", "40"])
    child = start(tmp_path, "-c", f"import subprocess; print(subprocess.run({line + ' 2>&1 | cat'!r}, shell=True))")
    code = end(child)
    assert code == 0 and "\x1b" not in child.before
    assert len(re.findall(r"step \d+: loss", child.before)) == 4  # each tenth
