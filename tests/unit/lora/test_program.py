"""The commands that come after a run: a shell reads them as they were meant, and a long one is not repeated."""

from __future__ import annotations

import shlex

from phi4_mlx.lora.program import LONGEST, Program
from phi4_mlx.lora.settings import Settings


def test_a_run_advises_what_comes_next() -> None:
    program, settings = Program(("--data", "my data", "--dry-run")), Settings(adapter_path="my ping/")
    assert shlex.split(program.to_train())[-3:] == ["lora", "--data", "my data"]
    assert shlex.split(program.to_resume())[-2:] == ["--dry-run", "--resume"]
    assert shlex.split(Program(("--resume",)).to_resume()).count("--resume") == 1
    assert program.to_chat(settings).endswith(" chat --adapter-path 'my ping/'")
    assert "--model mlx-community/Phi-4-mini-instruct-4bit" in program.to_fuse(settings)  # fuse has no default
    assert program.to_fuse(settings).endswith("--save-path 'my ping-fused'")


def test_a_long_command_is_not_repeated() -> None:
    assert Program(("--data", LONGEST * "x")).to_resume() == ""
    assert Program(("--data", LONGEST * "x", "--dry-run")).to_train().endswith("without --dry-run")
