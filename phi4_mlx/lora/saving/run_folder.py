"""The folder of a run: metrics, the best adapter, checkpoints and the newest adapter.

The order of writing keeps every checkpoint true: first the step's line of metrics, then the best adapter if this step
is the best, then the checkpoint, which refers to both, and last the newest adapter, which can be made again from the
checkpoint. Whenever the process dies, everything that the newest checkpoint refers to is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.adapters.folder import TENSORS_FILE, Adapter, write_folder
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.saving.checkpoints import FOLDER, State, checkpoints, keep_newest, save_checkpoint
from phi4_mlx.lora.saving.snapshot import Snapshot, read_snapshot

if TYPE_CHECKING:
    from phi4_mlx.lora.progress import Step
    from phi4_mlx.lora.saving.metrics import MetricsLog

BEST = "best"

Write = tuple[Path, Callable[[], None]]
"""(the path that a message names, the function that writes it)"""


class RunFolder:
    """Writes the folder of a run.

    Args:
        path: the folder; holds the newest adapter.
        total_layers: layers of the model; adapter_config.json counts its layers from the last one.
        keep_checkpoints: number of newest checkpoints that stay.
        adapter_config: additional fields of adapter_config.json.
        warn: called with a warning when a file cannot be written, the first time only.

    Attributes:
        path: the folder.
        metrics: the log to which each step is added; None for none.
        metrics_proof: what the newest checkpoint says of metrics.jsonl; see `MetricsLog.proof`.
    """

    def __init__(
        self,
        path: Path,
        total_layers: int,
        *,
        keep_checkpoints: int = 3,
        adapter_config: Mapping[str, Any] | None = None,
        warn: Callable[[str], Any] = lambda message: None,
    ):
        self.path, self.warn = path, warn
        self.metrics: MetricsLog | None = None
        self._total_layers, self._keep = total_layers, keep_checkpoints
        self._adapter_config = adapter_config or {}
        self._warned = False
        self._best: Adapter | None = None  # the best adapter, until it is on the disk
        self._checkpoint_at: tuple[object, ...] | None = None  # place of the newest checkpoint
        self._adapter_at: int | None = None  # step of the newest adapter
        self.metrics_proof: State | None = None

    def newest(self) -> Snapshot | None:
        """Reads the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        found = read_snapshot(self.path)
        if found is not None:
            self._checkpoint_at, self.metrics_proof = found.place, found.metrics
        return found

    def add_step(self, step: Step, best: Adapter | None) -> None:
        """Writes the metrics of a step, and its adapter if it is the best so far. A full disk is only a warning.

        Args:
            step: the step that has just been made.
            best: the adapter after this step if its validation loss is the lowest so far, else None.
        """
        if self.metrics is not None:
            metrics = self.metrics
            self._attempt(metrics.path, lambda: metrics.add(step))
        if best is not None:
            self._best = best
            self._attempt(*self._best_write())

    def save(self, snapshot: Snapshot, adapter: Adapter) -> None:
        """Writes a checkpoint and the newest adapter, unless they are there. A full disk is only a warning.

        Args:
            snapshot: the run as it is now.
            adapter: the adapter as it is now.
        """
        for write in self._writes(snapshot, adapter):
            self._attempt(*write)

    def finish(self, snapshot: Snapshot, adapter: Adapter) -> None:
        """Writes everything that is not on the disk yet.

        Args:
            snapshot: the run at its end.
            adapter: the adapter at its end.

        Raises:
            RequestError: a file could not be written; all others are.
        """
        writes = self._writes(snapshot, adapter)
        if self.metrics is not None:
            writes = [(self.metrics.path, self.metrics.flush), *writes]
        failed = ""
        for path, write in writes:
            try:
                write()
            except OSError as error:
                failed = failed or _explained(path, error)
        if failed:
            way = "--resume makes the last steps again" if checkpoints(self.path) else "start the run again"
            raise RequestError(f"{failed}; make room on the disk, then {way}")

    def _attempt(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.warn(
                    f"warning: {_explained(path, error)}; training continues, and what was saved before stays: make "
                    "room on the disk, the next save tries again"
                )

    def _writes(self, snapshot: Snapshot, adapter: Adapter) -> list[Write]:
        """Everything that may be missing on the disk, in the order in which it has to be written."""
        return [
            self._best_write(),
            (self.path / FOLDER, lambda: self._write_checkpoint(snapshot)),
            (self.path / TENSORS_FILE, lambda: self._write_adapter(snapshot.progress.step, adapter)),
        ]

    def _best_write(self) -> Write:
        return self.path / BEST / TENSORS_FILE, self._write_best

    def _write_best(self) -> None:
        if self._best is not None:
            write_folder(self.path / BEST, self._best, self._total_layers, self._adapter_config)
            self._best = None

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        if self._checkpoint_at != snapshot.place:
            if self.metrics is not None:
                snapshot = replace(snapshot, metrics=self.metrics.proof())
            save_checkpoint(self.path, snapshot.progress.step, snapshot.tensors, snapshot.state())
            self._checkpoint_at = snapshot.place
            keep_newest(self.path, self._keep)

    def _write_adapter(self, step: int, adapter: Adapter) -> None:
        if self._adapter_at != step:
            write_folder(self.path, adapter, self._total_layers, self._adapter_config)
            self._adapter_at = step


def _explained(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename or path} could not be written: {reason}"
