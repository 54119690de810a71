"""The watcher of one rank: a process of its own, that ends the job on all ranks when one of them fails.

It stands beside the rank: a thread in it would stop where native code keeps the interpreter's lock, and would freeze
with it. The leader's watcher is connected to the watcher of each follower. Each sends a beat, and whoever finds a
failure sends the line that names the rank; the leader's passes it on. Started by file: the standard library is all that
it may import.

    the rank has ended                its end of the socket closes
    the rank is frozen (SIGSTOP)      its process is in the state T
    a machine is gone, or unplugged   no beat for `SILENT_S`
    a collective hangs                an operation takes far longer than any before
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Any, NoReturn

ALIVE, END = b".", b"!"
"""What a rank hears from its watcher."""

BEAT_S = 0.5
SILENT_S = 6.0
"""Seconds without a beat after which a machine counts as gone; leaves time for the line within 10 s."""

FROZEN_S = 2.0
LOOK_S = 1.0
"""Seconds between two looks at the state of the rank's process: where there is no /proc, each starts `ps`."""

CAUSE_S = 0.5
"""Seconds that the end of a rank at the start waits for another's line: mlx.launch ends the others after the first."""

OPENING_S = 60.0
"""Limit for the backend to open after all ranks have met."""

OPERATION_S = 8.0
"""Least limit of an operation that has no more tokens than one before it."""

FIRST_OPERATION_S = 180.0
"""Least limit of an operation of a new kind, or with more tokens than all before it: kernels are compiled."""

AFTER_IDLE_S = 60.0
"""Least limit of an operation after `IDLE_S` without one: the machine may have moved the weights out of memory."""

IDLE_S = 10.0

TIMES_LONGER = 4.0
"""Limit of an operation, as a multiple of the longest so far."""

_MOST_BYTES = 2**16  # of a line between watchers
_LONGEST = 1500  # characters of the line that is printed


class Progress:
    """The operations that run, and how long they may take. Times are in seconds, of any clock."""

    def __init__(self) -> None:
        self._running: deque[tuple[int, int, bool]] = deque()  # (counter, tokens, new)
        self._since = 0.0  # when the first of them began
        self._idle_since = 0.0
        self._after_idle = False
        self._most_tokens = 0
        self._longest_s = 0.0

    def told(self, counter: int, tokens: int, now: float, new: bool = False) -> None:
        """An operation begins, after those before it."""
        if not self._running:
            self._since, self._after_idle = now, now - self._idle_since > IDLE_S
        self._running.append((counter, max(tokens, 1), new))

    def done(self, counter: int, now: float) -> None:
        """All ranks have done the operations up to this one."""
        while self._running and self._running[0][0] <= counter:
            _, tokens, _ = self._running.popleft()
            self._most_tokens = max(self._most_tokens, tokens)
            self._longest_s = max(self._longest_s, now - self._since)
            self._since = self._idle_since = now
            self._after_idle = False

    def shift(self, seconds: float) -> None:
        """Leaves time out in which this process did not run."""
        self._since += seconds

    def limit_s(self) -> float:
        """How long the operation that runs may take."""
        _, tokens, new = self._running[0] if self._running else (0, 0, False)
        if tokens <= self._most_tokens and not new:
            return max(AFTER_IDLE_S if self._after_idle else OPERATION_S, TIMES_LONGER * self._longest_s)
        growth = max(1.0, tokens / self._most_tokens) if self._most_tokens else 1.0
        return max(FIRST_OPERATION_S, TIMES_LONGER * self._longest_s * growth)

    def overdue(self, now: float) -> tuple[int, float] | None:
        """(counter, its limit) of an operation that takes too long."""
        if self._running and now - self._since > self.limit_s():
            return self._running[0][0], self.limit_s()
        return None


class Link:
    """A connection by which lines of JSON come and go."""

    def __init__(self, descriptor: int):
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(False)
        self.heard = time.monotonic()
        self.closed = False  # after an ordinary end
        self._buffer = b""

    def send(self, data: bytes) -> None:
        """Sends some bytes; loses them where the connection takes no more."""
        with contextlib.suppress(OSError):
            self.socket.send(data)

    def receive(self) -> list[dict[str, Any]]:
        """The lines that have come.

        Raises:
            OSError: the other side is gone.
        """
        try:
            part = self.socket.recv(_MOST_BYTES)
        except BlockingIOError:
            return []
        if not part:
            raise ConnectionError
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        if len(self._buffer) > _MOST_BYTES:
            raise ConnectionError
        self.heard = time.monotonic()
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            raise ConnectionError from None


class Watcher:
    """The loop of the watcher's process."""

    def __init__(self, about: dict[str, Any]):
        self._rank: int = about["rank"]
        self._process: int = about["process"]
        self._processes: list[int] = [self._process, *about["above"]]
        self._names = {int(rank): name for rank, name in about["names"].items()}
        self._own = Link(about["own"])
        self._peers = {int(rank): Link(descriptor) for rank, descriptor in about["beats"].items()}
        self._progress = Progress()
        self._done = dict.fromkeys(self._peers, 0)  # rank -> the last operation that it has done
        self._own_done = 0
        self._opening_since: float | None = None
        self._looked = 0.0  # at the state of the process
        self._stopped_since: float | None = None
        self._gone = f"{self._names[self._rank]} has ended: it was killed, or has left with an error"
        self._gone_since: float | None = None
        self._beaten = 0.0
        self._met = False  # until then, the rank itself sees who comes and who goes
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._own.socket, selectors.EVENT_READ, self._own)

    def run(self) -> None:
        """Watches until the job ends."""
        looked = time.monotonic()
        while True:
            ready = [key.data for key, _ in self._selector.select(BEAT_S / 2)]
            now = time.monotonic()
            if now - looked > SILENT_S / 2:
                self._forgive(now - looked)
            looked = now
            for rank, link in self._peers.items():  # before its own rank, whose end may follow from theirs
                if link in ready:
                    self._hear(rank, link)
            if self._own in ready:
                self._hear_own(now)
            if now - self._beaten >= BEAT_S:
                self._beaten = now
                self._own.send(ALIVE)
                self._tell_peers({"done": self._own_done})
                self._check(now)
            if self._gone_since is not None and now - self._gone_since > CAUSE_S:
                self._end(self._gone)

    def _forgive(self, seconds: float) -> None:
        """Leaves out a time in which this process was stopped, or its machine slept."""
        self._progress.shift(seconds)
        self._stopped_since = None
        if self._opening_since is not None:
            self._opening_since += seconds
        for link in self._peers.values():
            link.heard += seconds

    def _hear_own(self, now: float) -> None:
        try:
            lines = self._own.receive()
        except OSError:
            if self._met:
                self._end(self._gone)
            self._selector.unregister(self._own.socket)
            self._gone_since = now
            self._meet(now)
            return
        for said in lines:
            if "told" in said:
                self._progress.told(said["told"], said["tokens"], now, said["new"])
            elif "done" in said:
                self._own_done = max(self._own_done, said["done"])
            elif "opening" in said:
                self._opening_since = now if said["opening"] else None
                self._meet(now)
            elif "end" in said:
                self._end(said["end"])
            elif "close" in said:
                self._tell_peers({"closed": True})
                os._exit(0)

    def _meet(self, now: float) -> None:
        """Begins to watch the peers: all ranks are there."""
        for link in () if self._met else self._peers.values():
            link.heard = now
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._met = True

    def _hear(self, rank: int, link: Link) -> None:
        try:
            lines = link.receive()
        except OSError:
            self._end(f"{self._names[rank]} has ended, or its connection was cut")
        for said in lines:
            if "end" in said:
                self._end(str(said["end"]))
            if "closed" in said:
                link.closed = True
                self._selector.unregister(link.socket)
                return
            if isinstance(said.get("done"), int):
                self._done[rank] = said["done"]

    def _check(self, now: float) -> None:
        """Ends the job if a limit is exceeded."""
        own = self._names[self._rank]
        for rank, link in self._peers.items():
            if self._met and not link.closed and now - link.heard > SILENT_S:
                why = "it is frozen, or its machine sleeps or is off the network"
                self._end(f"{self._names[rank]} has not been heard for {SILENT_S:g} s: {why}")
        if now - self._looked >= LOOK_S:
            self._looked = now
            if not any(map(_is_stopped, self._processes)):
                self._stopped_since = None
            elif self._stopped_since is None:
                self._stopped_since = now
            elif now - self._stopped_since >= FROZEN_S:
                self._end(f"{own} is frozen: its process was stopped by a signal")
        if self._opening_since is not None and now - self._opening_since > OPENING_S:
            self._end(f"{own} has waited {OPENING_S:g} s for the backend to open")
        self._progress.done(min(self._done.values()), now)
        if late := self._progress.overdue(now):
            counter, limit = late
            behind = [self._names[rank] for rank, done in self._done.items() if done < counter]
            self._end(f"{' and '.join(behind)} did not finish operation {counter} within {limit:.0f} s")

    def _tell_peers(self, value: dict[str, Any]) -> None:
        for link in self._peers.values():
            link.send(json.dumps(value).encode() + b"\n")

    def _end(self, line: str) -> NoReturn:
        """Tells all ranks, prints the line, and ends the rank with this process."""
        line = "".join(each if each.isprintable() else " " for each in line)[:_LONGEST]
        self._tell_peers({"end": line})
        with contextlib.suppress(OSError):
            os.write(2, f"phi4_mlx: {line}; the job ends\n".encode())
        for process in filter(_is_stopped, self._processes):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.kill(process, signal.SIGKILL)
        self._own.send(END)
        deadline = time.monotonic() + 1.0
        with contextlib.suppress(OSError):  # raised when the rank has left
            while time.monotonic() < deadline:
                self._own.receive()
                time.sleep(0.01)
            os.kill(self._process, signal.SIGKILL)  # in native code that keeps the interpreter's lock
        os._exit(0)


def _is_stopped(process: int) -> bool:
    """True if a signal has stopped a process."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:  # Linux; proc(5): the state follows the name in parentheses
            return file.read(4096).rpartition(b") ")[2][:1] == b"T"
    except OSError:
        pass
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, check=False, timeout=1)
        return shown.stdout.strip()[:1] == b"T"
    return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the rank as well, which says what becomes of the job
    Watcher(json.loads(sys.argv[1])).run()
