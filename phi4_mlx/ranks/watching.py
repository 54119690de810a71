"""A rank's own side of its watcher: starts the process, tells it what this rank does, and leaves when it says so."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from phi4_mlx.ranks.meeting import Met
from phi4_mlx.ranks.watcher import END

_CAUSE_S = 3.0  # far longer than the watchers need to see that a rank has ended
_MISSED_S = 3.0
_MISSED = 3  # in a row, as this process may have slept itself
_FAILED = 1


class Watching:
    """The watcher's process, which has the connections for beats from here on."""

    def __init__(self, rank: int, met: Met):
        self._name = met.names[rank]
        self._lock = threading.Lock()
        self._closed = False
        self._socket, theirs = socket.socketpair()
        above = multiprocessing.parent_process()  # the server's, of its engine: a rank is frozen where that one is
        beats = {peer: channel.detach() for peer, channel in met.beats.items()}
        about = {
            "rank": rank,
            "process": os.getpid(),
            "above": [] if above is None else [above.pid],
            "names": {str(each): name for each, name in met.names.items()},
            "own": theirs.fileno(),
            "beats": {str(peer): each.fileno() for peer, each in beats.items()},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("watcher.py")), json.dumps(about)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # what stops this process, Ctrl-Z too, does not stop the watcher
            pass_fds=[theirs.fileno(), *(each.fileno() for each in beats.values())],
        )
        for each in (theirs, *beats.values()):
            each.close()
        threading.Thread(target=self._obey, daemon=True).start()

    def told(self, counter: int, tokens: int, new: bool) -> None:
        """The leader has told the followers to run an operation."""
        self._say({"told": counter, "tokens": tokens, "new": new})

    def done(self, counter: int) -> None:
        """This follower has run an operation."""
        self._say({"done": counter})

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """The time in which the backend opens: it keeps the interpreter's lock, so no thread of this process runs."""
        self._say({"opening": True})
        yield
        self._say({"opening": False})

    def end(self, line: str) -> NoReturn:
        """Ends the job on all ranks with a line."""
        self._say({"end": line})
        time.sleep(_CAUSE_S)
        self._leave(f"{line}; the watcher does not answer")

    def wait_for_cause(self) -> None:
        """Gives the watcher time to end this process with the line that names the rank at fault."""
        time.sleep(_CAUSE_S)

    def close(self) -> None:
        """An ordinary end: the watcher leaves, and tells the others not to miss this rank."""
        with self._lock:
            self._closed = True
        self._say({"close": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CAUSE_S)
        self._socket.close()

    def _say(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the watcher is gone: `_obey` sees it too
            self._socket.sendall(json.dumps(value).encode() + b"\n")

    def _obey(self) -> None:
        """Leaves when the watcher says that the job has ended, or is gone itself."""
        self._socket.settimeout(_MISSED_S)
        missed = 0
        while missed < _MISSED:
            try:
                said = self._socket.recv(4096)
                missed = 0
            except TimeoutError:
                missed += 1
                continue
            except OSError:
                said = b""
            if END in said:
                os._exit(_FAILED)
            if not said:
                break
        with self._lock:
            if not self._closed:
                self._leave(f"{self._name}: its watcher was killed")

    def _leave(self, line: str) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"phi4_mlx: {line}; the job ends\n".encode())
        os._exit(_FAILED)
