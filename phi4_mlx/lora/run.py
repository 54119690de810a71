"""A fine-tuning run from settings to adapter, for Python and for the command."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import CONFIG_FILE, TENSORS_FILE
from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.adapters.peft import is_peft
from phi4_mlx.checkpoint import load
from phi4_mlx.data.samples import Pair
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.display import report_end, show
from phi4_mlx.lora.loading import Samples, download, read_data, read_weights
from phi4_mlx.lora.program import Program
from phi4_mlx.lora.progress import tick_of
from phi4_mlx.lora.saving.checkpoints import NEW_RUN, checkpoints, from_adapter, no_checkpoint
from phi4_mlx.lora.saving.metrics import MetricsLog, check_reporter, reporter
from phi4_mlx.lora.saving.run_folder import BEST, RunFolder
from phi4_mlx.lora.saving.run_lock import locked
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.batches import Batches
from phi4_mlx.lora.training.loss import Loss, sft_loss
from phi4_mlx.lora.training.memory_plan import MEASUREMENTS, Plan, check_memory, make_plan
from phi4_mlx.lora.training.optimizer import rate_text
from phi4_mlx.lora.training.preference import PreferenceLoss, pair_figures
from phi4_mlx.lora.training.processes import Group
from phi4_mlx.lora.training.signals import TESTING, Stop
from phi4_mlx.lora.training.trainable import make_trainable
from phi4_mlx.lora.training.trainer import Trainer, evaluate
from phi4_mlx.lora.view import Tell, View, to_stderr, view_of
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.terminal.amount import amount, size

MANY_EPOCHS = 10  # above this, a message warns of memorising


@dataclass(frozen=True)
class Finetuned:
    """The result of a run.

    Attributes:
        adapter_path: the adapter's folder.
        step: the last step of the run.
        loss: loss of the last step in nats; None if this call made no step.
        best_step: the step with the lowest validation loss, whose adapter is in the folder `best`; 0 without a
            validation.
        best_loss: the lowest validation loss in nats; infinite without a validation.
        test_loss: loss on the test set in nats; None without `test`.
    """

    adapter_path: Path
    step: int
    loss: float | None = None
    best_step: int = 0
    best_loss: float = math.inf
    test_loss: float | None = None


def finetune(settings: Settings | Mapping[str, Any], *, resume: bool = False, tell: Tell = to_stderr) -> Finetuned:
    """Fine-tunes a model, as `python -m phi4_mlx.lora` does.

    Args:
        settings: the options: `phi4_mlx.lora.settings.Settings`, or a mapping of the same names.
        resume: True to resume from the newest checkpoint in the adapter's folder.
        tell: called with each message for people; by default they go to standard error, with a progress bar.

    Returns:
        The adapter's folder and the losses.

    Raises:
        RequestError: an option, a line of the data or the folder cannot be used, another run writes there, the run
            does not fit in memory, the loss is not finite or has jumped, or the disk is full at the end.
        ConfigError, CheckpointError, TokenizerError: a file of the model or the adapter is missing or damaged.
        KeyboardInterrupt, SystemExit: on Ctrl-C or SIGTERM, after the current step, with everything saved; at once
            where no step is under way.
    """
    if not isinstance(settings, Settings):
        settings = Settings.from_mapping(settings, "settings")
    return start_run(settings, resume, tell, None)


def start_run(settings: Settings, resume: bool, tell: Tell, program: Program | None) -> Finetuned:
    """Runs with a view of the progress, and with answers to signals.

    Args:
        settings: the options.
        resume: as for `finetune`.
        tell: as for `finetune`.
        program: the command that runs, which messages refer to, and which a second signal ends at once; None in a
            caller's program.
    """
    group = mx.distributed.init()
    if group.rank():
        return _finetune(settings, resume, group, View(_nothing), Stop(), program)
    folder = Path(os.path.expanduser(settings.adapter_path))
    check_reporter(settings.report_to)
    with view_of(tell) as view:
        stop = Stop(None if program is None else functools.partial(_leave, view))
        with stop.listening(), locked(folder, view.tell):
            check_folder(folder, settings, resume)
            return _finetune(settings, resume, group, view, stop, program)


def _leave(view: View, code: int) -> None:
    """Ends the program at once, in the middle of a computation; the terminal is left as it was."""
    view.close()
    os._exit(code)


def _finetune(
    settings: Settings, resume: bool, group: Group, view: View, stop: Stop, program: Program | None
) -> Finetuned:
    """A run in a folder that has been checked and locked by the first process."""
    folder = Path(os.path.expanduser(settings.adapter_path))
    model_folder = download(settings, view)
    view.phase("loading the tokenizer")
    model, tokenizer = load(model_folder, lazy=True)  # weights are read after the data is checked
    view.phase("reading the data")
    data = read_data(settings, tokenizer, view.tell)
    batches = _batches(data.train, settings, group, settings.seed)
    validation = _batches(data.valid, settings, group) if data.valid else None
    make_trainable(model, settings)
    run_folder = RunFolder(
        folder, len(model.layers), keep_checkpoints=settings.keep_checkpoints,
        adapter_config={"model": settings.base, "data": settings.data}, warn=view.tell,
    )  # fmt: skip
    trainer = Trainer(model, batches, settings, run_folder, validation, loss_of(settings), group, stop, view.watch)
    step = trainer.resume() if resume else 0
    read_weights(model, view)
    batch_s = None
    if trainer.leads:
        if not trainer.finished:
            batch_s = report_plan(trainer, view)
        report_to = None if trainer.finished else settings.report_to
        report = reporter(report_to, folder, asdict(settings))
        run_folder.metrics = MetricsLog(folder, step, report, settings.noun, run_folder.metrics_proof)
    view.begin(step, trainer.iters, settings.noun, settings.steps_per_report, batch_s)
    loss = _train(trainer, view)
    view.phase("drawing the loss")
    _report_result(trainer, step, view, program)
    tested = None
    if data.test and stop.number is None:
        with stop.during(TESTING):
            tested = report_test(model, _batches(data.test, settings, group), settings, view, group)
    if trainer.leads and trainer.finished and program is not None:
        view.tell(program.to_chat(settings))
        view.tell(program.to_fuse(settings))
    stop.pass_on()
    best = trainer.progress
    return Finetuned(folder, best.step, loss, best.best_step, best.best_loss, tested)


def preview(settings: Settings, count: int) -> list[str]:
    """Formats the first training samples as the model will see them; reads no weights.

    Args:
        settings: the options.
        count: number of samples, or pairs.

    Raises:
        RequestError: the data cannot be used.
        ConfigError, TokenizerError: a file of the model is missing or damaged.
    """
    with view_of(to_stderr) as view, Stop().listening():
        _, tokenizer = load(download(settings, view), lazy=True)
        view.phase("reading the data")
        samples = read_data(settings, tokenizer, view.tell).train[:count]
    parts = [
        part for each in samples for part in ((each.chosen, each.rejected) if isinstance(each, Pair) else (each,))
    ]
    return [show(part, tokenizer) for part in parts]


def measure_adapter(settings: Settings, tell: Tell = to_stderr) -> float:
    """Measures the loss of an existing adapter on the test set; trains nothing.

    Args:
        settings: the options; `adapter_path` holds the adapter.
        tell: called with each message for people.

    Returns:
        The loss in nats.

    Raises:
        RequestError: the data cannot be used.
        ConfigError, CheckpointError, TokenizerError: a file of the model or the adapter is missing or damaged.
    """
    group = mx.distributed.init()
    if group.rank():
        tell = _nothing
    with view_of(tell) as view, Stop().listening():
        model, tokenizer = load(download(settings, view, "test"), lazy=True)
        view.phase("reading the data")
        data = read_data(settings, tokenizer, view.tell, splits=("test",))
        load_adapter(model, Path(settings.adapter_path))
        read_weights(model, view)
        return report_test(model, _batches(data.test, settings, group), settings, view, group)


def check_folder(folder: Path, settings: Settings, resume: bool) -> None:
    """Refuses a folder whose content would be overwritten, and one without a checkpoint to resume from.

    Args:
        folder: the adapter's folder.
        settings: the options.
        resume: True if the run resumes.

    Raises:
        RequestError: the folder cannot be used.
    """
    there = bool(checkpoints(folder))
    if resume:
        if not there:
            raise no_checkpoint(folder)
        return
    if there:
        raise RequestError(f"{folder} holds a run already; continue it with --resume, or name another --adapter-path")
    peft = is_peft(folder)
    if not peft and not any((folder / name).exists() for name in (CONFIG_FILE, TENSORS_FILE)):
        return
    if settings.resume_adapter_file is not None and not peft:
        initial = Path(os.path.expanduser(settings.resume_adapter_file))
        if folder.resolve() in (initial.resolve(), initial.resolve().parent):
            return
    way = "" if peft else ", or start from it with --resume-adapter-file"
    raise RequestError(
        f"{folder} holds {'a PEFT' if peft else 'an'} adapter already, which training would overwrite; name another "
        f"--adapter-path{way}"
    )


def loss_of(settings: Settings) -> Loss:
    """The loss of a task."""
    return sft_loss if settings.task == "sft" else PreferenceLoss(settings.task, settings.beta)


def report_plan(trainer: Trainer, view: View) -> float:
    """Reports the parameters, updates, epochs and predicted memory of a run.

    Args:
        trainer: the run, before its first step.
        view: shows the messages and the progress.

    Returns:
        The seconds that a batch is expected to take.

    Raises:
        RequestError: the run does not fit in memory.
    """
    settings, model, batches = trainer.settings, trainer.model, trainer.batches
    accumulating = settings.grad_accumulation_steps > 1 or trainer.group is not None

    def plan(recompute: bool) -> Plan:
        model.recompute = recompute
        try:
            return make_plan(
                model.train(), trainer.loss, batches.shapes(), accumulating,
                lambda number: view.phase(f"planning memory: measurement {number} of {MEASUREMENTS}"),
            )  # fmt: skip
        finally:
            model.recompute = settings.grad_checkpoint

    other = None if settings.grad_checkpoint else functools.partial(plan, True)
    planned = plan(settings.grad_checkpoint)
    peak = check_memory(planned, batches, other, resumed=trainer.progress.step > 0)
    trained = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    in_update = settings.grad_accumulation_steps
    updates, epochs = -(-trainer.iters // in_update), trainer.iters / batches.steps_per_epoch
    noun = "sample" if settings.task == "sft" else "pair"
    begin = f", from step {trainer.progress.step:,} on" if trainer.progress.step else ""
    view.tell(
        f"{settings.fine_tune_type}: {trained:,} parameters to train; {amount(updates, 'update')} of "
        f"{amount(in_update * batches.samples / batches.steps_per_epoch, noun)} = {amount(epochs, 'epoch')} of "
        f"{amount(batches.samples, noun)}{begin}; predicted peak {size(peak)} of {size(memory_limit())}"
    )
    view.tell(f"learning rate: {rate_text(settings, updates)}")
    if epochs > MANY_EPOCHS:
        view.tell(f"each sample comes {epochs:,.0f} times and will be memorised: use fewer epochs or more data")
    return planned.token_s * batches.tokens_per_batch


def report_test(
    model: LanguageModel, batches: Batches, settings: Settings, view: View, group: Group | None = None
) -> float:
    """Measures and reports the loss on the test set.

    Args:
        model: the model, with its adapter.
        batches: the test set.
        settings: the options.
        view: shows the progress and the result.
        group: the processes that share the batches; None for this one alone.

    Returns:
        The loss in nats.
    """
    count = None if settings.test_batches < 0 else settings.test_batches
    loss = loss_of(settings)
    tick = tick_of(view.watch, "test", batches.number(count))
    found = evaluate(model, batches.fixed(count), loss, group, tick)
    accuracy, _ = pair_figures(loss, group)
    more = f"perplexity {math.exp(min(found, 700)):,.3f}" if accuracy is None else f"{accuracy:.0%} of the pairs ahead"
    view.tell(f"test loss {found:.3f}, {more}")
    return found


def _train(trainer: Trainer, view: View) -> float | None:
    """Makes the remaining steps; returns the loss of the last one."""
    loss = None
    for step in trainer.run():
        loss = step.loss
        try:
            view.step(step)
        except BaseException:  # for example, the reader of the pipe has gone
            trainer.rescue()
            raise
    return loss


def _report_result(trainer: Trainer, resumed_at: int, view: View, program: Program | None) -> None:
    now, folder, metrics = trainer.progress, trainer.folder.path, trainer.folder.metrics
    if metrics is None:
        return
    if now.step:
        report_end(metrics, view)
        if now.best_step:
            view.tell(f"best validation loss {now.best_loss:.3f}, after step {now.best_step:,}, in {folder / BEST}")
    if trainer.finished and now.step == resumed_at:
        view.tell(f"the run in {folder} has ended: {_why_ended(trainer)}")
    elif not now.step:
        view.tell("stopped before the first step: nothing was saved, and there is nothing to resume")
    elif trainer.ended_early:
        view.tell(f"stopped after step {now.step:,}: validation no longer improves")
    elif now.step < trainer.iters:
        command = "" if program is None else program.to_resume()
        view.tell(f"stopped at {now.step:,} of {trainer.iters:,}; --resume goes on{command}")


def _why_ended(trainer: Trainer) -> str:
    """The reason why a resumed run has no step left, and the way to train on."""
    if trainer.ended_early:
        return "validation no longer improves; a larger --patience continues it"
    way = f"a larger --iters continues it, or {NEW_RUN}"
    if trainer.settings.rate_depends_on_iters:
        way = f"its learning rate has fallen to its end; {from_adapter(trainer.folder.path)}"
    return f"step {trainer.progress.step:,} was its last; {way}"


def _batches(samples: Samples, settings: Settings, group: Group, seed: int = 0) -> Batches:
    return Batches(
        samples, batch_size=settings.batch_size, max_seq_length=settings.max_seq_length, packing=settings.packing,
        seed=seed, rank=group.rank(), world=group.size(),
    )  # fmt: skip


def _nothing(message: str) -> None:
    """The `tell` of all processes but the first."""
