"""The training loop: a step is a few batches, weighed by their targets, and one update, and then it is put on the disk.

Whatever a step depends on is in the checkpoint, or follows from its number: what is trained, the optimizer with its
schedule, the place in the data, the random state. So a run that was killed goes on to the same numbers, to the bit, on
the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from phi4_mlx.adapters.layers import draw_dropout
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.data.batches import Batch, Batches
from phi4_mlx.lora.progress import Progress, Step
from phi4_mlx.lora.saving.run_folder import Storage
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.loss import next_token_loss
from phi4_mlx.lora.training.optimizer import make_optimizer
from phi4_mlx.lora.training.signals import Stop
from phi4_mlx.models.model import LanguageModel

Loss = Callable[[LanguageModel, Batch], tuple[mx.array, mx.array]]
"""(model, batch) -> (mean loss, how many it is the mean of); one with `figures` says how pairs fared besides."""

SPIKE_WINDOW = 50  # steps whose median a loss is held against
SPIKE_BEGIN = 10  # with fewer behind it, a loss may be anything
SPIKE = 4.0  # times that median, and at least 2 nats above it, is no longer learning


def sft_loss(model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the targets of packed rows."""
    return next_token_loss(model, batch.inputs, batch.targets, batch.mask, batch.segments)


class Trainer:
    """A run.

    Args:
        model: with what is to be trained unfrozen.
        batches: the training data, at its beginning.
        settings: the options.
        folder: where the adapter, the best one and the checkpoints go.
        validation: batches for validation; None for none.
        loss: what is minimised.
        group: the processes that train together; None for this one alone.
        warn: told, once, that something cannot be written.
        adapter_config: what adapter_config.json shall say besides.
    """

    def __init__(
        self,
        model: LanguageModel,
        batches: Batches,
        settings: Settings,
        folder: Path,
        validation: Batches | None = None,
        loss: Loss = sft_loss,
        group: mx.distributed.Group | None = None,
        *,
        warn: Callable[[str], Any] = lambda sentence: None,
        adapter_config: Mapping[str, Any] | None = None,
    ):
        if settings.patience and validation is None:
            raise RequestError(f"--patience {settings.patience} needs a validation set: valid.jsonl beside train.jsonl")
        self.model, self.batches, self.settings, self.folder = model, batches, settings, folder
        self.validation, self.loss = validation, loss
        self.progress = Progress()
        self.stop = Stop()
        self.group = group if group is not None and group.size() > 1 else None
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(model.trainable_parameters())
        mx.eval(self.optimizer.state)  # else its memory would not be there yet when the plan is made
        self.storage = Storage(self, warn, adapter_config or {})
        model.recompute = settings.grad_checkpoint
        self._between_steps = True

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.group is None or self.group.rank() == 0

    @property
    def ended_early(self) -> bool:
        """Whether validation has stopped to improve."""
        return 0 < self.settings.patience <= self.progress.worse

    @property
    def finished(self) -> bool:
        """Whether no step is left to be made."""
        return self.progress.step >= self.settings.iters or self.ended_early

    def run(self) -> Iterator[Step]:
        """Trains to the end, and yields each step once it is made and on the disk.

        Ctrl-C and SIGTERM end it after the step under way. What cannot be written on the way is told, and training
        goes on; at the end, everything is.

        Raises:
            RequestError: the loss is no number or has leapt up; the model is as it was before that step. Or: at the
                end something cannot be written.
        """
        with self.stop.listening():
            while not self.finished and not self._asked_to_stop():
                self._between_steps = False
                step = self._step()
                last = self.progress.step == self.settings.iters
                if self.validation and (last or self.progress.step % self.settings.steps_per_eval == 0):
                    step = self._validated(step)
                self.storage.keep(step, due=last or self.progress.step % self.settings.save_every == 0)
                self._between_steps = True
                yield step
            self.storage.finish()

    def resume(self) -> int:
        """Goes to where the newest checkpoint was written; returns its step.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
            RequestError: there is none, or it is one of another run: other data or settings.
        """
        return self.storage.resume()

    def save(self) -> None:
        """Writes a checkpoint and the adapter, unless they are there; a failure is told, and training can go on."""
        self.storage.save()

    def rescue(self) -> None:
        """Saves what is there, for a caller that something happened to between two steps; within one, does nothing."""
        if self._between_steps and self.progress.step:
            self.save()

    def _step(self) -> Step:
        begin = time.perf_counter()
        self.model.train()
        rank = 0 if self.group is None else self.group.rank()
        # A state of the step's own: nothing to carry over, and other drops in each process.
        mx.random.seed((self.settings.seed * 1_000_003 + self.progress.step) * 1009 + rank)
        self._figures()  # of what was no step: the plan's probes
        loss, tokens, grads = self._gradients()
        squares = [mx.square(grad.astype(mx.float32)).sum() for _, grad in tree_flatten(grads)]
        norm = math.sqrt(sum(squares, start=mx.array(0.0)).item())
        self._check(loss, norm)
        if 0 < self.settings.clip < norm:
            grads = tree_map(lambda grad: grad * (self.settings.clip / norm), grads)
        self.optimizer.update(self.model, grads)
        del grads, squares  # or they would all be in memory until the last weight is updated
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.recent = [*progress.recent, loss][-SPIKE_WINDOW:]
        seconds = time.perf_counter() - begin
        rate = float(self.optimizer.learning_rate.item())
        accuracy, margin = self._figures()
        return Step(
            progress.step, loss, rate, tokens, norm, seconds, mx.get_peak_memory(), accuracy=accuracy, margin=margin
        )

    def _gradients(self) -> tuple[float, int, Any]:
        """Mean loss, targets and gradient of one step, over its batches and over all processes."""
        value_and_grad = nn.value_and_grad(self.model, self.loss)
        if self.settings.grad_accumulation_steps == 1 and self.group is None:
            draw_dropout(self.model)
            (loss, n), grads = value_and_grad(self.model, next(self.batches))
            mx.eval(loss, n, grads)
            return loss.item(), int(n.item()), grads
        total, count, sums = mx.array(0.0), mx.array(0), None
        for _ in range(self.settings.grad_accumulation_steps):
            draw_dropout(self.model)
            (loss, n), grads = value_and_grad(self.model, next(self.batches))
            # In fp32: in fp16 the sum over a few thousand targets is beyond the largest number.
            grads = tree_map(lambda grad, n=n: grad.astype(mx.float32) * n, grads)
            sums = grads if sums is None else tree_map(mx.add, sums, grads)
            del grads
            total, count = total + loss * n, count + n
            mx.eval(total, count, sums)
        if self.group is not None:
            total, count = (mx.distributed.all_sum(each, group=self.group) for each in (total, count))
            sums = tree_map(lambda grad: mx.distributed.all_sum(grad, group=self.group), sums)
        whole = mx.maximum(count, 1)
        trained = self.model.trainable_parameters()
        grads = tree_map(lambda grad, weight: (grad / whole).astype(weight.dtype), sums, trained)
        mx.eval(total, count, grads)
        return total.item() / max(int(count.item()), 1), int(count.item()), grads

    def _check(self, loss: float, norm: float) -> None:
        step, recent = self.progress.step + 1, self.progress.recent
        reason = ""
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"the loss is {loss} and the gradient's norm {norm}"
        elif len(recent) >= SPIKE_BEGIN:
            # Of few steps, the median may be that of a kind of sample that the model knows already.
            name, usual = ("median", median(recent)) if len(recent) == SPIKE_WINDOW else ("maximum", max(recent))
            if loss > max(SPIKE * usual, usual + 2):
                reason = f"the loss has leapt to {loss:.2f}, from a {name} of {usual:.2f}"
        if not reason:
            return
        if not self.progress.step:
            raise RequestError(
                f"step 1: {reason}; nothing was learned, and nothing is there to resume: look at the model with "
                "`generate`, and at the data with --dry-run"
            )
        self.save()  # behind the batch: the next one may be better
        raise RequestError(
            f"step {step}: {reason}; stopped with what step {step - 1} had learned; --resume goes on behind that batch,"
            " --resume-adapter-file with a lower --learning-rate begins again from there"
        )

    def _validated(self, step: Step) -> Step:
        """The step with its loss on the validation set: the same batches each time, in the same order."""
        assert self.validation is not None
        count = None if self.settings.val_batches < 0 else self.settings.val_batches
        loss = evaluate(self.model, self.validation.fixed(count), self.loss, self.group)
        accuracy, _ = self._figures()
        progress = self.progress
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        else:
            progress.worse += 1
        return replace(step, valid_loss=loss, valid_accuracy=accuracy)

    def _figures(self) -> tuple[float | None, float | None]:
        """Accuracy and margin of the pairs since the last call, over all processes; None where there were none."""
        return pair_figures(self.loss, self.group)

    def _asked_to_stop(self) -> bool:
        """Whether any of the processes was asked to stop: then all do, after the same step."""
        asked = self.stop.number is not None
        if self.group is None:
            return asked
        return mx.distributed.all_sum(mx.array(int(asked)), group=self.group).item() > 0


def pair_figures(loss: Loss, group: mx.distributed.Group | None = None) -> tuple[float | None, float | None]:
    """Accuracy and margin of the pairs that a loss has seen since the last call, over all processes."""
    if not hasattr(loss, "figures"):
        return None, None
    found = loss.figures()
    sums = mx.array([found.pairs, found.pairs * found.accuracy, found.pairs * found.margin])
    if group is not None:
        sums = mx.distributed.all_sum(sums, group=group)
    pairs, ahead, margin = sums.tolist()
    return (ahead / pairs, margin / pairs) if pairs else (None, None)


def evaluate(
    model: LanguageModel, batches: Iterable[Batch], loss: Loss, group: mx.distributed.Group | None = None
) -> float:
    """Mean loss over the targets of some batches."""
    model.eval()
    total, count = mx.array(0.0), mx.array(0)
    for batch in batches:
        mean, n = loss(model, batch)
        total, count = total + mean * n, count + n
        mx.eval(total, count)
    if group is not None:
        total, count = (mx.distributed.all_sum(each, group=group) for each in (total, count))
    return total.item() / max(int(count.item()), 1)
