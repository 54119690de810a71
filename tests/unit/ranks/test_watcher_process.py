"""The watcher as a process, between a stand-in for its rank and the test in the place of two other watchers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from phi4_mlx.ranks import watcher
from phi4_mlx.ranks.watcher import END

WAIT_S = 60.0
NAMES = {"0": "rank 0 (here)", "1": "rank 1 (there)", "2": "rank 2 (far)"}


@dataclass
class Watched:
    """The watcher of rank 0, whose own rank and two peers are these sockets."""

    rank: subprocess.Popen[bytes]
    above: subprocess.Popen[bytes]
    process: subprocess.Popen[bytes]
    own: socket.socket
    peers: list[socket.socket]

    def say(self, to: socket.socket, value: dict[str, Any]) -> None:
        to.sendall(json.dumps(value).encode() + b"\n")

    def ended(self, leaves: bool = True) -> str:
        """The line on standard error, after the watcher has left; its rank leaves when it is told, or stays."""
        while leaves and self.own.fileno() != -1:
            self.own.settimeout(WAIT_S)
            said = self.own.recv(4096)
            if END in said or not said:
                self.own.close()
        _, said = self.process.communicate(timeout=WAIT_S)
        lines = said.decode().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    def heard(self, peer: socket.socket) -> list[dict[str, Any]]:
        """All that a peer has heard, after the watcher has left."""
        peer.settimeout(WAIT_S)
        data = b""
        while part := peer.recv(4096):
            data += part
        return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def watched() -> Iterator[Watched]:
    rank, above = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    pairs = [socket.socketpair() for _ in range(3)]
    far = [pair[1].fileno() for pair in pairs]
    about = {"rank": 0, "process": rank.pid, "above": [above.pid], "names": NAMES, "own": far[0],
             "beats": {"1": far[1], "2": far[2]}}  # fmt: skip
    process = subprocess.Popen([sys.executable, "-I", "-S", watcher.__file__, json.dumps(about)],
                               pass_fds=far, stderr=subprocess.PIPE)  # fmt: skip
    for _, theirs in pairs:
        theirs.close()
    yield Watched(rank, above, process, pairs[0][0], [pair[0] for pair in pairs[1:]])
    for each in (rank, above, process):
        each.kill()
        each.communicate()
    for ours, _ in pairs:
        ours.close()


@pytest.fixture
def met(watched: Watched) -> Watched:
    """After all ranks have met."""
    watched.say(watched.own, {"opening": True})
    watched.say(watched.own, {"opening": False})
    return watched


def test_the_end_of_a_peer_ends_the_rank_and_the_other_peer(met: Watched) -> None:
    met.peers[0].close()
    assert met.ended(leaves=False) == "phi4_mlx: rank 1 (there) has ended, or its connection was cut; the job ends"
    assert {"end": "rank 1 (there) has ended, or its connection was cut"} in met.heard(met.peers[1])
    assert met.rank.wait(WAIT_S) == -signal.SIGKILL  # it does not leave by itself
    assert met.above.poll() is None


def test_a_rank_that_leaves_when_it_is_told_is_not_killed(met: Watched) -> None:
    met.peers[0].close()
    met.ended()
    assert met.rank.poll() is None


def test_a_peer_that_has_closed_is_not_missed(met: Watched) -> None:
    met.say(met.peers[0], {"closed": True})
    met.peers[0].close()
    met.say(met.peers[1], {"done": 1})
    with pytest.raises(subprocess.TimeoutExpired):
        met.process.wait(0.5)
    met.peers[1].close()
    assert "rank 2 (far) has ended" in met.ended()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 100_000, b"[" * 9_000 + b"\n"])
def test_what_no_watcher_says_counts_as_a_cut(met: Watched, sent: bytes) -> None:
    met.peers[0].sendall(sent)
    assert "rank 1 (there) has ended, or its connection was cut" in met.ended()


def test_the_line_of_a_peer_is_passed_on_without_control_characters(met: Watched) -> None:
    met.say(met.peers[0], {"end": "rank 1 (there)\x1b[2J:\nno memory"})
    assert met.ended() == "phi4_mlx: rank 1 (there) [2J: no memory; the job ends"
    assert {"end": "rank 1 (there) [2J: no memory"} in met.heard(met.peers[1])


def test_the_line_of_the_rank_goes_to_its_peers(met: Watched) -> None:
    met.say(met.own, {"end": "rank 0 (here): out of step"})
    assert "rank 0 (here): out of step" in met.ended()
    for peer in met.peers:
        assert {"end": "rank 0 (here): out of step"} in met.heard(peer)


def test_a_rank_that_ends_without_a_word_is_named(watched: Watched) -> None:
    watched.own.close()
    assert "rank 0 (here) has ended: it was killed" in watched.ended(leaves=False)
    assert watched.rank.poll() is None  # its id may be another's by now


def test_a_rank_that_was_ended_after_another_names_the_other(watched: Watched) -> None:
    watched.own.close()
    watched.say(watched.peers[0], {"end": "rank 1 (there) has ended"})
    assert "rank 1 (there) has ended" in watched.ended(leaves=False)


def test_the_cause_comes_before_its_effect(met: Watched) -> None:
    assert met.own.recv(1)  # it has begun
    met.process.send_signal(signal.SIGSTOP)
    os.waitpid(met.process.pid, os.WUNTRACED)
    met.own.close()
    met.say(met.peers[0], {"end": "rank 1 (there) has ended"})
    met.process.send_signal(signal.SIGCONT)
    assert "rank 1 (there) has ended" in met.ended(leaves=False)


def test_an_ordinary_end_is_silent_and_told(met: Watched) -> None:
    met.say(met.own, {"close": True})
    _, said = met.process.communicate(timeout=WAIT_S)
    assert (said, met.process.returncode) == (b"", 0)
    assert met.heard(met.peers[0])[-1] == {"closed": True}


def test_peers_are_not_missed_before_all_have_met(watched: Watched) -> None:
    watched.peers[0].close()
    with pytest.raises(subprocess.TimeoutExpired):
        watched.process.wait(0.5)
    watched.say(watched.own, {"opening": True})
    assert "rank 1 (there) has ended" in watched.ended()


@pytest.mark.slow
def test_a_rank_is_frozen_where_the_process_above_it_is(met: Watched) -> None:
    met.above.send_signal(signal.SIGSTOP)
    assert "rank 0 (here) is frozen" in met.ended()
    assert met.above.wait(WAIT_S) == -signal.SIGKILL
    assert met.rank.poll() is None  # it has left by itself


@pytest.mark.slow
def test_a_frozen_rank_is_killed_and_named(met: Watched) -> None:
    met.rank.send_signal(signal.SIGSTOP)
    assert "rank 0 (here) is frozen" in met.ended(leaves=False)
    assert met.rank.wait(WAIT_S) == -signal.SIGKILL


def test_ctrl_c_does_not_end_the_watcher(met: Watched) -> None:
    assert met.own.recv(1)  # it has begun
    met.process.send_signal(signal.SIGINT)
    met.say(met.own, {"close": True})
    assert met.process.wait(WAIT_S) == 0
