"""Where a run stands, on disk: whole or absent, and enough to go on as if nothing had happened.

`checkpoints/00000100` in the adapter folder holds what is trained and the optimizer, in tensors.safetensors, and the
counters, in state.json. A folder gets its name when everything in it is on the disk, so one with a name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.config import read_json
from phi4_mlx.errors import CheckpointError
from phi4_mlx.tensor_file import sync

FOLDER = "checkpoints"


def save_checkpoint(adapter_path: Path, step: int, tensors: Mapping[str, mx.array], state: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a step.

    Raises:
        OSError: the disk is full, say; the older checkpoints are still there, whole.
    """
    folder = adapter_path / FOLDER / f"{step:08}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        try:
            mx.save_safetensors(str(partial / "tensors.safetensors"), dict(tensors))
        except RuntimeError as error:  # how MLX says that the disk is full
            raise OSError(f"{partial}: {error}") from None
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():  # the same step, from before a resume
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


def keep_newest(adapter_path: Path, count: int) -> None:
    """Removes all but the newest checkpoints."""
    for folder in _checkpoints(adapter_path)[:-count]:
        shutil.rmtree(folder)


def newest_checkpoint(adapter_path: Path) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
    """The tensors and the state of the newest checkpoint; None where there is none.

    Raises:
        CheckpointError: it was damaged since it was written.
    """
    folders = _checkpoints(adapter_path)
    if not folders:
        return None
    try:
        tensors = mx.load(str(folders[-1] / "tensors.safetensors"))
        mx.eval(tensors)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{folders[-1]} is damaged: {error}; remove it, and --resume takes the one before"
        ) from None
    return dict(tensors), read_json(folders[-1] / "state.json")


def _checkpoints(adapter_path: Path) -> list[Path]:
    return sorted(path for path in (adapter_path / FOLDER).glob("[0-9]*") if path.name.isdigit())
