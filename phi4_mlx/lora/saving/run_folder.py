"""What a run puts on the disk after a step, and how it goes on from there.

The order is what makes a checkpoint true: first the step's line of metrics, then the best adapter if it is this one,
then the checkpoint, which speaks of both, and last the adapter, which follows from it. Whenever the run dies, what the
newest checkpoint says has happened is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.adapters.folder import TENSORS_FILE, Adapter, write_folder
from phi4_mlx.adapters.layers import current_adapter
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.fingerprint import base_fingerprint
from phi4_mlx.lora.progress import Progress
from phi4_mlx.lora.saving.checkpoints import FOLDER, damaged, keep_newest, newest_checkpoint, save_checkpoint
from phi4_mlx.lora.settings import Settings

if TYPE_CHECKING:
    from phi4_mlx.lora.progress import Step
    from phi4_mlx.lora.saving.metrics import Record
    from phi4_mlx.lora.training.trainer import Trainer

BEST = "best"
# What the numbers do not depend on, or what more than a name tells apart: the model and the data by their hashes.
_FREE = (
    "model", "data", "adapter_path", "steps_per_report", "report_to", "save_every", "keep_checkpoints", "patience",
    "test", "test_batches", "given",
)  # fmt: skip


class Storage:
    """The folder of a run.

    Args:
        trainer: the run.
        warn: told, once, that something cannot be written; and what is not the same in a resumed run.
        adapter_config: what adapter_config.json shall say besides.

    Attributes:
        record: the metrics; None for none.
    """

    def __init__(self, trainer: Trainer, warn: Callable[[str], Any], adapter_config: Mapping[str, Any]):
        self.record: Record | None = None
        self._trainer, self._warn, self._adapter_config = trainer, warn, adapter_config
        self._base = base_fingerprint(trainer.model)
        self._warned = False
        self._best: Adapter | None = None  # the best adapter while it is not on the disk
        self._checkpoint_at: Any = None  # step and place in the data of the newest one
        self._adapter_at = -1

    def keep(self, step: Step, due: bool) -> None:
        """Puts a step on the disk.

        Args:
            step: the step just made.
            due: whether a checkpoint is.
        """
        trainer = self._trainer
        if not trainer.leads:
            return
        with trainer.stop.writing():
            if self.record is not None:
                record = self.record
                self._attempt(record.path, lambda: record.add(step))
            best = trainer.progress.best_step == step.step
            if best:
                self._best = current_adapter(trainer.model, str(trainer.folder))
            if best or due:
                self._attempt(trainer.folder / BEST / TENSORS_FILE, self._write_best)
            if due:
                self.save()

    def save(self) -> None:
        """Writes a checkpoint and the adapter, unless they are there; a failure is told, and training can go on."""
        if not self._trainer.leads:
            return
        with self._trainer.stop.writing():
            self._attempt(self._trainer.folder / FOLDER, self._write_checkpoint)
            self._attempt(self._trainer.folder / TENSORS_FILE, self._write_adapter)

    def finish(self) -> None:
        """Writes all that is not on the disk yet.

        Raises:
            RequestError: something could not be written; all the rest is.
        """
        folder = self._trainer.folder
        if not self._trainer.leads or not self._trainer.progress.step:
            return
        writes: list[tuple[Path, Callable[[], Any]]] = [
            (folder / BEST / TENSORS_FILE, self._write_best),
            (folder / FOLDER, self._write_checkpoint),
            (folder / TENSORS_FILE, self._write_adapter),
        ]
        if self.record is not None:
            writes.insert(0, (self.record.path, self.record.flush))
        failed = ""
        with self._trainer.stop.writing():
            for path, write in writes:
                try:
                    write()
                except OSError as error:
                    failed = failed or _explained(path, error)
        if failed:
            raise RequestError(f"{failed}; make room on the disk, then --resume makes the last steps again")

    def resume(self) -> int:
        """Goes to where the newest checkpoint was written; returns its step.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
            RequestError: there is none, or it is one of another run: other data or settings.
        """
        trainer = self._trainer
        found = newest_checkpoint(trainer.folder)
        progress = None if found is None else self._progress_of(found[1])
        self._agree(-1 if progress is None else progress.step)
        if found is None or progress is None:
            raise RequestError(f"{trainer.folder} holds no checkpoint to go on from; leave --resume out to begin anew")
        tensors, state = found
        self._check_same_run(state)
        self._check_tensors(tensors)
        trainer.batches.load_state_dict(state["batches"])
        trainer.progress = progress
        groups: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, array in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind].append((rest, array))
        trainer.model.load_weights(groups["model"], strict=False)
        trainer.optimizer.state = tree_unflatten(groups["optimizer"])
        self._checkpoint_at = self._place()
        return progress.step

    def _attempt(self, path: Path, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(
                    f"warning: {_explained(path, error)}; training goes on, and what was saved before stays: make room "
                    "on the disk, the next save tries again"
                )

    def _write_best(self) -> None:
        if self._best is not None:
            self._write(self._trainer.folder / BEST, self._best)
            self._best = None

    def _write_checkpoint(self) -> None:
        trainer, place = self._trainer, self._place()
        if self._checkpoint_at == place:
            return
        state = {
            "settings": _identity(trainer.settings),
            "base": self._base,
            "validation": self._validation(),
            "batches": trainer.batches.state_dict(),
            "progress": asdict(trainer.progress),
        }
        save_checkpoint(trainer.folder, trainer.progress.step, self._tensors(), state)
        self._checkpoint_at = place
        keep_newest(trainer.folder, trainer.settings.keep_checkpoints)

    def _write_adapter(self) -> None:
        step = self._trainer.progress.step
        if self._adapter_at != step:
            self._write(self._trainer.folder, current_adapter(self._trainer.model, str(self._trainer.folder)))
            self._adapter_at = step

    def _write(self, folder: Path, adapter: Adapter) -> None:
        write_folder(folder, adapter, len(self._trainer.model.layers), self._adapter_config)

    def _tensors(self) -> dict[str, mx.array]:
        model, optimizer = self._trainer.model.trainable_parameters(), self._trainer.optimizer.state
        return {
            f"{kind}/{name}": array
            for kind, tree in (("model", model), ("optimizer", optimizer))
            for name, array in tree_flatten(tree)
        }

    def _place(self) -> Any:
        batches = self._trainer.batches
        return self._trainer.progress.step, batches.epoch, batches.step

    def _validation(self) -> str | None:
        validation = self._trainer.validation
        return None if validation is None else validation.state_dict()["data_hash"]

    def _agree(self, step: int) -> None:
        """Sees to it that all processes go on from the same step."""
        group = self._trainer.group
        if group is None:
            return
        steps = mx.distributed.all_gather(mx.array([step]), group=group).tolist()
        if len({*steps}) > 1:
            raise RequestError(
                f"the processes have checkpoints of the steps {steps}, -1 for none; the first one writes them, so copy "
                f"the folder {self._trainer.folder / FOLDER} to the other machines"
            )

    def _progress_of(self, state: Mapping[str, Any]) -> Progress:
        """The counters of a checkpoint whose state is all there, and nothing else."""
        kinds = {"settings": (dict,), "base": (str,), "validation": (str, type(None)), "batches": (dict,)}
        self._check_fields("state.json", state, {**kinds, "progress": (dict,)})
        numbers = {each.name: (int, float) if each.name == "best_loss" else (int,) for each in fields(Progress)}
        progress = state["progress"]
        self._check_fields("progress", progress, {**numbers, "recent": (list,)})
        if not all(type(loss) in (int, float) for loss in progress["recent"]) or progress["step"] < 0:
            raise damaged(self._trainer.folder, "its counters are no numbers")
        return Progress(**progress)

    def _check_fields(self, where: str, given: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
        for name in [*kinds, *given]:
            if name not in given:
                raise damaged(self._trainer.folder, f"{where} has no {name}")
            if name not in kinds:
                raise damaged(self._trainer.folder, f"{where} has {name!r:.40}, which is not known")
            if type(given[name]) not in kinds[name]:
                raise damaged(self._trainer.folder, f"{where} has {name} {given[name]!r:.40}")

    def _check_same_run(self, state: Mapping[str, Any]) -> None:
        settings, then, now = self._trainer.settings, state["settings"], _identity(self._trainer.settings)
        if then.keys() != now.keys():
            raise damaged(self._trainer.folder, f"its settings do not match: {min(then.keys() ^ now.keys())!r:.40}")
        for name, value in now.items():
            if then[name] == value or (name == "iters" and not settings.rate_depends_on_iters):
                continue
            if name == "grad_checkpoint":
                self._warn("grad_checkpoint is not as it was: the last bits may differ from those of the unbroken run")
                continue
            raise RequestError(
                f"the checkpoint in {self._trainer.folder} is of a run with {name} {then[name]!r:.60}, here it is "
                f"{value!r:.60}; name another --adapter-path, or train with the same settings"
            )
        for name, mine in (("base", self._base), ("validation", self._validation())):
            if state[name] != mine:
                what = "on another base model" if name == "base" else "with another validation set"
                raise CheckpointError(
                    f"the checkpoint in {self._trainer.folder} is of a run {what}; give it the same one, or name "
                    "another --adapter-path"
                )

    def _check_tensors(self, tensors: Mapping[str, mx.array]) -> None:
        expected = self._tensors()
        for name in [*expected, *tensors]:
            if name not in tensors or name not in expected:
                raise damaged(self._trainer.folder, f"{name} is {'left over' if name in tensors else 'missing'}")
            (shape, dtype), (own_shape, own_dtype) = ((t[name].shape, t[name].dtype) for t in (tensors, expected))
            if shape != own_shape or dtype != own_dtype:
                raise damaged(self._trainer.folder, f"{name} has shape {list(shape)}, the run's {list(own_shape)}")


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings that the numbers depend on, as JSON has them; the rest may change before a run is resumed."""
    return json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in _FREE}))


def _explained(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename or path} could not be written: {reason}"
