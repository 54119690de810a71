"""The work folder of a calibration: its candidates and streams, and how far it has come.

A killed run leaves the folder behind, and the same command goes on from it. Each step writes files that the next one
reads. A step is done once the progress file is replaced; only then are the files removed that it has read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, ConfigError, RequestError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.json_file import JsonObject, read_json
from phi4_mlx.files.lazy_arrays import unchanged
from phi4_mlx.files.safetensors import Stored, TensorWriter, read_header

from .quantize import Layout

PROGRESS_FILE = "progress.json"


class WorkFolder:
    """The folder of one run.

    Attributes:
        path: the folder.
        step: how many steps are done.
        state: what the done steps have found, any JSON.

    Args:
        path: may exist; then the run goes on if its settings are the same, and starts again if they are not.
        settings: everything that the result depends on, any JSON.
        tell: called with a line for the user.

    Raises:
        RequestError: something else has the folder's name.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, settings: JsonObject, tell: Callable[[str], object]):
        self.path, self._settings = path, json.loads(json.dumps(settings))
        self.step, self.state = 0, JsonObject()
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RequestError(f"{path} is not a folder, and the calibration keeps its work in one there; remove it")
        if path.exists():
            found = self._read()
            made_with = found.get("settings", {})
            different = sorted(key for key in settings if made_with.get(key) != self._settings[key])
            if found and not different:
                self.step, self.state = found["step"], found["state"]
                tell(f"the calibration goes on in {path}, where {self.step} steps are done")
                return
            another = f"was made with another {' and another '.join(different)}"
            tell(f"the calibration starts again: {path} {another if found else 'has no readable progress'}")
            shutil.rmtree(path)
        else:
            tell(f"calibrating; if this run is stopped, the same command goes on from {path}")
        path.mkdir()

    def _read(self) -> JsonObject:
        try:
            found = read_json(self.path / PROGRESS_FILE)
        except ConfigError:
            return {}
        kinds = {"step": int, "state": dict, "settings": dict}
        return found if all(isinstance(found.get(key), kind) for key, kind in kinds.items()) else {}

    def finish(self, step: int) -> None:
        """Counts a step, and removes the streams that only it has read."""
        self.step = step
        found = {"settings": self._settings, "step": step, "state": self.state}
        with replacing(self.path / PROGRESS_FILE) as partial:
            partial.write_text(json.dumps(found))
        for folder in self.path.glob("streams-*"):
            if folder.name != f"streams-{step}":
                shutil.rmtree(folder)

    def begin(self) -> None:
        """Removes the streams that a killed run left of the step to come."""
        shutil.rmtree(self._streams(self.step + 1), ignore_errors=True)
        self._streams(self.step + 1).mkdir()

    def streams(self) -> list[str]:
        """Names of the streams that the next step reads."""
        return sorted(path.stem for path in self._streams(self.step).glob("*.safetensors"))

    def load(self, name: str) -> list[mx.array]:
        """The arrays of a stream that the last step wrote.

        Raises:
            CheckpointError: the file is damaged or gone.
        """
        path = self._streams(self.step) / f"{name}.safetensors"
        with unchanged(f"the arrays of {path}"):
            found = mx.load(str(path))
            assert isinstance(found, dict)
            arrays = [found[str(number)] for number in range(len(found))]
            mx.eval(arrays)
        return arrays

    def save(self, name: str, arrays: Sequence[mx.array]) -> None:
        """Writes a stream for the next step."""
        layout = {str(number): (name_of(each.dtype), each.shape) for number, each in enumerate(arrays)}
        with TensorWriter(self._streams(self.step + 1) / f"{name}.safetensors", layout) as writer:
            for number, array in enumerate(arrays):
                writer.write(str(number), [memoryview(mx.contiguous(array).view(mx.uint8))])

    def save_candidate(self, layout: Layout, blocks: Iterable[Sequence[mx.array]]) -> None:
        """Writes a quantised matrix.

        Args:
            layout: its tensors, the packed weight first.
            blocks: rows of each tensor, in order.
        """
        path, names = self._candidate(layout), list(layout)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        small = []
        with TensorWriter(path, layout) as writer:
            for weight, *rest in blocks:
                writer.append(names[0], memoryview(weight))
                small.append(rest)
            for name, pieces in zip(names[1:], zip(*small, strict=True), strict=True):
                writer.write(name, (memoryview(mx.contiguous(piece).view(mx.uint8)) for piece in pieces))

    def candidate(self, layout: Layout) -> tuple[Stored, ...]:
        """The tensors of a quantised matrix in its file.

        Raises:
            CheckpointError: the file is damaged or gone.
        """
        path = self._candidate(layout)
        infos = read_header(path)
        if infos.keys() != layout.keys():
            raise CheckpointError(f"{path} was changed; remove {self.path} and convert again")
        return tuple(Stored(path, name, infos[name]) for name in layout)

    def _candidate(self, layout: Layout) -> Path:
        (weight, (_, shape)), *_ = layout.items()
        return self.path / "candidates" / f"{weight.removesuffix('.weight')}-{shape[1]}.safetensors"

    def _streams(self, step: int) -> Path:
        return self.path / f"streams-{step}"
