"""The launch of a job of several ranks, as the environment of this process describes it.

`mlx.launch` and `mpirun` set the variables; a person may set them by hand. Imports neither mlx nor a socket, so that
every start may ask.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.files.regular_file import read_regular

CHANNEL = "PHI4_MLX_CHANNEL"
"""Variable with the address of the leader's side channel, HOST:PORT, as this rank reaches it."""

WAIT = "PHI4_MLX_JOIN_S"
"""Variable with the seconds that a rank waits at the start for the others."""

_APART = 10007  # between a port of the backend and the side channel's: jobs side by side take consecutive ports
_MOST_RANKS = 256
_HOSTFILE_BYTES = 2**20


@dataclass(frozen=True)
class Launch:
    """One rank of a job.

    Attributes:
        rank: of this process, from 0; rank 0 is the leader.
        size: the ranks of the job, 2 or more.
        backend: of `mx.distributed`: "ring", "jaccl", "nccl" or "mpi".
        channel: (host, port) of the leader's side channel.
        hosts: the host of each rank, as far as the environment names them.
        job: digest of the environment that all ranks share; ranks of another job have another.
        wait_s: seconds that a rank waits for the others; None for a time that fits this machine.
    """

    rank: int
    size: int
    backend: str
    channel: tuple[str, int]
    hosts: tuple[str, ...] = ()
    job: str = ""
    wait_s: float | None = None


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Reads the launch of this process.

    Args:
        environment: the variables; those of the process if None.

    Returns:
        The launch, or None for a process on its own, such as the only one that `mlx.launch -n 1` starts.

    Raises:
        RequestError: a variable or the host file cannot be used.
    """
    given = os.environ if environment is None else environment
    if "MLX_JACCL_COORDINATOR" in given or "MLX_IBV_DEVICES" in given:
        return _jaccl(given)
    if "MLX_HOSTFILE" in given:
        return _ring(given)
    if "NCCL_HOST_IP" in given and "MLX_WORLD_SIZE" in given:
        return _nccl(given)
    if "OMPI_COMM_WORLD_SIZE" in given:
        return _mpi(given)
    if "MLX_RANK" in given:
        raise RequestError(
            f"MLX_RANK is {given['MLX_RANK']!r:.40}, but no variable names the other ranks: MLX_HOSTFILE (ring), "
            "MLX_JACCL_COORDINATOR (JACCL) or MLX_WORLD_SIZE (NCCL); start with mlx.launch, or unset MLX_RANK"
        )
    return None


def _ring(given: Mapping[str, str]) -> Launch | None:
    nodes = _json_file("MLX_HOSTFILE", given["MLX_HOSTFILE"])
    if nodes is None:
        return None
    shape = f"MLX_HOSTFILE {given['MLX_HOSTFILE']:.200} must hold a list with one list for each rank, such as "
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, list) and node for node in nodes):
        raise RequestError(f'{shape}[["192.168.0.1:5000"], ["192.168.0.2:5000"]]')
    addresses = [[address(f"MLX_HOSTFILE, rank {rank}", each) for each in node] for rank, node in enumerate(nodes)]
    flat = [each for node in addresses for each in node]
    twice = next((each for index, each in enumerate(flat) if each in flat[:index]), None)
    if twice:
        raise RequestError(f"MLX_HOSTFILE has {twice[0]}:{twice[1]} twice; each rank needs a port of its own")
    hosts = tuple(node[0][0] for node in addresses)
    return _launch(given, "ring", "MLX_RANK", len(nodes), addresses[0][0], hosts, addresses)


def _jaccl(given: Mapping[str, str]) -> Launch | None:
    for name in ("MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES"):
        if name not in given:
            raise RequestError(f"JACCL needs {name} beside MLX_RANK; start with mlx.launch --backend jaccl")
    devices = _json_file("MLX_IBV_DEVICES", given["MLX_IBV_DEVICES"])
    if devices is None:
        return None
    if not isinstance(devices, list) or not devices or not all(isinstance(row, list) for row in devices):
        raise RequestError(f"MLX_IBV_DEVICES {given['MLX_IBV_DEVICES']:.200} must hold one list of devices a rank")
    coordinator = address("MLX_JACCL_COORDINATOR", given["MLX_JACCL_COORDINATOR"])
    shared = [coordinator, devices]
    return _launch(given, "jaccl", "MLX_RANK", len(devices), coordinator, (coordinator[0],), shared)


def _nccl(given: Mapping[str, str]) -> Launch | None:
    size = _whole(given, "MLX_WORLD_SIZE", 1, _MOST_RANKS)
    port = _whole(given, "NCCL_PORT", 1, 65535) if "NCCL_PORT" in given else 12345  # mlx.launch's own default
    host = given["NCCL_HOST_IP"]
    return _launch(given, "nccl", "MLX_RANK", size, (host, port), (host,), [host, port])


def _mpi(given: Mapping[str, str]) -> Launch | None:
    size = _whole(given, "OMPI_COMM_WORLD_SIZE", 1, _MOST_RANKS)
    here = _whole(given, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, size) if "OMPI_COMM_WORLD_LOCAL_SIZE" in given else 0
    space = given.get("PMIX_NAMESPACE", "")
    if size > 1 and here != size and CHANNEL not in given:
        raise RequestError(f"MPI does not name the host of rank 0; set {CHANNEL}=HOST:PORT on all ranks (mpirun -x)")
    port = 20000 + int(hashlib.sha256(space.encode()).hexdigest(), 16) % 10000
    hosts = ("127.0.0.1",) * size if here == size else ()
    return _launch(given, "mpi", "OMPI_COMM_WORLD_RANK", size, ("127.0.0.1", port), hosts, space)


def _launch(
    given: Mapping[str, str], backend: str, rank: str, size: int, first: tuple[str, int], hosts: tuple[str, ...],
    shared: object,
) -> Launch | None:  # fmt: skip
    """The launch, from the variable of the rank, an address of rank 0 and a value that is the same on all ranks."""
    if size == 1:
        return None
    if size > _MOST_RANKS:
        raise RequestError(f"{size:,} ranks are launched; {_MOST_RANKS} is the most")
    if rank not in given:
        raise RequestError(f"{rank} is not set, but the environment describes {size} ranks; start with mlx.launch")
    channel = (first[0], first[1] - _APART if first[1] > 2 * _APART else first[1] + _APART)
    if CHANNEL in given:
        channel = address(CHANNEL, given[CHANNEL])
    job = hashlib.sha256(json.dumps([backend, size, shared]).encode()).hexdigest()[:32]
    return Launch(_whole(given, rank, 0, size - 1), size, backend, channel, hosts, job, _wait(given))


def address(name: str, text: object) -> tuple[str, int]:
    """Reads an address.

    Args:
        name: its source, which begins the message of an error.
        text: HOST:PORT.

    Returns:
        The host, a name or a number, and the port.

    Raises:
        RequestError: it is not HOST:PORT with a port from 1 to 65535.
    """
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not host or not (port.isascii() and port.isdigit() and len(port) < 6 and 1 <= int(port) <= 65535):
        raise RequestError(f"{name}: {text!r:.100} is not HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def _wait(given: Mapping[str, str]) -> float | None:
    if WAIT not in given:
        return None
    try:
        wait = float(given[WAIT])
    except ValueError:
        wait = 0.0
    if not 1 <= wait <= 86400:
        raise RequestError(f"{WAIT} is {given[WAIT]!r:.40}, not a number of seconds from 1 to 86400")
    return wait


def _whole(given: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = given.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise RequestError(f"{name} is {text!r:.40}, not a whole number from {low} to {high}")
    return int(text)


def _json_file(name: str, path: str) -> object:
    """The value of the JSON file that a variable names; None for an empty one, which mlx.launch writes for one rank."""
    try:
        text = read_regular(Path(path), _HOSTFILE_BYTES).decode()
        return json.loads(text) if text.strip() else None
    except FileNotFoundError:
        raise RequestError(f"{name} names {path:.200}, which does not exist") from None
    except OSError as error:
        raise RequestError(f"{name} names {path:.200}, which cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} names {path:.200}, which is not JSON: {error}") from None
