"""Commands that messages advise: a shell reads them as they were meant."""

from __future__ import annotations

import shlex

import pytest

from phi4_mlx.lora.program import LONGEST, Program
from phi4_mlx.lora.settings import Settings
from phi4_mlx.terminal.advice import command_line


@pytest.mark.parametrize("path", ["ping", "my adapter", "it's", 'a"b', "$HOME", "a;b", "~/x", "été", "a\\b", "*"])
def test_a_path_is_one_word_of_a_shell(path: str) -> None:
    assert shlex.split(command_line("chat", model="demo", adapter_path=path))[-2:] == ["--adapter-path", path]


def test_a_path_with_a_dash_stays_the_value_of_its_option_and_what_is_not_given_is_left_out() -> None:
    assert shlex.split(command_line("chat", model=None, adapter_path="-x"))[-1:] == ["--adapter-path=-x"]
    assert "--model" not in command_line("chat", model=None)


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
