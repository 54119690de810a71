"""Checkpoints on the disk, each of them complete or absent.

`checkpoints/00000100` in the adapter folder holds the trained parameters and the optimizer's state in
tensors.safetensors, the counters in state.json, and the SHA-256 of both in checksums.sha256. A folder gets its name
when all its files are on the disk, and loses it before the first of them is removed, so a named folder is complete.
A name with a leading dot marks a folder that is being written or removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.folder import TENSORS_FILE as ADAPTER_FILE
from phi4_mlx.errors import CheckpointError, ConfigError, RequestError, message_of
from phi4_mlx.files.atomic import sync
from phi4_mlx.files.checksums import checksums, differing_file
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.safetensors import read_header

FOLDER = "checkpoints"
TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
CHECKSUMS_FILE = "checksums.sha256"
NEW_RUN = "leave --resume out and name another --adapter-path for a new run"


def from_adapter(adapter_path: Path) -> str:
    """The way to train on with another schedule."""
    adapter = shlex.quote(str(adapter_path))
    return f"start a new run from its adapter with --resume-adapter-file {adapter} and another --adapter-path"


State = dict[str, Any]
"""JSON values by name."""


def save_checkpoint(adapter_path: Path, step: int, tensors: Mapping[str, mx.array], state: State) -> None:
    """Writes the checkpoint of a step; replaces one of the same step.

    Args:
        adapter_path: the run's folder.
        step: its number.
        tensors: content of tensors.safetensors.
        state: content of state.json.

    Raises:
        OSError: the checkpoint could not be written, for example on a full disk; the older ones are complete.
    """
    folder = adapter_path / FOLDER / f"{step:08}"
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    _put_back(adapter_path)
    _sweep(adapter_path)
    partial.mkdir(parents=True)
    try:
        try:
            mx.save_safetensors(str(partial / TENSORS_FILE), dict(tensors))
        except RuntimeError as error:  # how MLX reports a full disk
            raise OSError(errno.EIO, message_of(error), str(partial / TENSORS_FILE)) from None
        (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        listed = checksums((name, partial / name) for name in (TENSORS_FILE, STATE_FILE))
        (partial / CHECKSUMS_FILE).write_text(listed, encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        _put_back(adapter_path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def keep_newest(adapter_path: Path, count: int) -> None:
    """Removes all but the newest checkpoints."""
    for folder in checkpoints(adapter_path)[:-count]:
        gone = folder.with_name(f".{folder.name}.partial")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def newest_checkpoint(adapter_path: Path) -> tuple[dict[str, mx.array], State] | None:
    """Reads the newest checkpoint.

    Returns:
        (tensors, state); None if there is no checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    _put_back(adapter_path)
    folders = checkpoints(adapter_path)
    if not folders:
        return None
    if differing := differing_file(folders[-1] / CHECKSUMS_FILE, (TENSORS_FILE, STATE_FILE)):
        missing = not (folders[-1] / differing).exists()
        listed = "is not a list of its files" if differing == CHECKSUMS_FILE else "does not have its saved SHA-256"
        raise damaged(adapter_path, f"{differing} {'is missing' if missing else listed}")
    try:
        read_header(folders[-1] / TENSORS_FILE)  # MLX trusts a header; anybody can compute a checksum
        tensors = mx.load(str(folders[-1] / TENSORS_FILE))
        mx.eval(tensors)
        return dict(tensors), read_json(folders[-1] / STATE_FILE)
    except CheckpointError:
        raise damaged(adapter_path, f"{TENSORS_FILE} is not a safetensors file, or has a false header") from None
    except (RuntimeError, OSError, ConfigError) as error:
        raise damaged(adapter_path, message_of(error)) from None


def damaged(adapter_path: Path, reason: str) -> CheckpointError:
    """The error for a newest checkpoint that cannot be used."""
    *older, newest = checkpoints(adapter_path)
    if older:
        way = "--resume takes the one before"
    elif (adapter_path / ADAPTER_FILE).exists():
        way = f"start from the adapter: leave --resume out and give --resume-adapter-file {adapter_path}"
    else:
        way = "leave --resume out to start a new run, it was the only one"
    return CheckpointError(f"{newest} is damaged: {reason}; remove it, and {way}")


def no_checkpoint(adapter_path: Path) -> RequestError:
    """The error for a folder without a checkpoint to resume from."""
    way = "leave --resume out to start a new run"
    if (adapter_path / ADAPTER_FILE).exists():
        way = f"leave --resume out and start from its adapter with --resume-adapter-file {adapter_path}"
    return RequestError(f"{adapter_path} holds no checkpoint to resume from; {way}")


def checkpoints(adapter_path: Path) -> list[Path]:
    """The folders of the checkpoints, the oldest first."""
    return sorted(path for path in (adapter_path / FOLDER).glob("[0-9]*") if path.name.isdigit())


def _put_back(adapter_path: Path) -> None:
    """Gives a checkpoint its name back if a run was killed, or failed, while it was being replaced."""
    for old in (adapter_path / FOLDER).glob(".[0-9]*.old"):
        named = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not named.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has just done it
                old.rename(named)


def _sweep(adapter_path: Path) -> None:
    """Removes unfinished folders of killed runs."""
    for kind in ("partial", "old"):
        for left in (adapter_path / FOLDER).glob(f".[0-9]*.{kind}"):
            shutil.rmtree(left, ignore_errors=True)
