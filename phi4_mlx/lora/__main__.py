"""`python -m phi4_mlx.lora`: fine-tunes a model on a person's own data, under mlx-lm's flags."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.command import Parser, number, run, text, utf8
from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    from phi4_mlx.lora.batches import Batches
    from phi4_mlx.lora.settings import Settings
    from phi4_mlx.lora.trainer import Loss, Step, Trainer
    from phi4_mlx.models.text import Model
    from phi4_mlx.tokenizer import Tokenizer

DRY_RUN_SAMPLES = 3
WHOLE, REAL = number(int, 0, 10**9), number(float, 0.0, 1e9)

# flag, type or choices, help; a flag that is not given leaves the file's value, or the default, as it is
OPTIONS: list[tuple[str, Any, str]] = [
    ("model", text, "a folder, a Hugging Face id, or demo"),
    ("data", text, "a folder with train.jsonl and perhaps valid.jsonl, one file, or a dataset's Hugging Face id"),
    ("adapter-path", text, "where the adapter, checkpoints and metrics go"),
    ("resume-adapter-file", text, "an adapter to begin with: its folder, or its adapters.safetensors"),
    ("task", ["sft", "dpo", "orpo"], "what is learned: answers, or preferences between two"),
    ("fine-tune-type", ["lora", "dora", "full"], "what is trained"),
    ("num-layers", number(int, -1, 10**6), "blocks with an adapter, from the last; -1 for all"),
    ("iters", WHOLE, "optimizer steps"),
    ("batch-size", WHOLE, "rows in a batch"),
    ("grad-accumulation-steps", WHOLE, "batches in a step"),
    ("max-seq-length", WHOLE, "tokens in a row"),
    ("optimizer", ["adamw", "adafactor"], "adafactor takes less memory"),
    ("learning-rate", REAL, "at its highest"),
    ("lr-schedule", ["cosine", "constant"], "what it does after the warm-up"),
    ("warmup", WHOLE, "steps over which it rises"),
    ("weight-decay", REAL, "of AdamW"),
    ("clip", REAL, "largest norm of the gradient; 0 for no limit"),
    ("beta", REAL, "how far DPO may go from the base; the weight of ORPO's preference"),
    ("steps-per-report", WHOLE, "steps between two lines, where there is no progress bar"),
    ("report-to", ["wandb", "tensorboard"], "where the metrics also go, if it is installed"),
    ("steps-per-eval", WHOLE, "steps between two validations"),
    ("val-batches", number(int, -1, 10**9), "batches in a validation; -1 for all"),
    ("patience", WHOLE, "validations without a better loss after which training stops; 0 never stops"),
    ("save-every", WHOLE, "steps between two checkpoints"),
    ("keep-checkpoints", WHOLE, "how many of the newest stay"),
    ("seed", WHOLE, "of the order, the adapter and dropout"),
]
SWITCHES = [
    ("mask-prompt", "learn the answers alone"),
    ("grad-checkpoint", "keep less for backward and compute it again: less memory, more time"),
    ("packing", "several samples in a row (on by default)"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _work, argv)


def _parser() -> Parser:
    parser = Parser("phi4-mlx lora", "Fine-tune a model on your own data; --dry-run shows what it would see.")
    parser.add_argument("--train", action="store_true", help="train (what the command does anyway; mlx-lm's flag)")
    parser.add_argument("-c", "--config", type=text, metavar="FILE", help="a YAML file with any of the options below")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --adapter-path")
    parser.add_argument(
        "--dry-run", action="store_true", help="show three samples as the model will see them, and leave"
    )
    for name, kind, explanation in OPTIONS:
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": name.split("-")[-1].upper()}
        parser.add_argument(f"--{name}", help=explanation, default=argparse.SUPPRESS, **how)
    for name, explanation in SWITCHES:
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, help=explanation, default=argparse.SUPPRESS
        )
    return parser


def _work(args: argparse.Namespace) -> None:
    settings = _settings(args)

    import mlx.core as mx

    from phi4_mlx.checkpoint import DEFAULT_MODEL, load
    from phi4_mlx.lora.data import show

    group = mx.distributed.init()
    model, tokenizer = load(settings.model or DEFAULT_MODEL)
    samples, validation = _data(settings, tokenizer, told=group.rank() == 0)
    if args.dry_run:
        for sample in samples[:DRY_RUN_SAMPLES]:
            for each in (sample,) if hasattr(sample, "ids") else (sample.chosen, sample.rejected):
                print(f"{show(each, tokenizer)}\n")
        return
    _train(model, settings, samples, validation, group, args.resume)


def _settings(args: argparse.Namespace) -> Settings:
    from phi4_mlx.lora.settings import Settings

    given: dict[str, Any] = {}
    if args.config:
        import yaml

        try:
            given = yaml.safe_load(utf8(Path(args.config).read_bytes(), args.config)) or {}
        except yaml.YAMLError as error:
            raise RequestError(f"{args.config} is not YAML: {' '.join(str(error).split())}") from None
        if isinstance(given, dict):
            given.pop("train", None)
    if isinstance(given, dict):
        named = {each.name for each in fields(Settings)}
        given |= {name: value for name, value in vars(args).items() if name in named}
    return Settings.from_mapping(given, args.config or "the command line")


def _data(settings: Settings, tokenizer: Tokenizer, told: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Samples, or pairs, to train on and to validate with; tells what they came to."""
    from phi4_mlx.lora.data import load_pairs, load_samples

    read: Any = load_pairs
    if settings.task == "sft":
        read = functools.partial(load_samples, mask_prompt=settings.mask_prompt)
    found: list[Sequence[Any]] = []
    for split in ("train", "valid"):
        kept, report = read(settings.data, tokenizer, split, max_seq_length=settings.max_seq_length)
        found.append(kept)
        for sentence in report.sentences() if kept and told else ():
            _tell(f"{split}: {sentence}")
    return found[0], found[1]


def _train(
    model: Model, settings: Settings, samples: Sequence[Any], validation: Sequence[Any], group: Any, resume: bool
) -> None:
    from phi4_mlx.lora.batches import Batches
    from phi4_mlx.lora.record import Record, reporter
    from phi4_mlx.lora.trainer import Trainer

    folder = Path(os.path.expanduser(settings.adapter_path))
    leads = group.rank() == 0
    if leads and not resume and (folder / "checkpoints").exists():
        raise RequestError(f"{folder} holds a run already; --resume goes on with it, or name another --adapter-path")
    options: dict[str, Any] = {
        "batch_size": settings.batch_size, "max_seq_length": settings.max_seq_length, "packing": settings.packing,
        "rank": group.rank(), "world": group.size(),
    }  # fmt: skip
    batches = Batches(samples, seed=settings.seed, **options)
    held_out = Batches(validation, **options) if validation else None
    _make_trainable(model, settings)
    loss = _loss(settings)
    trainer = Trainer(model, batches, settings, folder, held_out, loss, group)
    step = trainer.resume() if resume else 0
    record = None
    if leads:
        _tell_plan(model, loss, settings, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder, step, reporter(settings.report_to, folder, asdict(settings)))
    _go(trainer, record, settings, held_out)


def _make_trainable(model: Model, settings: Settings) -> None:
    from phi4_mlx.lora.layers import add_adapter, load_adapter

    if settings.resume_adapter_file is not None:
        given = Path(os.path.expanduser(settings.resume_adapter_file))
        load_adapter(model, given.parent if given.is_file() else given)
        return
    if settings.fine_tune_type != "full":
        shape = settings.lora_parameters
        layers = None if settings.num_layers == -1 else settings.num_layers
        add_adapter(
            model, rank=shape.rank, scale=shape.scale, dropout=shape.dropout, keys=shape.keys, num_layers=layers,
            kind=settings.fine_tune_type, seed=settings.seed,
        )  # fmt: skip
        return
    if model.config.quantization:
        raise RequestError(
            "a quantised model cannot be trained whole; use --fine-tune-type lora, or an unquantised model"
        )
    model.unfreeze()


def _loss(settings: Settings) -> Loss:
    if settings.task == "sft":
        from phi4_mlx.lora.trainer import sft_loss

        return sft_loss
    from phi4_mlx.lora.preference import PreferenceLoss

    return PreferenceLoss(settings.task, settings.beta)


def _tell_plan(model: Model, loss: Loss, settings: Settings, trainer: Trainer) -> None:
    """What is trained, how long and in how much memory; refuses what cannot fit."""
    from mlx.utils import tree_flatten

    from phi4_mlx.lora.plan import check_memory, make_plan, memory_limit

    rows = settings.batch_size // (trainer.group.size() if trainer.group else 1)
    width = trainer.batches.widest
    model.train()
    plan = make_plan(model, loss, width)
    check_memory(plan, rows, width, settings.grad_checkpoint)
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    done = trainer.progress.step
    _tell(
        f"{settings.fine_tune_type}: {trained:,} numbers to train; steps {done + 1:,} to {settings.iters:,}, "
        f"{trainer.batches.steps_per_epoch:,} batches an epoch; predicted peak "
        f"{plan.peak_bytes(rows, width) / 1e9:.2f} GB of {memory_limit() / 1e9:.1f} GB"
    )


def _go(trainer: Trainer, record: Any, settings: Settings, held_out: Batches | None) -> None:
    """Trains, keeps the record, and leaves the adapter in its folder, however the run ends."""
    from phi4_mlx.lora.layers import save_adapter

    told = {"model": settings.model or ""}
    try:
        with _progress_bar(settings.iters, trainer.progress.step, settings.steps_per_report) as show_step:
            for step in trainer.run():
                if record is None:
                    continue
                record.add(step)
                show_step(step)
                if held_out and trainer.progress.best_step == step.step:
                    save_adapter(trainer.model, trainer.folder / "best", told)
                if step.step % settings.save_every == 0:
                    save_adapter(trainer.model, trainer.folder, told)
    finally:
        if record is not None and trainer.progress.step:
            save_adapter(trainer.model, trainer.folder, told)
    if record is None:
        return
    if trainer.progress.step < settings.iters:
        early = held_out and 0 < settings.patience <= trainer.progress.worse
        reason = "validation no longer improves" if early else "--resume goes on"
        _tell(f"stopped after step {trainer.progress.step:,}: {reason}")
    _tell_end(trainer, record, held_out)


def _tell_end(trainer: Trainer, record: Any, held_out: Batches | None) -> None:
    from phi4_mlx.lora.record import draw_in_terminal, draw_png

    if len(record.lines) > 1 and sys.stdout.isatty():
        print(draw_in_terminal(record, min(100, shutil.get_terminal_size().columns)))
    picture = draw_png(record) if len(record.lines) > 1 else None
    _tell(f"adapter in {trainer.folder}, metrics in {record.path}" + (f", curve in {picture}" if picture else ""))
    if held_out and trainer.progress.best_step:
        best = trainer.progress
        _tell(f"best validation loss {best.best_loss:.3f}, after step {best.best_step:,}, in {trainer.folder / 'best'}")


@contextlib.contextmanager
def _progress_bar(total: int, done: int, every: int) -> Iterator[Callable[[Step], None]]:
    """A bar on a terminal, a line now and then in a pipe."""
    if not sys.stderr.isatty():
        yield lambda step: _tell(_line(step)) if step.step % every == 0 or step.valid_loss is not None else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda step: bar.update(task, completed=step.step, description=_line(step))


def _line(step: Step) -> str:
    validated = "" if step.valid_loss is None else f", validation {step.valid_loss:.3f}"
    return (
        f"step {step.step:,}: loss {step.loss:.3f}{validated}, {step.tokens / step.seconds:,.0f} targets/s, "
        f"{step.peak_bytes / 1e9:.2f} GB"
    )


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
