"""The handshake of a leader and its followers, in threads of one process."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.ranks import meeting
from phi4_mlx.ranks.channel import Channel
from phi4_mlx.ranks.door import hello
from phi4_mlx.ranks.launch import Launch
from phi4_mlx.ranks.meeting import Met, follow, lead, let_go, wait_to_go

ABOUT = {"package": "abc", "mlx": "0.32.4"}
Start = Callable[..., "Future[Met]"]


@pytest.fixture
def launch() -> Launch:
    """Of the leader of two ranks, at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return Launch(0, 2, "ring", ("127.0.0.1", port), ("127.0.0.1",) * 3, "job", 20.0)


@pytest.fixture
def start(launch: Launch) -> Iterator[Start]:
    """Starts one rank's part of the meeting."""
    pool = ThreadPoolExecutor()
    met = []

    def rank(about: dict[str, str] = ABOUT, **changes: object) -> Future[Met]:
        own = replace(launch, **changes)  # type: ignore[arg-type]

        def meet() -> Met:
            found = (lead if own.rank == 0 else follow)(own, about)
            met.append(found)
            let_go(found) if own.rank == 0 else wait_to_go(found)
            return found

        return pool.submit(meet)

    yield rank
    pool.shutdown()
    for each in met:
        each.close()


def line(future: Future[Met]) -> str:
    with pytest.raises(RequestError) as caught:
        future.result(60)
    return str(caught.value)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_meet_in_any_order(start: Start, order: tuple[int, ...]) -> None:
    futures = {rank: start(rank=rank, size=3) for rank in order}
    met = {rank: future.result(60) for rank, future in futures.items()}
    assert list(met[0].commands) == list(met[0].beats) == [1, 2]
    for rank in (1, 2):
        met[0].commands[rank].send({"to": rank})
        met[0].beats[rank].send("beat")
        assert met[rank].commands[0].receive(10) == {"to": rank}
        assert met[rank].beats[0].receive(10) == "beat"
        assert met[rank].names[rank].startswith(f"rank {rank} (")
    assert met[0].names[2] == "rank 2 (127.0.0.1)"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (ABOUT | {"mlx": "0.33.0"}, "mlx is 0.32.4 on rank 0 (127.0.0.1) but 0.33.0 on rank 1 (127.0.0.1)"),
        ({"mlx": "0.32.4"}, "package is abc on rank 0 (127.0.0.1) but none on rank 1 (127.0.0.1)"),
        (ABOUT | {"adapter": "a"}, "adapter is none on rank 0 (127.0.0.1) but a on rank 1 (127.0.0.1)"),
    ],
)
def test_a_difference_is_told_to_all(start: Start, other: dict[str, str], said: str) -> None:
    leader, follower, third = start(rank=0, size=3), start(other, rank=1, size=3), start(rank=2, size=3)
    assert said in line(leader)
    assert line(leader) == line(follower) == line(third)


def test_a_rank_that_does_not_come_is_named_on_all(start: Start) -> None:
    leader, follower = start(rank=0, size=3, wait_s=1.0), start(rank=1, size=3)
    assert line(leader) == line(follower) == "rank 2 (127.0.0.1) did not come within 1 s (PHI4_MLX_JOIN_S)"


def test_a_leader_that_does_not_come_is_named(start: Start) -> None:
    assert "rank 0 (127.0.0.1) does not answer at 127.0.0.1:" in line(start(rank=1, wait_s=0.3))


def test_a_rank_of_another_job_is_refused_and_named(start: Start) -> None:
    leader, other = start(rank=0, wait_s=1.0), start(rank=1, job="another")
    assert "rank 1 of another job" in line(other)
    assert "rank 1 (127.0.0.1) did not come" in line(leader) and "of another job" in line(leader)


def test_a_second_process_of_a_rank_is_refused(launch: Launch, start: Start) -> None:
    leader = start(rank=0, size=3, wait_s=1.0)
    first = Channel(socket_to(launch))
    first.send(hello(replace(launch, rank=1, size=3), "commands", ABOUT))
    assert first.receive(10) == {"welcome": 1.0}
    assert "rank 1 is there already" in line(start(rank=1, size=3))
    assert "did not come" in line(leader)
    first.close()


def socket_to(launch: Launch) -> socket.socket:
    while True:
        try:
            return socket.create_connection(launch.channel, 10)
        except ConnectionRefusedError:
            continue


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\2{}",
        b"\0\0\0\4null",
        b"\xff" * 8,
        b"",
        *(
            len(data).to_bytes(4, "big") + data
            for data in (
                json.dumps(dict(hello(Launch(1, 2, "ring", ("", 1), (), "job"), "commands", {}), **change)).encode()
                for change in ({"about": []}, {"rank": "1"}, {"host": None}, {"for": "all"}, {"phi4_mlx": 99})
            )
        ),
    ],
)
def test_a_stranger_does_not_disturb_the_meeting(launch: Launch, start: Start, sent: bytes) -> None:
    leader = start(rank=0)
    with socket_to(launch) as stranger:
        stranger.sendall(sent)
        assert start(rank=1).result(60).commands
        assert leader.result(60).commands


def test_another_program_in_the_leaders_place_is_named(launch: Launch, start: Start) -> None:
    with socket.create_server(launch.channel) as server:

        def speak() -> None:
            while True:
                try:
                    server.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                except OSError:
                    return

        threading.Thread(target=speak, daemon=True).start()
        assert "another program listens" in line(start(rank=1, wait_s=0.5))
        assert "cannot listen at 127.0.0.1" in line(start(rank=0))
        server.shutdown(socket.SHUT_RDWR)


def test_a_leader_that_answers_late_is_not_asked_twice(
    launch: Launch, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "HELLO_S", 0.1)  # a second connection would be refused: the rank is there already
    with socket.create_server(launch.channel) as server:
        follower = start(rank=1)
        kept = []
        for _ in ("commands", "beats"):
            kept.append(Channel(server.accept()[0]))
            said = kept[-1].receive(10)
            server.settimeout(0.5)
            with pytest.raises(TimeoutError):
                server.accept()
            server.settimeout(10)
            kept[-1].send({"welcome": 10})
        kept[0].send({"welcome": 10})
        assert follower.result(10).commands and said["for"] == "beats"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 80, "a..b", "\0"])
def test_a_host_without_an_address_is_named(start: Start, rank: int, host: str) -> None:
    assert f"the host of rank 0, {host}, has no address: " in line(start(rank=rank, channel=(host, 7000)))
    assert f"the host of rank 1, {host}, has no address: " in line(start(rank=rank, hosts=("127.0.0.1", host)))


def test_a_leader_that_is_not_this_machine_is_named(start: Start) -> None:
    assert "rank 0 cannot listen at 192.0.2.1:7000" in line(start(rank=0, channel=("192.0.2.1", 7000)))  # RFC 5737


@pytest.mark.parametrize(("age", "wait"), [(0, 6), (3, 6), (5, 10), (3600, 20)])
def test_a_process_that_was_slow_to_start_waits_longer(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, age: int, wait: float
) -> None:
    monkeypatch.setattr(meeting, "_age_s", lambda: age)
    assert meeting._wait_s(replace(launch, wait_s=None)) == wait
    assert meeting._wait_s(replace(launch, wait_s=2.5)) == 2.5


@pytest.mark.parametrize(("shown", "age"), [("  00:07\n", 7), ("01:02:03", 3723), ("2-00:00:01", 172801), ("", 0)])
def test_the_age_of_a_process_is_read_from_ps(monkeypatch: pytest.MonkeyPatch, shown: str, age: int) -> None:
    done = subprocess.CompletedProcess([], 0, shown)
    monkeypatch.setattr(meeting.subprocess, "run", lambda *_, **__: done)
    assert meeting._age_s() == age


def test_a_follower_waits_as_long_as_its_leader(start: Start) -> None:
    leader, follower = start(rank=0, size=3, wait_s=2.5), start(rank=1, size=3, wait_s=0.5)
    assert line(leader) == line(follower)
