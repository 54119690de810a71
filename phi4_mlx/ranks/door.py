"""The leader's listening socket while the ranks meet: who knocks, and who is let in."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass

from phi4_mlx.errors import RequestError
from phi4_mlx.ranks.channel import HELLO_BYTES, JSON, Channel
from phi4_mlx.ranks.launch import CHANNEL, Launch

HELLO_S = 3.0
"""Seconds for one message of the handshake."""

PROTOCOL = 1
PURPOSES = ("commands", "beats")


@dataclass(frozen=True)
class Guest:
    """One connection of a follower.

    Attributes:
        rank: of the follower.
        purpose: "commands" or "beats".
        host: the name of its host.
        about: what it says about itself.
        channel: the connection.
    """

    rank: int
    purpose: str
    host: str
    about: dict[str, str]
    channel: Channel


def hello(launch: Launch, purpose: str, about: dict[str, str]) -> JSON:
    """The first message of a follower's connection."""
    return {"phi4_mlx": PROTOCOL, "job": launch.job, "rank": launch.rank, "for": purpose, "host": socket.gethostname(),
            "about": about}  # fmt: skip


class Door:
    """Listens at the channel's address. Each connection has a thread: a silent one delays nobody.

    Args:
        launch: of the leader.
        wait_s: seconds that it waits for the followers.

    Attributes:
        refused: a sentence about the last rank that was refused; empty if there is none.
    """

    def __init__(self, launch: Launch, wait_s: float):
        self._launch = launch
        self._wait_s = wait_s
        self._came: queue.Queue[Guest] = queue.Queue()
        self._lock = threading.Lock()
        self._taken: set[tuple[int, str]] = set()
        self.refused = ""
        host, port = launch.channel
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
            self._socket.listen(64)
        except OSError as error:
            raise RequestError(
                f"rank 0 cannot listen at {host:.200}:{port}: {error.strerror or error}; {CHANNEL}=HOST:PORT on all "
                "ranks chooses another address"
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self) -> dict[tuple[int, str], Guest]:
        """(rank, purpose) -> connection, of the followers that come in time."""
        deadline = time.monotonic() + self._wait_s
        guests: dict[tuple[int, str], Guest] = {}
        while len(guests) < len(PURPOSES) * (self._launch.size - 1):
            try:
                guest = self._came.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                break
            guests[guest.rank, guest.purpose] = guest
        return guests

    def close(self) -> None:
        """Stops listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, (where, *_) = self._socket.accept()
                threading.Thread(target=self._ask, args=(connection, where), daemon=True).start()

    def _ask(self, connection: socket.socket, where: str) -> None:
        """Hears who a connection is, and lets it in or refuses it."""
        channel = Channel(connection)
        try:
            said = channel.receive(HELLO_S, HELLO_BYTES)
            why = self._objection(said, where)
            if why:
                self.refused = why
                channel.send({"refused": why})
                channel.close()
                return
            guest = Guest(said["rank"], said["for"], said["host"], said["about"], channel)
            channel.send({"welcome": self._wait_s})
            self._came.put(guest)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # a stranger, or gone
            channel.close()

    def _objection(self, said: JSON, where: str) -> str:
        """The reason to refuse a connection; empty if there is none.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: no rank of a job speaks so.
        """
        rank, purpose, about = said["rank"], said["for"], said["about"]
        texts = (said["host"], *about, *about.values())
        if (
            said["phi4_mlx"] != PROTOCOL
            or not isinstance(rank, int)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError("not a rank")
        host, port = self._launch.channel
        if said["job"] != self._launch.job or not 0 < rank < self._launch.size or purpose not in PURPOSES:
            return (
                f"a process at {where} says that it is rank {rank} of another job than the leader at {host}:{port}: "
                "the host file or the backend differs"
            )
        with self._lock:
            if (rank, purpose) in self._taken:
                return f"rank {rank} is there already; a second process at {where} says that it is the same"
            self._taken.add((rank, purpose))
        return ""
