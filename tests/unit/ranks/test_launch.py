"""The launch of this process, from the variables that mlx.launch, mpirun or a person sets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.ranks.launch import Launch, launched

TWO = [["192.168.0.1:5000"], ["192.168.0.2:5000"]]


@pytest.fixture
def ring(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The environment of a ring; the text of its host file may be given."""

    def environment(hosts: object = TWO, rank: str = "1", text: str | None = None, **more: str) -> dict[str, str]:
        file = tmp_path / "hosts.json"
        file.write_text(json.dumps(hosts) if text is None else text)
        return {"MLX_HOSTFILE": str(file), "MLX_RANK": rank} | more

    return environment


def short(launch: Launch | None) -> tuple[int, int, str, tuple[str, int]]:
    assert launch is not None
    return launch.rank, launch.size, launch.backend, launch.channel


def test_a_process_on_its_own_has_no_launch() -> None:
    assert launched({}) is None
    assert launched({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


def test_the_only_rank_of_mlx_launch_has_no_launch(ring: Callable[..., dict[str, str]]) -> None:
    assert launched(ring(rank="0", text="\n")) is None  # its host file for one rank
    assert launched(ring(TWO[:1], rank="0")) is None


def test_a_ring(ring: Callable[..., dict[str, str]]) -> None:
    launch = launched(ring())
    assert short(launch) == (1, 2, "ring", ("192.168.0.1", 15007))
    assert launch is not None and launch.hosts == ("192.168.0.1", "192.168.0.2") and launch.wait_s is None
    high = launched(ring([["10.0.0.1:32323", "10.0.0.1:32324"], ["10.0.0.2:32325", "10.0.0.2:32326"]]))
    assert short(high) == (1, 2, "ring", ("10.0.0.1", 22316))


def test_jobs_side_by_side_have_different_channels(ring: Callable[..., dict[str, str]]) -> None:
    first = launched(ring([["127.0.0.1:6000"], ["127.0.0.1:6001"]]))
    second = launched(ring([["127.0.0.1:6002"], ["127.0.0.1:6003"]]))
    assert first is not None and second is not None
    assert first.job != second.job
    assert not {first.channel[1], second.channel[1]} & {6000, 6001, 6002, 6003}
    assert first.channel != second.channel


def test_all_ranks_of_a_job_have_the_same_job(ring: Callable[..., dict[str, str]]) -> None:
    first, second = launched(ring(rank="0")), launched(ring(text=json.dumps(TWO, indent=2)))
    assert first is not None and second is not None and first.job == second.job


def test_the_channel_and_the_wait_may_be_given(ring: Callable[..., dict[str, str]]) -> None:
    launch = launched(ring(PHI4_MLX_CHANNEL="mac.local:7000", PHI4_MLX_JOIN_S="60"))
    assert short(launch) == (1, 2, "ring", ("mac.local", 7000))
    assert launch is not None and launch.wait_s == 60
    assert short(launched(ring(PHI4_MLX_CHANNEL="[::1]:7000")))[3] == ("::1", 7000)


def test_jaccl(tmp_path: Path) -> None:
    file = tmp_path / "devices.json"
    file.write_text(json.dumps([[None, "rdma_en2"], ["rdma_en2", None]]))
    given = {"MLX_JACCL_COORDINATOR": "10.0.0.1:32323", "MLX_IBV_DEVICES": str(file), "MLX_RANK": "0"}
    assert short(launched(given)) == (0, 2, "jaccl", ("10.0.0.1", 22316))


def test_nccl() -> None:
    given = {"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_WORLD_SIZE": "4", "MLX_RANK": "3"}
    assert short(launched(given)) == (3, 4, "nccl", ("10.0.0.1", 22352))


def test_mpi() -> None:
    given = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    here = launched(given | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "one"})
    assert here is not None and here.backend == "mpi" and here.channel[0] == "127.0.0.1"
    with pytest.raises(RequestError, match="PHI4_MLX_CHANNEL=HOST:PORT"):
        launched(given | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert short(launched(given | {"PHI4_MLX_CHANNEL": "10.0.0.1:7000"})) == (1, 2, "mpi", ("10.0.0.1", 7000))


@pytest.mark.parametrize("rank", ["x", "-1", "2", "", "1.0", "١", "99999999999999999999"])
def test_a_bad_rank_is_named(ring: Callable[..., dict[str, str]], rank: str) -> None:
    with pytest.raises(RequestError, match=r"MLX_RANK is '.*', not a whole number from 0 to 1"):
        launched(ring(rank=rank))


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        ({"hosts": []}, "must hold a list with one list for each rank"),
        ([], "must hold a list with one list"),
        (["10.0.0.1:5000", "10.0.0.2:5000"], "must hold a list with one list for each rank"),
        ([["10.0.0.1:5000"], []], "must hold a list with one list for each rank"),
        ([["10.0.0.1:5000"], ["10.0.0.2"]], "rank 1: '10.0.0.2' is not HOST:PORT"),
        ([["10.0.0.1:5000"], ["10.0.0.2:70000"]], "not HOST:PORT with a port from 1 to 65535"),
        ([["10.0.0.1:5000"], [7]], "rank 1: 7 is not HOST:PORT"),
        ([["10.0.0.1:5000"], ["10.0.0.1:5000"]], "10.0.0.1:5000 twice"),
        ([[f"10.0.{n // 250}.{n % 250}:5000"] for n in range(300)], "300 ranks are launched; 256 is the most"),
    ],
)
def test_a_bad_host_file_is_named(ring: Callable[..., dict[str, str]], hosts: object, line: str) -> None:
    with pytest.raises(RequestError, match=line):
        launched(ring(hosts))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"MLX_HOSTFILE": "/no/such/file"}, "MLX_HOSTFILE names /no/such/file, which does not exist"),
        ({"MLX_HOSTFILE": ""}, "MLX_HOSTFILE names"),
        ({"MLX_HOSTFILE": "/"}, "cannot be read: it is a folder"),
        ({"PHI4_MLX_CHANNEL": "mac"}, "PHI4_MLX_CHANNEL: 'mac' is not HOST:PORT"),
        ({"PHI4_MLX_JOIN_S": "soon"}, "PHI4_MLX_JOIN_S is 'soon', not a number of seconds"),
        ({"PHI4_MLX_JOIN_S": "nan"}, "PHI4_MLX_JOIN_S is 'nan', not a number of seconds"),
    ],
)
def test_a_bad_variable_is_named(ring: Callable[..., dict[str, str]], change: dict[str, str], line: str) -> None:
    with pytest.raises(RequestError, match=line):
        launched(ring() | change)


def test_a_host_file_that_is_not_json_is_named(ring: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(RequestError, match="which is not JSON"):
        launched(ring(text="10.0.0.1"))
    with pytest.raises(RequestError, match="which is not JSON"):
        launched(ring(text="[" * 200_000))


def test_a_lone_variable_is_not_passed_over(ring: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(RequestError, match="MLX_RANK is '0', but no variable names the other ranks"):
        launched({"MLX_RANK": "0"})
    given = ring()
    del given["MLX_RANK"]
    with pytest.raises(RequestError, match="MLX_RANK is not set, but the environment describes 2 ranks"):
        launched(given)
    with pytest.raises(RequestError, match="JACCL needs MLX_IBV_DEVICES"):
        launched({"MLX_JACCL_COORDINATOR": "10.0.0.1:5000", "MLX_RANK": "0"})


def test_reading_the_launch_does_not_import_mlx() -> None:
    code = "import sys; from phi4_mlx.ranks.launch import launched; launched(); print('mlx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
