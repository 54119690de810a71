"""The file beside an unfinished transcript, from which a later run continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from phi4_mlx.errors import ConfigError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.json_file import read_json
from phi4_mlx.transcription.parts import Part

_VERSION = 1  # of the file's layout and of the places where sound is cut


class Progress:
    """The segments of a transcript so far, on the disk after each.

    Attributes:
        file: where they are.
    """

    def __init__(self, output: Path, sound: str, model: str, task: str) -> None:
        """Reads what an earlier run has left, if it was of the same sound, model and task.

        Args:
            output: the file of the transcript.
            sound: SHA-256 of the sound's file.
            model: of the model, see `model_identity`.
            task: the words of the task.
        """
        self.file = output.with_name(f".{output.name}.unfinished")
        self._about = {"version": _VERSION, "sound": sound, "model": model, "task": task}
        self._texts: dict[str, str] = {}
        with contextlib.suppress(ConfigError):  # none, or damaged: begin again
            found = read_json(self.file)
            texts = found.pop("texts", None)
            if (
                found == self._about
                and isinstance(texts, dict)
                and all(isinstance(text, str) for text in texts.values())
            ):
                self._texts = texts

    def text_of(self, part: Part) -> str | None:
        """The text of a part that an earlier run has finished; None for another."""
        return self._texts.get(_key(part))

    def add(self, part: Part, text: str) -> None:
        """Notes the text of a part and writes the file.

        Raises:
            OSError: the file cannot be written.
        """
        self._texts[_key(part)] = text
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as path:
            path.write_text(json.dumps({**self._about, "texts": self._texts}, ensure_ascii=False), encoding="utf-8")

    def remove(self) -> None:
        """Removes the file: the transcript is written."""
        self.file.unlink(missing_ok=True)


def model_identity(folder: Path) -> str:
    """A digest that another model's files do not have: of their names, sizes and times of change.

    Args:
        folder: of the model.
    """
    found = [(path.relative_to(folder), path.stat()) for path in sorted(folder.rglob("*.[sj]*"))]
    files = [(str(name), stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _key(part: Part) -> str:
    return f"{part.start:.3f}-{part.end:.3f}"
