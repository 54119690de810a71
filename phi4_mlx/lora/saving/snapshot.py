"""A snapshot of a run between two steps, and the checks before a run resumes from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.lora.progress import Progress
from phi4_mlx.lora.saving.checkpoints import NEW_RUN, State, damaged, from_adapter, newest_checkpoint
from phi4_mlx.lora.settings import Settings

# Settings that do not change the numbers, and model and data, which are compared by hash instead of by name.
_FREE = {
    "model", "data", "adapter_path", "epochs", "steps_per_report", "report_to", "save_every", "keep_checkpoints",
    "patience", "test", "test_batches", "given",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    Attributes:
        tensors: the trained parameters as "model/<path>", the optimizer's state as "optimizer/<path>".
        settings: the settings that the numbers depend on; see `fixed_settings`.
        base: fingerprint of the base model.
        validation: hash of the validation set; None without one.
        batches: position in the training data; see `Batches.state_dict`.
        progress: counters of the run.
        metrics: proof of the lines of metrics.jsonl; see `MetricsLog.proof`. None without.
    """

    tensors: Mapping[str, mx.array]
    settings: State
    base: str
    validation: str | None
    batches: State
    progress: Progress
    metrics: State | None = None

    @property
    def place(self) -> tuple[object, ...]:
        """(step, epoch, batch of the epoch), which identify a snapshot within its run."""
        return self.progress.step, self.batches.get("epoch"), self.batches.get("step")

    def state(self) -> State:
        """Everything but the tensors, as JSON values."""
        return {
            "settings": self.settings,
            "base": self.base,
            "validation": self.validation,
            "batches": self.batches,
            "progress": asdict(self.progress),
            "metrics": self.metrics,
        }


def fixed_settings(settings: Settings, iters: int) -> State:
    """The settings that must not change before a run of `iters` batches is resumed, as JSON values."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in _FREE} | {"iters": iters}
    values: State = json.loads(json.dumps(fixed))
    return values


def read_snapshot(folder: Path) -> Snapshot | None:
    """Reads the newest checkpoint of a run's folder; None if there is none.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    found = newest_checkpoint(folder)
    if found is None:
        return None
    tensors, state = found
    kinds: dict[str, tuple[type, ...]] = {
        "settings": (dict,), "base": (str,), "validation": (str, type(None)), "batches": (dict,),
        "metrics": (dict, type(None)),
    }  # fmt: skip
    _check_fields(folder, "state.json", state, {**kinds, "progress": (dict,)})
    progress = _read_progress(folder, state["progress"])
    if state["metrics"] is not None:
        _check_fields(folder, "metrics", state["metrics"], {"bytes": (int,), "sha256": (str,)})
    known = {name: state[name] for name in kinds}
    return Snapshot(tensors, progress=progress, **known)


def check_same_run(
    found: Snapshot, own: Snapshot, folder: Path, warn: Callable[[str], Any], *, iters_may_differ: bool
) -> None:
    """Checks that a run can resume from a snapshot with the same numbers.

    Args:
        found: the snapshot that was read.
        own: a snapshot of the run that is about to resume.
        folder: the run's folder, for messages.
        warn: called with a message about a difference that changes the last bits only.
        iters_may_differ: True if the learning rate does not depend on the length of the run.

    Raises:
        CheckpointError: the checkpoint is damaged, or its base model or validation set is another one.
        RequestError: a setting differs.
    """
    if found.settings.keys() != own.settings.keys():
        differing = min(found.settings.keys() ^ own.settings.keys())
        raise damaged(folder, f"its settings do not match: {differing!r:.40}")
    for name, value in own.settings.items():
        then = found.settings[name]
        if then == value or (name == "iters" and iters_may_differ):
            continue
        if name == "grad_checkpoint":
            warn("grad_checkpoint has changed: the last bits may differ from those of the uninterrupted run")
            continue
        if name == "iters":
            raise RequestError(
                f"the checkpoint in {folder} is of a run of {then:,} batches, here it is one of {value:,}, and its "
                f"--lr-schedule {own.settings['lr_schedule']} falls over the whole run; go on with --iters {then}, or "
                f"{from_adapter(folder)}; only a run with --lr-schedule constant can be made longer"
            )
        raise RequestError(
            f"the checkpoint in {folder} is of a run with {name} {then!r:.60}, here it is {value!r:.60}; train "
            f"with the same settings, or {NEW_RUN}"
        )
    different = "on another base model" if found.base != own.base else ""
    if not different and found.validation != own.validation:
        different = "with another validation set"
    if different:
        raise CheckpointError(
            f"the checkpoint in {folder} is of a run {different}; use the same one, or {NEW_RUN}"
        )
    _check_tensors(folder, found.tensors, own.tensors)
    then, now, step = found.settings["iters"], own.settings["iters"], found.progress.step
    if now < step:
        raise RequestError(
            f"the checkpoint in {folder} is of step {step:,}, and the run is to end at {now:,}; give a larger --iters "
            f"or --epochs, or {NEW_RUN}"
        )
    if now != then:
        warn(f"the run had {then:,} batches, and has {now:,} now")


def _read_progress(folder: Path, given: State) -> Progress:
    numbers = {each.name: (int, float) if each.name == "best_loss" else (int,) for each in fields(Progress)}
    _check_fields(folder, "progress", given, {**numbers, "recent": (list,)})
    if not all(type(loss) in (int, float) for loss in given["recent"]) or given["step"] < 0:
        raise damaged(folder, "its counters are not numbers from 0")
    return Progress(**given)


def _check_fields(folder: Path, where: str, given: State, kinds: Mapping[str, tuple[type, ...]]) -> None:
    for name in [*kinds, *given]:
        if name not in given:
            raise damaged(folder, f"{where} has no {name}")
        if name not in kinds:
            raise damaged(folder, f"{where} has {name!r:.40}, which is not known")
        if type(given[name]) not in kinds[name]:
            raise damaged(folder, f"{where} has {name} {given[name]!r:.40}")


def _check_tensors(folder: Path, found: Mapping[str, mx.array], own: Mapping[str, mx.array]) -> None:
    for name in [*own, *found]:
        if name not in found or name not in own:
            raise damaged(folder, f"{name} is {'left over' if name in found else 'missing'}")
        if (found[name].shape, found[name].dtype) != (own[name].shape, own[name].dtype):
            shapes = f"{list(found[name].shape)}, the run's {list(own[name].shape)}"
            raise damaged(folder, f"{name} has shape {shapes}")
