"""The meeting of the ranks on the leader's side channel, before the first collective.

Each follower opens two connections, one for commands and one for the watchers' beats, so that no command delays a beat.
The leader refuses strangers and ranks of another job, compares what the ranks say about themselves, and then lets all
of them go, or none.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from phi4_mlx.errors import RequestError, message_of
from phi4_mlx.ranks.channel import HELLO_BYTES, JSON, Channel
from phi4_mlx.ranks.door import HELLO_S, PURPOSES, Door, hello
from phi4_mlx.ranks.launch import CHANNEL, WAIT, Launch

_RETRY_S = 0.05
_WAIT_S = 6.0  # with the start of a process, less than the 10 s within which a job without one of its ranks ends
_TIMES_AGE = 2.0  # a server has two processes, one started by the other
_MOST_WAIT_S = 20.0


@dataclass(frozen=True)
class Met:
    """The connections of one rank: of the leader to each follower, or of a follower to the leader.

    Attributes:
        commands: rank -> connection for commands and answers.
        beats: rank -> connection for the watchers.
        names: rank -> its name in messages, such as "rank 1 (192.168.0.2)".
        wait_s: seconds that the leader waits for all followers.
    """

    commands: dict[int, Channel]
    beats: dict[int, Channel]
    names: dict[int, str]
    wait_s: float

    def close(self) -> None:
        """Closes all connections."""
        for channel in (*self.commands.values(), *self.beats.values()):
            channel.close()


def lead(launch: Launch, about: Mapping[str, str]) -> Met:
    """Waits for all followers, and compares what they say about themselves. `let_go` follows.

    Args:
        launch: of the leader.
        about: what must be equal on all ranks.

    Raises:
        RequestError: the address cannot be used, a rank does not come, or one differs; those that came are told.
    """
    _check_hosts(launch)
    wait_s = _wait_s(launch)
    door = Door(launch, wait_s)
    try:
        guests = door.wait()
    finally:
        door.close()
    ranks = range(1, launch.size)
    said = {guest.rank: guest.host for guest in guests.values()}
    names = {rank: _named(launch, rank, said.get(rank)) for rank in range(launch.size)}
    commands, beats = ({rank: guests[rank, purpose].channel for rank in ranks if (rank, purpose) in guests}
                       for purpose in PURPOSES)  # fmt: skip
    met = Met(commands, beats, names, wait_s)
    late = [names[rank] for rank in ranks if rank not in commands or rank not in beats]
    if late:
        stranger = f"; {door.refused}" if door.refused else ""
        _refuse(met, f"{' and '.join(late)} did not come within {wait_s:g} s ({WAIT}){stranger}")
    for rank in ranks:
        theirs = guests[rank, "commands"].about
        for key in {**about, **theirs}:
            ours, other = about.get(key, "none"), theirs.get(key, "none")
            if ours != other:
                line = f"{key} is {ours:.200} on {names[0]} but {other:.200} on {names[rank]}; all ranks need the same"
                _refuse(met, line)
    return met


def let_go(met: Met) -> None:
    """Tells all followers that every rank is there.

    Raises:
        RequestError: one has gone.
    """
    for rank, channel in met.commands.items():
        try:
            channel.send({"welcome": met.wait_s})
        except OSError:
            _refuse(met, f"{met.names[rank]} has ended before all ranks were there")


def follow(launch: Launch, about: Mapping[str, str]) -> Met:
    """Connects a follower to its leader. `wait_to_go` follows.

    Args:
        launch: of this rank.
        about: what must be equal on all ranks.

    Raises:
        RequestError: the leader does not come, or refuses this rank.
    """
    _check_hosts(launch)
    wait_s = _wait_s(launch)
    deadline = time.monotonic() + wait_s
    names = {0: _named(launch, 0, None), launch.rank: _named(launch, launch.rank, socket.gethostname())}
    met = []
    for purpose in PURPOSES:
        knocked = _knock(launch, hello(launch, purpose, dict(about)), deadline)
        if isinstance(knocked, str):
            host, port = launch.channel
            raise RequestError(
                f"{names[0]} does not answer at {host}:{port} within {wait_s:g} s ({WAIT}): "
                f"{knocked}; {CHANNEL}=HOST:PORT on all ranks chooses another address"
            )
        met.append(knocked)
    return Met({0: met[0][0]}, {0: met[1][0]}, names, met[0][1])


def wait_to_go(met: Met) -> None:
    """Waits until the leader has met all ranks.

    Raises:
        RequestError: a rank did not come, or differs; or the leader has gone.
    """
    try:
        _check_welcome(met.commands[0].receive(met.wait_s + 1, HELLO_BYTES))
    except (OSError, ValueError):
        raise RequestError(f"{met.names[0]} has ended or frozen before all ranks were there") from None


def _check_hosts(launch: Launch) -> None:
    """Refuses a host without an address; the backend would say less."""
    for rank, host in enumerate([launch.channel[0], *launch.hosts[1:]]):
        try:
            socket.getaddrinfo(host, None)
        except (OSError, ValueError) as error:  # no such name, or not a name at all
            reason = (error.strerror if isinstance(error, OSError) else None) or message_of(error)
            raise RequestError(f"the host of rank {rank}, {host:.200}, has no address: {reason}") from None


def _named(launch: Launch, rank: int, said: str | None) -> str:
    """The name of a rank in messages: its host as the launch names it, else as the rank itself does."""
    if rank == 0:
        return f"rank 0 ({launch.channel[0]})"
    host = launch.hosts[rank] if rank < len(launch.hosts) else said
    return f"rank {rank} ({host or 'its host is unknown':.200})"


def _refuse(met: Met, line: str) -> NoReturn:
    for channel in met.commands.values():
        with contextlib.suppress(OSError):
            channel.send({"refused": line})
    met.close()
    raise RequestError(line)


def _check_welcome(answer: JSON) -> float:
    """The seconds that the leader waits for all; raises its refusal, or ValueError if it is not a leader's answer."""
    if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
        raise RequestError(answer["refused"])
    if not isinstance(answer, dict) or not isinstance(answer.get("welcome"), int | float):
        raise ValueError("not a leader")
    return float(answer["welcome"])


def _knock(launch: Launch, first: JSON, deadline: float) -> tuple[Channel, float] | str:
    """A connection that the leader has welcomed, or why there is none; tries again, as the leader may start later."""
    reason = "nobody listens"
    while (left_s := deadline - time.monotonic()) > 0:
        channel = None
        try:
            channel = Channel(socket.create_connection(launch.channel, timeout=min(left_s, HELLO_S)))
            channel.send(first, HELLO_BYTES)
            return channel, _check_welcome(channel.receive(left_s, HELLO_BYTES))
        except RequestError:
            raise
        except ValueError:
            reason = "another program listens"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if channel is not None:
            channel.close()
        time.sleep(_RETRY_S)
    return reason


def _wait_s(launch: Launch) -> float:
    """Seconds to wait for the others: more where this process has been slow to start, as they may be as slow."""
    return min(max(_WAIT_S, _TIMES_AGE * _age_s()), _MOST_WAIT_S) if launch.wait_s is None else launch.wait_s


def _age_s() -> float:
    """Whole seconds since this process was started, or the server that has started it; 0 if that is unknown."""
    above = multiprocessing.parent_process()
    process = os.getpid() if above is None else above.pid
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["ps", "-o", "etime=", "-p", str(process)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5).stdout
        parts = re.findall("[0-9]+", shown)[::-1]  # [[dd-]hh:]mm:ss
        return sum(int(part) * unit for part, unit in zip(parts, (1, 60, 3600, 86400), strict=False))
    return 0
