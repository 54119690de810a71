"""The training loop: a step is a few batches, weighed by their targets, and one update.

Whatever a step depends on is in the checkpoint, or follows from its number: what is trained, the optimizer with its
schedule, the place in the data, the random state. So a run that was killed goes on to the same numbers, to the bit, on
the same machine.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.batches import Batch, Batches
from phi4_mlx.lora.checkpoints import FOLDER, keep_newest, newest_checkpoint, save_checkpoint
from phi4_mlx.lora.layers import draw_dropout
from phi4_mlx.lora.loss import next_token_loss
from phi4_mlx.lora.settings import Settings
from phi4_mlx.models.text import Model

Loss = Callable[[Model, Batch], tuple[mx.array, mx.array]]
"""(model, batch) -> (mean loss, how many it is the mean of)."""

SPIKE_WINDOW = 50  # steps whose median a loss is held against
SPIKE = 4.0  # times that median, and at least 2 nats above it, is no longer learning


@dataclass
class Progress:
    """How far a run is; JSON can hold it."""

    step: int = 0
    tokens: int = 0  # targets learned from
    best_step: int = 0
    best_loss: float = math.inf
    worse: int = 0  # validations since the best one
    recent: list[float] = field(default_factory=list)  # losses of the last steps


@dataclass(frozen=True)
class Step:
    """What one step came to.

    Attributes:
        step: its number, from 1.
        loss: mean over its targets, in nats.
        learning_rate: that it was made with.
        tokens: its targets.
        grad_norm: of the gradient, before it was clipped.
        seconds: wall time.
        peak_bytes: peak of MLX's memory so far.
        valid_loss: of the validation after it, where there was one.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    grad_norm: float
    seconds: float
    peak_bytes: int
    valid_loss: float | None = None


def sft_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the targets of packed rows."""
    return next_token_loss(model, batch.inputs, batch.targets, batch.mask, batch.segments)


class Trainer:
    """A run.

    Args:
        model: with what is to be trained unfrozen.
        batches: the training data, at its beginning.
        settings: the options.
        folder: where checkpoints go.
        validation: batches for validation; None for none.
        loss: what is minimised.
        group: the processes that train together; None for this one alone.
    """

    def __init__(
        self,
        model: Model,
        batches: Batches,
        settings: Settings,
        folder: Path,
        validation: Batches | None = None,
        loss: Loss = sft_loss,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.batches, self.settings, self.folder = model, batches, settings, folder
        self.validation, self.loss = validation, loss
        self.progress = Progress()
        self.group = group if group is not None and group.size() > 1 else None
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(model.trainable_parameters())
        model.model.recompute = settings.grad_checkpoint
        self._stop = False

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.group is None or self.group.rank() == 0

    def run(self) -> Iterator[Step]:
        """Trains to the end, and yields each step once it is made; checkpoints are written on the way.

        Ctrl-C and SIGTERM end it after the step under way, with a checkpoint.

        Raises:
            RequestError: the loss is no number or has leapt up; the model is as it was before that step.
        """
        with _stopped_by_signals(self._ask_to_stop):
            while self.progress.step < self.settings.iters and not self._all_stop():
                step = self._step()
                last = self.progress.step == self.settings.iters
                if self.validation and (last or self.progress.step % self.settings.steps_per_eval == 0):
                    step = Step(**{**asdict(step), "valid_loss": self._validate()})
                if last or self.progress.step % self.settings.save_every == 0:
                    self.save()
                yield step
            if self._stop:
                self.save()

    def resume(self) -> int:
        """Goes to where the newest checkpoint was written; returns its step, 0 where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged.
            RequestError: it is one of another run: other data or settings.
        """
        found = newest_checkpoint(self.folder)
        self._agree(0 if found is None else found[1]["progress"]["step"])
        if found is None:
            return 0
        tensors, state = found
        if state.get("settings") != self._identity():
            now = self._identity()
            name = next(key for key in now if state.get("settings", {}).get(key) != now[key])
            raise RequestError(
                f"the checkpoint in {self.folder} is of a run with {name} {state.get('settings', {}).get(name)!r:.60}, "
                f"here it is {now[name]!r:.60}; name another --adapter-path, or train with the same settings"
            )
        self.batches.load_state_dict(state["batches"])
        self.progress = Progress(**state["progress"])
        groups: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, array in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind].append((rest, array))
        self.model.load_weights(groups["model"], strict=False)
        self.optimizer.state = tree_unflatten(groups["optimizer"])
        return self.progress.step

    def _agree(self, step: int) -> None:
        """Sees to it that all processes go on from the same step."""
        if self.group is None:
            return
        steps = mx.distributed.all_gather(mx.array([step]), group=self.group).tolist()
        if len({*steps}) > 1:
            raise RequestError(
                f"the processes have checkpoints of the steps {steps}; the first one writes them, so copy the folder "
                f"{self.folder / FOLDER} to the other machines"
            )

    def save(self) -> None:
        """Writes a checkpoint, and removes the oldest ones."""
        if not self.leads:
            return
        tensors = {f"model/{name}": array for name, array in tree_flatten(self.model.trainable_parameters())}
        tensors |= {f"optimizer/{name}": array for name, array in tree_flatten(self.optimizer.state)}
        state = {"settings": self._identity(), "batches": self.batches.state_dict(), "progress": asdict(self.progress)}
        save_checkpoint(self.folder, self.progress.step, tensors, state)
        keep_newest(self.folder, self.settings.keep_checkpoints)

    def _identity(self) -> dict[str, Any]:
        """The settings that the numbers depend on; the rest may change between a run and its resumption."""
        free = {"data", "adapter_path", "steps_per_report", "report_to", "save_every", "keep_checkpoints", "patience"}
        settings = {name: value for name, value in asdict(self.settings).items() if name not in free}
        settings["lora_parameters"]["keys"] = list(settings["lora_parameters"]["keys"])
        return settings

    def _step(self) -> Step:
        begin = time.perf_counter()
        self.model.train()
        rank = 0 if self.group is None else self.group.rank()
        # A state of the step's own: nothing to carry over, and other drops in each process.
        mx.random.seed((self.settings.seed * 1_000_003 + self.progress.step) * 1009 + rank)
        loss, tokens, grads = self._gradients()
        norm = math.sqrt(sum(mx.square(g.astype(mx.float32)).sum().item() for _, g in tree_flatten(grads)))
        self._check(loss, norm)
        if 0 < self.settings.clip < norm:
            grads = tree_map(lambda g: g * (self.settings.clip / norm), grads)
        self.optimizer.update(self.model, grads)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.recent = [*progress.recent, loss][-SPIKE_WINDOW:]
        seconds = time.perf_counter() - begin
        rate = float(self.optimizer.learning_rate.item())
        return Step(progress.step, loss, rate, tokens, norm, seconds, mx.get_peak_memory())

    def _gradients(self) -> tuple[float, int, Any]:
        """Mean loss, targets and gradient of one step, over its batches and over all processes."""
        value_and_grad = nn.value_and_grad(self.model, self.loss)
        total, count, sums = mx.array(0.0), mx.array(0), None
        for _ in range(self.settings.grad_accumulation_steps):
            draw_dropout(self.model)
            (loss, n), grads = value_and_grad(self.model, next(self.batches))
            grads = tree_map(lambda g, n=n: g * n, grads)
            sums = grads if sums is None else tree_map(mx.add, sums, grads)
            total, count = total + loss * n, count + n
            mx.eval(total, count, sums)
        if self.group is not None:
            total, count = (mx.distributed.all_sum(each, group=self.group) for each in (total, count))
            sums = tree_map(lambda g: mx.distributed.all_sum(g, group=self.group), sums)
        targets = int(count.item())
        whole = max(targets, 1)
        return total.item() / whole, targets, tree_map(lambda g: (g / whole).astype(g.dtype), sums)

    def _check(self, loss: float, norm: float) -> None:
        step, recent = self.progress.step + 1, self.progress.recent
        reason = ""
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"the loss is {loss} and the gradient's norm {norm}"
        elif len(recent) == SPIKE_WINDOW and loss > max(SPIKE * median(recent), median(recent) + 2):
            reason = f"the loss has leapt to {loss:.2f}, from a median of {median(recent):.2f}"
        if not reason:
            return
        if self.progress.step:
            self.save()
        raise RequestError(
            f"step {step}: {reason}; stopped with what step {step - 1} had learned; --resume goes on behind that batch,"
            " --resume-adapter-file with a lower --learning-rate begins again from there"
        )

    def _validate(self) -> float:
        """The loss on the validation set: the same batches each time, in the same order."""
        assert self.validation is not None
        self.model.eval()
        count = None if self.settings.val_batches < 0 else self.settings.val_batches
        loss = evaluate(self.model, list(self.validation.fixed(count)), self.loss, self.group)
        progress = self.progress
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
        else:
            progress.worse += 1
            self._stop = self._stop or 0 < self.settings.patience <= progress.worse
        return loss

    def _ask_to_stop(self) -> None:
        self._stop = True

    def _all_stop(self) -> bool:
        """Whether any of the processes was asked to stop: then all do, after the same step."""
        if self.group is not None:
            self._stop = mx.distributed.all_sum(mx.array(int(self._stop)), group=self.group).item() > 0
        return self._stop


def evaluate(model: Model, batches: Sequence[Batch], loss: Loss, group: mx.distributed.Group | None = None) -> float:
    """Mean loss over the targets of some batches."""
    total, count = mx.array(0.0), mx.array(0)
    for batch in batches:
        mean, n = loss(model, batch)
        total, count = total + mean * n, count + n
        mx.eval(total, count)
    if group is not None:
        total, count = (mx.distributed.all_sum(each, group=group) for each in (total, count))
    return total.item() / max(int(count.item()), 1)


def make_optimizer(settings: Settings) -> optim.Optimizer:
    """The optimizer, its learning rate rising over the warm-up and then falling along a cosine, or constant."""
    rate: Any = settings.learning_rate
    rest = max(settings.iters - settings.warmup, 1)
    if settings.lr_schedule == "cosine":
        rate = optim.cosine_decay(settings.learning_rate, rest, settings.learning_rate / 10)
    if settings.warmup:
        first = settings.learning_rate / (settings.warmup + 1)
        rise = optim.linear_schedule(first, settings.learning_rate, settings.warmup)
        after = rate if callable(rate) else lambda step: mx.array(settings.learning_rate)
        rate = optim.join_schedules([rise, after], [settings.warmup])
    if settings.optimizer == "adafactor":
        return optim.Adafactor(
            learning_rate=rate, relative_step=False, scale_parameter=False, weight_decay=settings.weight_decay
        )
    return optim.AdamW(learning_rate=rate, weight_decay=settings.weight_decay, bias_correction=True)


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop`; pressed twice, Ctrl-C is what it always is. Only the main thread has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def caught(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, caught)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
