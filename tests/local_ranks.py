"""Processes on this machine that run one program as the ranks of a ring."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def run_ranks(folder: Path, module: str, *arguments: str, size: int = 2, timeout_s: float = 120) -> list[str]:
    """What each rank of `python -m module` printed.

    Args:
        folder: for the host file.
        module: the program.
        arguments: of all ranks.
        size: the number of ranks.
        timeout_s: the longest time that they may take.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**environment, "MLX_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        results = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, results, strict=True)):
        assert rank.returncode == 0, f"rank {number}: {errors}"
    return [printed for printed, _ in results]
