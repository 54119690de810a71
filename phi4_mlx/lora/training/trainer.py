"""The training loop: each step takes a few batches, makes one update, and is written to the run's folder.

Steps are numbered by batches, as mlx-lm numbers its iterations: with two batches in an update, they are 2, 4, 6, ...

Everything that a step depends on is in the checkpoint or follows from the step's number: the trained parameters, the
optimizer with its schedule, the position in the data, the random state. So a run that was killed resumes with the same
numbers, to the bit, on the same machine.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import current_adapter
from phi4_mlx.errors import RequestError
from phi4_mlx.fingerprint import base_fingerprint
from phi4_mlx.lora.progress import Progress, Step, Tick, Watch, no_tick, passes, tick_of, unwatched
from phi4_mlx.lora.saving.checkpoints import FOLDER, no_checkpoint
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.saving.snapshot import Snapshot, check_same_run, fixed_settings
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.gradients import Gradients, mean_gradients
from phi4_mlx.lora.training.loss import Loss, sft_loss
from phi4_mlx.lora.training.milestones import milestones
from phi4_mlx.lora.training.optimizer import make_optimizer
from phi4_mlx.lora.training.preference import PreferenceLoss, pair_figures
from phi4_mlx.lora.training.processes import Group, all_sum, any_process, check_same_step
from phi4_mlx.lora.training.signals import STEP, VALIDATION, Stop
from phi4_mlx.models.model import LanguageModel

SPIKE_WINDOW = 50  # steps whose median loss a loss is compared with
SPIKE_BEGIN = 10  # with fewer steps before it, any finite loss is accepted
SPIKE = 4.0  # a loss above this multiple of the median, and at least 2 nats above it, stops the run


class Trainer:
    """A run.

    Args:
        model: the model, with the parameters to train unfrozen.
        batches: the training data, at its beginning.
        settings: the options.
        folder: writes the adapter, the best adapter, checkpoints and metrics.
        validation: batches for validation; None for no validation.
        loss: the loss to minimise.
        group: the processes that train together; None for this one alone.
        stop: ends the run at a signal.
        watch: called with the progress of steps and validations.
        gradients: the mean loss and gradient of an update's batches.

    Raises:
        RequestError: `patience` needs a validation set.
    """

    def __init__(
        self,
        model: LanguageModel,
        batches: Batches,
        settings: Settings,
        folder: RunFolder,
        validation: Batches | None = None,
        loss: Loss = sft_loss,
        group: Group | None = None,
        stop: Stop | None = None,
        watch: Watch = unwatched,
        gradients: Gradients = mean_gradients,
    ):
        if settings.patience and validation is None:
            raise RequestError(f"--patience {settings.patience} needs a validation set: valid.jsonl beside train.jsonl")
        self.model, self.batches, self.settings, self.folder = model, batches, settings, folder
        self.validation, self.loss, self._gradients = validation, loss, gradients
        self.progress = Progress()
        self.stop, self.watch = stop or Stop(), watch
        self.group = group if group is not None and group.size() > 1 else None
        self.iters = settings.total_iters(batches.steps_per_epoch)
        self.optimizer = make_optimizer(settings, -(-self.iters // settings.grad_accumulation_steps))
        self.optimizer.init(model.trainable_parameters())
        mx.eval(self.optimizer.state)  # allocated now, so that the memory plan counts it
        self._base = base_fingerprint(model)
        model.recompute = settings.grad_checkpoint
        self._between_steps = True

    @property
    def leads(self) -> bool:
        """True if this process writes the files."""
        return self.group is None or self.group.rank() == 0

    @property
    def ended_early(self) -> bool:
        """True if validation has stopped improving."""
        return 0 < self.settings.patience <= self.progress.worse

    @property
    def finished(self) -> bool:
        """True if there is no step left to make."""
        return self.progress.step >= self.iters or self.ended_early

    def run(self) -> Iterator[Step]:
        """Trains to the end, and yields each step once it is made and on the disk.

        Ctrl-C and SIGTERM end the run after the current step. A file that cannot be written is a warning while the run
        lasts, and an error at its end.

        Raises:
            RequestError: the loss is not finite or has jumped, and the model is as it was before that step; or, at the
                end, a file could not be written.
        """
        with self.stop.listening(), self.stop.during(STEP):
            while not self.finished and not any_process(self.stop.number is not None, self.group):
                self._between_steps = False
                before = self.progress.step
                step = self._step()
                if self.validation and self._due(self.settings.steps_per_eval, before):
                    step = self._validated(step, self.validation)
                self._write(step, self._due(self.settings.save_every, before))
                self._between_steps = True
                yield step
            if self.leads and self.progress.step:
                with self.stop.writing():
                    self.folder.finish(self.snapshot(), self._adapter())

    def resume(self) -> int:
        """Restores the run from its newest checkpoint.

        Returns:
            The step of the checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
            RequestError: there is no checkpoint, or it is of another run: other data or settings.
        """
        path, found = self.folder.path, self.folder.newest()
        check_same_step(-1 if found is None else found.progress.step, self.group, path / FOLDER)
        if found is None:
            raise no_checkpoint(path)
        other_iters = not self.settings.rate_depends_on_iters
        check_same_run(found, self.snapshot(), path, self.folder.warn, iters_may_differ=other_iters)
        self.batches.load_state_dict(found.batches)
        if found.progress.step < self.iters and (rest := found.progress.step % self.settings.grad_accumulation_steps):
            self.folder.warn(f"the checkpoint's last update has {rest} batches: a longer run would have taken more")
        self.progress = found.progress
        self.model.load_weights(_of_tree("model", found), strict=False)
        self.optimizer.state = tree_unflatten(_of_tree("optimizer", found))
        return self.progress.step

    def snapshot(self) -> Snapshot:
        """Everything that a resumed run needs, as it is between two steps."""
        trees = {"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        return Snapshot(
            tensors={f"{name}/{path}": array for name, tree in trees.items() for path, array in tree_flatten(tree)},
            settings=fixed_settings(self.settings, self.iters),
            base=self._base,
            validation=None if self.validation is None else self.validation.state_dict()["data_hash"],
            batches=self.batches.state_dict(),
            progress=replace(self.progress),
        )

    def save(self) -> None:
        """Writes a checkpoint and the adapter, unless they are there; a full disk is only a warning."""
        if self.leads:
            with self.stop.writing():
                self.folder.save(self.snapshot(), self._adapter())

    def rescue(self) -> None:
        """Saves the run for a caller that failed between two steps; within a step it does nothing."""
        if self._between_steps and self.progress.step:
            self.save()

    def _write(self, step: Step, due: bool) -> None:
        """Puts a step on the disk, with a checkpoint if one is due."""
        if self.leads:
            with self.stop.writing():
                self.folder.add_step(step, self._adapter() if self.progress.best_step == step.step else None)
                if due:
                    self.save()

    def _due(self, every: int, before: int) -> bool:
        """True at the end of the run, and if a multiple of `every` lies between two counts of batches."""
        return self.progress.step >= self.iters or passes(every, before, self.progress.step)

    def _adapter(self) -> Adapter:
        return current_adapter(self.model, str(self.folder.path))

    def _step(self) -> Step:
        begin = time.perf_counter()
        settings, progress = self.settings, self.progress
        self.model.train()
        rank = 0 if self.group is None else self.group.rank()
        # Seeded by step: no random state to save, and each process drops other inputs.
        mx.random.seed((settings.seed * 1_000_003 + progress.step) * 1009 + rank)
        if isinstance(self.loss, PreferenceLoss):
            self.loss.reset()  # of the pairs of the memory plan's probes
        accumulated = settings.grad_accumulation_steps
        count = min(accumulated - progress.step % accumulated, self.iters - progress.step)
        tick = tick_of(self.watch, "step", self.iters, progress.step)
        loss, tokens, grads = self._gradients(self.model, self.loss, self.batches, count, self.group, tick)
        squares = [mx.square(grad.astype(mx.float32)).sum() for _, grad in tree_flatten(grads)]
        norm = math.sqrt(sum(squares, start=mx.array(0.0)).item())
        self._check(loss, norm)
        if 0 < settings.clip < norm:
            grads = tree_map(lambda grad: grad * (settings.clip / norm), grads)
        self.optimizer.update(self.model, grads)
        del grads, squares  # or they would stay in memory until the last weight is updated
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        progress.step += count
        progress.tokens += tokens
        progress.recent = [*progress.recent, loss][-SPIKE_WINDOW:]
        seconds = time.perf_counter() - begin
        rate = float(self.optimizer.learning_rate.item())
        accuracy, margin = pair_figures(self.loss, self.group)
        return Step(
            progress.step, loss, rate, tokens, norm, seconds, mx.get_peak_memory(), accuracy=accuracy, margin=margin
        )

    def _check(self, loss: float, norm: float) -> None:
        """Stops the run, all saved, before an update that would harm the model."""
        flaw, done = _flaw(loss, norm, self.progress.recent), self.progress.step
        if flaw and done:
            self.save()  # with the position behind this batch: the next one may be better
        if flaw:
            raise _ended_by(flaw, done, self.folder.path)

    def _validated(self, step: Step, validation: Batches) -> Step:
        """The step with its loss on the validation set: the same batches each time, in the same order."""
        count = None if self.settings.val_batches < 0 else self.settings.val_batches
        with self.stop.during(VALIDATION):
            tick = tick_of(self.watch, "validation", validation.number(count))
            loss = evaluate(self.model, validation.fixed(count), self.loss, self.group, tick)
        accuracy, _ = pair_figures(self.loss, self.group)
        progress = self.progress
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        else:
            progress.worse += 1
        return replace(step, valid_loss=loss, valid_accuracy=accuracy)


def _of_tree(tree: str, found: Snapshot) -> list[tuple[str, mx.array]]:
    """The tensors of one tree of a snapshot, by their path in it."""
    return [
        (name.removeprefix(f"{tree}/"), array) for name, array in found.tensors.items() if name.startswith(f"{tree}/")
    ]


def _ended_by(flaw: str, done: int, folder: Path) -> RequestError:
    """The error of a run that a flaw has ended, after `done` steps."""
    if not done:
        return RequestError(
            f"step 1: {flaw}; nothing was learned, and there is nothing to resume: look at the model with `generate`, "
            "and at the data with --dry-run"
        )
    return RequestError(
        f"step {done + 1}: {flaw}; stopped with the model of step {done}; --resume continues behind that batch, "
        f"--resume-adapter-file {shlex.quote(str(folder))} with a lower --learning-rate and another --adapter-path "
        "starts again from there"
    )


def _flaw(loss: float, norm: float, recent: Sequence[float]) -> str:
    """The reason why a step must not be made; empty for a good one."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"the loss is {loss} and the gradient's norm {norm}"
    if len(recent) < SPIKE_BEGIN:
        return ""
    # The median of few steps may be that of one kind of sample, which the model knows already.
    name, usual = ("median", median(recent)) if len(recent) == SPIKE_WINDOW else ("maximum", max(recent))
    if loss > max(SPIKE * usual, usual + 2):
        return f"the loss has jumped to {loss:.2f}, from a {name} of {usual:.2f}"
    return ""


def evaluate(
    model: LanguageModel, batches: Iterable[Batch], loss: Loss, group: Group | None = None, tick: Tick = no_tick
) -> float:
    """Mean loss over the targets of some batches.

    Args:
        model: the model; switched to evaluation mode.
        batches: the batches of this process.
        loss: the loss of a batch.
        group: the processes that share the batches; None for this one alone.
        tick: called with the progress.

    Returns:
        The mean loss in nats; 0 without targets.
    """
    model.eval()
    total, count = mx.array(0.0), mx.array(0)
    for done, batch in enumerate(batches):
        with milestones(model) as passed:
            mean, n = loss(model, batch)
        total, count = total + mean * n, count + n
        passed.evaluate([total, count], {}, tick, done)
    targets = int(all_sum(count, group).item())
    return float(all_sum(total, group).item()) / max(targets, 1)
