"""`python -m phi4_mlx.lora`: fine-tunes a model on the user's data, with mlx-lm's flags."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from phi4_mlx.lora.program import Program
from phi4_mlx.lora.settings import FLAGS, SHAPE, LoraParameters, Option, Schedule, Settings
from phi4_mlx.terminal.command import Idle, Parser, idle_options, run, shown_default, text, typed

DRY_RUN_SAMPLES = 3
# mlx-lm's flags without effect here -> number of words that follow each
_WITHOUT_EFFECT = {"clear-cache-threshold": 1, "project-name": 1, "trust-remote-code": 0}


_MEASURED = (
    "model", "data", "adapter_path", "task", "beta", "batch_size", "max_seq_length", "packing", "mask_prompt", "test",
    "test_batches", "seed",
)  # fmt: skip
_TRAINS = tuple(name for name in ("resume", "resume_adapter_file", *FLAGS) if name not in _MEASURED)
_IDLE = (
    Idle(("beta",), lambda run: run.task == "sft", "in --task sft"),
    Idle(tuple(SHAPE), lambda run: run.fine_tune_type == "full", "in --fine-tune-type full, which has no adapter"),
    Idle(("test_batches",), lambda run: not run.test, "without --test"),
    Idle(("weight_decay",), lambda run: run.optimizer == "adam", "with --optimizer adam; adamw has weight decay"),
    Idle(
        ("learning_rate", "warmup"), lambda run: isinstance(run.lr_schedule, Schedule),
        "beside an lr_schedule with arguments, which names its own rates",
    ),
)  # fmt: skip
_IDLE_IN_TEST = Idle(_TRAINS, lambda run: True, "without --train: --test alone measures the adapter")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run(_parser(), functools.partial(_work, Program(tuple(words))), words)


def _parser() -> Parser:
    parser = Parser(typed("lora"), "Fine-tune a model on your own data; --dry-run shows some samples.")
    add = parser.add_argument
    add("--train", action="store_true", help="train (default: on, unless --test is given)")
    add(
        "-c", "--config", type=text, metavar="FILE",
        help="a YAML file with any of the options below, or mlx-lm's (default: none)",
    )  # fmt: skip
    add("--resume", action="store_true", help="resume from the newest checkpoint in --adapter-path")
    add("--dry-run", action="store_true", help="show three samples as the model will see them, and exit")
    for name, option in FLAGS.items():  # SUPPRESS: an absent flag must not override the file
        default = getattr(LoraParameters if name in SHAPE else Settings, name)
        shown = "" if default is None else f" (default: {shown_default(default)})"
        how: dict[str, Any] = {"help": option.help + shown, "default": argparse.SUPPRESS}
        if option.kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif option.known:
            how["choices"] = option.known
        else:
            how |= {"type": _kind(option), "metavar": name.split("_")[-1].upper()}
        add(f"--{name.replace('_', '-')}", **how)
    for name, words in _WITHOUT_EFFECT.items():
        more: dict[str, Any] = {} if words else {"action": "store_true"}
        add(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **more)
    return parser


def _kind(option: Option) -> Callable[[str], Any]:
    """The function with which argparse parses an option."""

    def parse(word: str) -> Any:
        try:
            return option.parsed(text(word))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word[:40]!r} is not {option.limits}") from None

    return parse


def _work(program: Program, args: argparse.Namespace) -> None:
    settings, train = _settings(args)

    from phi4_mlx.lora.run import measure_adapter, preview, start_run
    from phi4_mlx.lora.view import to_stderr

    if args.dry_run:
        for shown in preview(settings, DRY_RUN_SAMPLES):
            print(f"{shown}\n")
        to_stderr(program.to_train())
    elif train or not settings.test:
        start_run(settings, args.resume, to_stderr, program)
    else:
        measure_adapter(settings)


def _settings(args: argparse.Namespace) -> tuple[Settings, bool]:
    """(the settings, in which flags override the file; True if the file or --train asks for training)"""
    flags = {name: value for name, value in vars(args).items() if name in FLAGS}
    given: dict[str, Any] = {}
    messages = [f"--{name} has no effect here" for name in _WITHOUT_EFFECT if name.replace("-", "_") in vars(args)]
    if args.config:
        from phi4_mlx.lora.config_file import read_config_file

        given, from_file = read_config_file(args.config, flags.get("optimizer"))
        messages += from_file
        shape = given.get("lora_parameters")
        if isinstance(shape, dict):
            given["lora_parameters"] = {name: value for name, value in shape.items() if name not in flags}
    train = given.pop("train", None) or args.train
    settings = Settings.from_mapping(given | flags, args.config or "the command line")
    messages += idle_options(_IDLE, flags, settings)  # a file may serve several commands
    if settings.test and not (train or args.dry_run):
        messages += idle_options([_IDLE_IN_TEST], {*flags, *(["resume"] if args.resume else [])}, settings)
    for message in messages:
        print(message, file=sys.stderr)
    return settings, train


if __name__ == "__main__":
    raise SystemExit(main())
