"""Options that have no effect beside others are named on standard error, and only those."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from phi4_mlx.lora import __main__ as lora
from phi4_mlx.terminal import command
from phi4_mlx.terminal.command import Idle, Parser, idle_options

CUTS = "no effect at --temp 0, which takes the likeliest token"
LOCAL = "no effect on a folder or an embedded model; it selects a version of a Hugging Face id"


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("commands.generate", "--top-k 5", f"--top-k has {CUTS}"),
        ("commands.generate", "--top-k 5 --top-p 0.5 --seed 3", f"--top-p and --top-k have {CUTS}"),
        ("commands.generate", "--top-k 5 --temp 0.1", ""),
        ("commands.generate", "--seed 3 --top-p 1 --top-k 0 --temp 0", ""),
        (
            "commands.generate",
            "--chat-format x --ignore-chat-template",
            "--chat-format has no effect with --ignore-chat",
        ),
        ("commands.generate", "--chat-format x", ""),
        ("commands.generate", "--model demo --revision main", f"--revision has {LOCAL}"),
        ("commands.generate", "--model / --revision main", f"--revision has {LOCAL}"),
        ("commands.generate", "--model owner/name --revision main", ""),
        ("commands.generate", "--revision main", ""),
        ("chat.__main__", "--min-p 0.1", f"--min-p has {CUTS}"),
        ("chat.__main__", "--allow-tools", "--allow-tools has no effect without --tools or --mcp"),
        ("chat.__main__", "--allow-tools --mcp x", ""),
        ("chat.__main__", "--context-overflow oldest -p x", "--context-overflow has no effect with --prompt"),
        ("chat.__main__", "--context-overflow stop -p x", ""),
        ("chat.__main__", "--context-overflow oldest", ""),
        ("commands.cache_prompt", "--prompt-cache-file f --model demo --revision main", f"--revision has {LOCAL}"),
        ("commands.fuse", "--model demo --revision main", f"--revision has {LOCAL}"),
        ("convert.__main__", "--hf-path / --revision main", f"--revision has {LOCAL}"),
        ("server.__main__", "--model demo --revision main", f"--revision has {LOCAL}"),
        ("commands.benchmark", "--chat-format x", "--chat-format has no effect here: the prompts are random tokens"),
        ("commands.context", "--chat-format x", "--chat-format has no effect here: no prompt is run"),
        ("commands.context", "--json", ""),
    ],
)
def test_a_line_names_the_options_without_effect(
    module: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser: Parser = importlib.import_module(f"phi4_mlx.{module}")._parser()
    ran: list[argparse.Namespace] = []
    assert command.run(parser, ran.append, words.split()) == 0 and len(ran) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"{parser.prog}: {said}") for line in lines] == [True] * bool(said), lines


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        ("--beta 0.2", "", "--beta has no effect in --task sft"),
        ("--beta 0.2 --task dpo", "", ""),
        ("--rank 4 --fine-tune-type full", "", "--rank has no effect in --fine-tune-type full, which has no adapter"),
        ("--scale 4 --rank 4 --fine-tune-type full", "", "--rank and --scale have no effect in --fine-tune-type full"),
        ("--rank 4 --fine-tune-type dora", "", ""),
        ("--fine-tune-type full", "lora_parameters: {rank: 4}", ""),
        ("--test --rank 4", "", "--rank has no effect without --train"),
        ("--test-batches 3", "", "--test-batches has no effect without --test"),
        ("--optimizer adam --weight-decay 0.1", "", "--weight-decay has no effect with --optimizer adam"),
        ("", "beta: 0.2\ntest_batches: 3", ""),
        (
            "--learning-rate 0.1", "lr_schedule: {name: cosine_decay, arguments: [0.1, 100]}",
            "--learning-rate has no effect beside an lr_schedule",
        ),
        ("--test --iters 5 --resume", "", "--resume and --iters have no effect without --train: --test alone measures"),
        ("--test --iters 5 --train", "", ""),
        ("--test --test-batches 3 --seed 3", "iters: 5", ""),
        ("--iters 5 --batch-size 2", "", ""),
    ],
)  # fmt: skip
def test_options_of_training(
    words: str, file: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"model: demo\n{file}\n")
    args = lora._parser().parse_args([*words.split(), "--config", str(config)])
    lora._settings(args)
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(said) for line in lines] == [True] * bool(said), lines


def test_every_name_in_a_table_is_an_option() -> None:
    modules = (
        "chat.__main__", "commands.benchmark", "commands.cache_prompt", "commands.context", "commands.fuse",
        "commands.generate", "convert.__main__", "server.__main__",
    )  # fmt: skip
    for module in modules:
        parser: Parser = importlib.import_module(f"phi4_mlx.{module}")._parser()
        known = {action.dest for action in parser._actions}
        assert parser.idle and {name for idle in parser.idle for name in idle.names} <= known, module
    flags = {action.dest for action in lora._parser()._actions}
    assert {*lora._IDLE_IN_TEST.names} <= flags
    assert list(idle_options([Idle(("a", "b"), lambda _: True, "x")], {"b", "c"}, None)) == ["--b has no effect x"]


@pytest.mark.parametrize("module", ["chat.__main__", "commands.generate", "commands.cache_prompt"])
def test_help_says_that_standard_input_follows_the_prompt(module: str) -> None:
    parser: Parser = importlib.import_module(f"phi4_mlx.{module}")._parser()
    assert "text on standard input follows it, after an empty line; - " in " ".join(parser.format_help().split())
