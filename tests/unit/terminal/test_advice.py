"""Commands that messages advise: a shell reads them as they were meant."""

from __future__ import annotations

import shlex

import pytest

from phi4_mlx.terminal.advice import command_line


@pytest.mark.parametrize("path", ["ping", "my adapter", "it's", 'a"b', "$HOME", "a;b", "~/x", "été", "a\\b", "*"])
def test_a_path_is_one_word_of_a_shell(path: str) -> None:
    assert shlex.split(command_line("chat", model="demo", adapter_path=path))[-2:] == ["--adapter-path", path]


def test_a_path_with_a_dash_stays_the_value_of_its_option_and_what_is_not_given_is_left_out() -> None:
    assert shlex.split(command_line("chat", model=None, adapter_path="-x"))[-1:] == ["--adapter-path=-x"]
    assert "--model" not in command_line("chat", model=None)
