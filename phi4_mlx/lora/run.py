"""A fine-tuning run from its settings to its adapter, the same from Python as from the command."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import CONFIG_FILE, TENSORS_FILE
from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.adapters.peft import is_peft
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import memory_limit
from phi4_mlx.hub import DEFAULT_MODEL
from phi4_mlx.lora.data.batches import Batches
from phi4_mlx.lora.data.samples import load_pairs, load_samples
from phi4_mlx.lora.display import Tell, progress, show, tell_end, to_stderr
from phi4_mlx.lora.saving.checkpoints import checkpoints
from phi4_mlx.lora.saving.metrics import Record, check_reporter, reporter
from phi4_mlx.lora.saving.run_folder import BEST
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.memory_plan import Plan, check_memory, make_plan
from phi4_mlx.lora.training.preference import PreferenceLoss
from phi4_mlx.lora.training.trainable import make_trainable
from phi4_mlx.lora.training.trainer import Loss, Trainer, evaluate, pair_figures, sft_loss
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import Tokenizer

MANY_EPOCHS = 10


@dataclass(frozen=True)
class Finetuned:
    """What became of a run.

    Attributes:
        adapter_path: the adapter's folder.
        step: the last step that was made.
        loss: of that step; None if none was made.
        best_step: the step with the best validation, whose adapter is in `best` there; 0 without a validation.
        best_loss: its loss.
        test_loss: on the test set; None where it was not asked for.
    """

    adapter_path: Path
    step: int
    loss: float | None = None
    best_step: int = 0
    best_loss: float = math.inf
    test_loss: float | None = None


@dataclass(frozen=True)
class Data:
    """Samples, or pairs, of each split; none of one that is not there or was not asked for."""

    train: Sequence[Any]
    valid: Sequence[Any]
    test: Sequence[Any]


def finetune(settings: Settings | Mapping[str, Any], *, resume: bool = False, tell: Tell = to_stderr) -> Finetuned:
    """Fine-tunes a model, as `python -m phi4_mlx.lora` does.

    Args:
        settings: the options: `phi4_mlx.lora.settings.Settings`, or a mapping of the same names.
        resume: goes on from the newest checkpoint in the adapter's folder.
        tell: called with each sentence for people; by default they go to standard error, with a progress bar there.

    Returns:
        Where the adapter is, and how it did.

    Raises:
        RequestError: an option, a line of the data or the folder cannot serve, it would not fit in memory, the loss
            is no number, or the disk is full at the end.
        ConfigError, CheckpointError, TokenizerError: a file of the model or the adapter is missing or damaged.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; the step under way was finished, and all is saved.
    """
    if not isinstance(settings, Settings):
        settings = Settings.from_mapping(settings, "settings")
    group = mx.distributed.init()
    if group.rank():
        tell = _nothing
    folder = Path(os.path.expanduser(settings.adapter_path))
    if not group.rank():
        check_reporter(settings.report_to)
        check_folder(folder, settings, resume)
    model, tokenizer = load(settings.model or DEFAULT_MODEL, lazy=True)  # read when the data has proven good
    data = read_data(settings, tokenizer, tell)
    batches = _batches(data.train, settings, group, settings.seed)
    validation = _batches(data.valid, settings, group) if data.valid else None
    make_trainable(model, settings)
    trainer = Trainer(
        model, batches, settings, folder, validation, loss_of(settings), group,
        warn=tell, adapter_config={"model": settings.model or DEFAULT_MODEL},
    )  # fmt: skip
    step = trainer.resume() if resume else 0
    mx.eval(model.parameters())
    record = None
    if trainer.leads:
        if not trainer.finished:
            tell_plan(trainer, tell)
        report_to = None if trainer.finished else settings.report_to
        record = Record(folder, step, reporter(report_to, folder, asdict(settings)), settings.noun)
        trainer.storage.record = record
    loss = _train(trainer, tell)
    _tell_result(trainer, record, step, tell)
    trainer.stop.pass_on()
    tested = tell_test(model, _batches(data.test, settings, group), settings, tell, group) if data.test else None
    best = trainer.progress
    return Finetuned(folder, best.step, loss, best.best_step, best.best_loss, tested)


def preview(settings: Settings, count: int) -> list[str]:
    """The first samples, as the model will see them; no weights are read."""
    _, tokenizer = load(settings.model or DEFAULT_MODEL, lazy=True)
    samples = read_data(settings, tokenizer, to_stderr).train[:count]
    each = [part for sample in samples for part in ((sample,) if hasattr(sample, "ids") else vars(sample).values())]
    return [show(sample, tokenizer) for sample in each]


def measure_adapter(settings: Settings, tell: Tell = to_stderr) -> float:
    """The loss of the adapter in the adapter's folder on the test set; nothing is trained."""
    group = mx.distributed.init()
    if group.rank():
        tell = _nothing
    model, tokenizer = load(settings.model or DEFAULT_MODEL, lazy=True)
    data = read_data(settings, tokenizer, tell, splits=("test",))
    load_adapter(model, Path(settings.adapter_path))
    mx.eval(model.parameters())
    return tell_test(model, _batches(data.test, settings, group), settings, tell, group)


def check_folder(folder: Path, settings: Settings, resume: bool) -> None:
    """Refuses a folder with somebody else's work in it, or one with nothing to go on from.

    Raises:
        RequestError: says what is there, and the ways out.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is no folder; name another --adapter-path")
    there = bool(checkpoints(folder))
    if resume:
        if not there:
            raise RequestError(f"{folder} holds no checkpoint to go on from; leave --resume out to begin anew")
        return
    if there:
        raise RequestError(f"{folder} holds a run already; --resume goes on with it, or name another --adapter-path")
    peft = is_peft(folder)
    if not peft and not any((folder / name).exists() for name in (CONFIG_FILE, TENSORS_FILE)):
        return
    if settings.resume_adapter_file is not None and not peft:
        begun_with = Path(os.path.expanduser(settings.resume_adapter_file))
        if folder.resolve() in (begun_with.resolve(), begun_with.resolve().parent):
            return
    way = "" if peft else ", or go on from it with --resume-adapter-file"
    raise RequestError(
        f"{folder} holds an adapter already{' of PEFT' if peft else ''}, which training would overwrite; name another "
        f"--adapter-path{way}"
    )


def read_data(
    settings: Settings, tokenizer: Tokenizer, tell: Tell, splits: Sequence[str] = ("train", "valid", "test")
) -> Data:
    """Reads all that a run needs, and tells what it came to.

    Raises:
        RequestError: a line is bad, or a split that is needed is not there.
    """
    read: Any = load_pairs
    if settings.task == "sft":
        read = functools.partial(load_samples, mask_prompt=settings.mask_prompt)
    found: dict[str, Sequence[Any]] = {"train": (), "valid": (), "test": ()}
    for split in splits:
        if split == "test" and not settings.test:
            continue
        found[split], report = read(settings.data, tokenizer, split, max_seq_length=settings.max_seq_length)
        for sentence in report.sentences() if found[split] else ():
            tell(f"{split}: {sentence}")
    if settings.test and not found["test"]:
        raise RequestError(f"{settings.data} holds no test.jsonl, which --test needs; leave --test out")
    if settings.patience and "valid" in splits and not found["valid"]:
        raise RequestError(
            f"--patience {settings.patience} needs a validation set, and {settings.data} holds no valid.jsonl; "
            "leave --patience out"
        )
    return Data(**found)


def loss_of(settings: Settings) -> Loss:
    """What a task minimises."""
    return sft_loss if settings.task == "sft" else PreferenceLoss(settings.task, settings.beta)


def tell_plan(trainer: Trainer, tell: Tell) -> None:
    """Tells what is trained, how long and in how much memory; refuses what cannot fit."""
    settings, model, batches = trainer.settings, trainer.model, trainer.batches
    accumulating = settings.grad_accumulation_steps > 1 or trainer.group is not None

    def plan(recompute: bool) -> Plan:
        model.recompute = recompute
        try:
            return make_plan(model.train(), trainer.loss, batches.shapes, accumulating)
        finally:
            model.recompute = settings.grad_checkpoint

    other = None if settings.grad_checkpoint else functools.partial(plan, True)
    peak = check_memory(plan(settings.grad_checkpoint), batches, other)
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    epochs = settings.iters * settings.grad_accumulation_steps / batches.steps_per_epoch
    tell(
        f"{settings.fine_tune_type}: {trained:,} numbers to train; steps {trainer.progress.step + 1:,} to "
        f"{settings.iters:,} = {epochs:,.1f} epochs of {batches.steps_per_epoch:,} batches; predicted peak "
        f"{peak / 1e9:.2f} GB of {memory_limit() / 1e9:.1f} GB"
    )
    if epochs > MANY_EPOCHS:
        tell(f"each sample comes {epochs:,.0f} times, and is learned by heart: fewer --iters, or more data, generalise")


def tell_test(
    model: LanguageModel, batches: Batches, settings: Settings, tell: Tell, group: mx.distributed.Group | None = None
) -> float:
    """The loss on the test set, and tells it."""
    count = None if settings.test_batches < 0 else settings.test_batches
    group = group if group is not None and group.size() > 1 else None
    loss = loss_of(settings)
    found = evaluate(model, batches.fixed(count), loss, group)
    accuracy, _ = pair_figures(loss, group)
    more = f"perplexity {math.exp(min(found, 700)):,.3f}" if accuracy is None else f"{accuracy:.0%} of the pairs ahead"
    tell(f"test loss {found:.3f}, {more}")
    return found


def _train(trainer: Trainer, tell: Tell) -> float | None:
    """Makes the steps that are left; returns the last one's loss."""
    loss = None
    with progress(trainer.settings, trainer.progress.step, tell) as show_step:
        for step in trainer.run():
            loss = step.loss
            try:
                show_step(step)
            except BaseException:  # the reader of a pipe has left, say
                trainer.rescue()
                raise
    return loss


def _tell_result(trainer: Trainer, record: Record | None, resumed_at: int, tell: Tell) -> None:
    settings, now = trainer.settings, trainer.progress
    if record is None:
        return
    if trainer.finished and now.step == resumed_at:
        why = "validation no longer improved" if trainer.ended_early else f"step {now.step:,} was its last"
        more = "a larger --patience" if trainer.ended_early else "another --adapter-path"
        tell(f"the run in {trainer.folder} had ended: {why}; {more} goes on")
    elif now.step < settings.iters:
        why = "validation no longer improves" if trainer.ended_early else "--resume goes on"
        tell(f"stopped after step {now.step:,}: {why}")
    if not now.step:
        return
    tell_end(record, tell)
    if now.best_step:
        tell(f"best validation loss {now.best_loss:.3f}, after step {now.best_step:,}, in {trainer.folder / BEST}")


def _batches(samples: Sequence[Any], settings: Settings, group: mx.distributed.Group, seed: int = 0) -> Batches:
    return Batches(
        samples, batch_size=settings.batch_size, max_seq_length=settings.max_seq_length, packing=settings.packing,
        seed=seed, rank=group.rank(), world=group.size(),
    )  # fmt: skip


def _nothing(sentence: str) -> None:
    pass
