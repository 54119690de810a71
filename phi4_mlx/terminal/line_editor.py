"""Line editing at the chat's prompt: messages of several lines, a history file, and Tab completion.

Enter sends; Alt-Enter, or a backslash before Enter, begins a new line; pasted line breaks stay.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from phi4_mlx.files.regular_file import open_regular

HISTORY_BYTES = 2**20  # that are read at the start


def state_folder() -> Path:
    """The folder of this user's history and rescued chat: the platform's folder for a program's state."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "phi4_mlx"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "phi4_mlx"


class LineEditor:
    """Reads a person's messages.

    Args:
        words: the commands that Tab completes, each with a space at its end if more follows it.
        paths: by command, the path of a file after which Tab completes: True for the names of files to offer. Folders
            are always offered.
        colour: True if the prompt may be styled.
    """

    def __init__(self, words: Sequence[str], paths: Mapping[str, Callable[[str], bool]], colour: bool) -> None:
        self._prompt = ANSI("\x1b[1;32m> \x1b[0m") if colour else "> "
        self._session: PromptSession[str] = PromptSession(
            history=_History(state_folder() / "history"),
            completer=CommandCompleter(words, paths),
            complete_while_typing=False,
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation="  ",
            enable_suspend=True,
        )

    def read(self) -> str:
        """Reads the next message.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """
        return _unicode(self._session.prompt(self._prompt))

    def abandon(self, reason: BaseException) -> bool:
        """Makes a running `read` raise `reason`; for signal handlers. Returns True if a `read` was running."""
        app = self._session.app
        if not app.is_running or app.loop is None:
            return False
        app.loop.call_soon_threadsafe(lambda: None if app.is_done else app.exit(exception=reason))
        return True


class CommandCompleter(Completer):
    """Completes commands, and paths after those that take one; the arguments are as for `LineEditor`."""

    def __init__(self, words: Sequence[str], paths: Mapping[str, Callable[[str], bool]]) -> None:
        self._words, self._paths = words, paths

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """The command whose beginning is typed, or the path of a file after a command that takes one."""
        typed = document.text_before_cursor
        if not typed.startswith("/"):
            return
        command, space, path = typed.partition(" ")
        for word in self._words:
            if word.startswith(typed) and word.rstrip().count(" ") == typed.count(" "):
                yield Completion(word, -len(typed))
        if space and command in self._paths:
            yield from _completed_paths(path.lstrip(), self._paths[command])


def _completed_paths(typed: str, offered: Callable[[str], bool]) -> Iterator[Completion]:
    """Completes the path of a file or folder; after a file, an opening quote is closed."""
    quote = typed[:1] if typed[:1] in ("'", '"') else ""
    start = typed[1:] if quote else typed.replace("\\ ", " ")
    folder, name = os.path.split(start)
    if start == "~":
        folder, name = "~", ""
    with contextlib.suppress(OSError, ValueError), os.scandir(os.path.expanduser(folder) or ".") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
                continue
            if entry.is_dir() or offered(entry.name):
                end = "/" if entry.is_dir() else quote
                yield Completion(quote + os.path.join(folder, entry.name) + end, -len(typed), display=entry.name)


class _History(FileHistory):
    """A history file that only its owner can read; if it cannot be written, the history ends with the program."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o600))

    def load_history_strings(self) -> Iterable[str]:
        """The messages, the newest first; of a long file only the end, as of a pipe nothing."""
        try:
            with open_regular(Path(str(self.filename))) as file:
                file.seek(max(file.seek(0, os.SEEK_END) - HISTORY_BYTES, 0))
                data = file.read(HISTORY_BYTES)
        except OSError:
            return []
        messages: list[str] = []
        lines: list[str] = []
        for line in [*data.decode("utf-8", "replace").split("\n"), ""]:
            if line.startswith("+"):
                lines.append(line[1:])
            elif lines:
                messages.append("\n".join(lines))
                lines = []
        return messages[::-1]

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(_unicode(string))


def _unicode(text: str) -> str:
    """The text with question marks for invalid bytes, which prompt_toolkit passes on as surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
