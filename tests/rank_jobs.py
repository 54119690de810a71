"""Jobs of several ranks on this machine, started by `mlx.launch` or by hand, and ways to break them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

PROGRAM = Path(__file__).with_name("rank_program.py")
FAILURES = ("killed", "frozen", "absent", "unplugged")


def free_ports(count: int) -> list[int]:
    """Ports that no process listens at, one after another; also those of the side channel by default are free."""
    while True:
        first = random.randrange(21000, 31000)
        with contextlib.ExitStack() as stack:
            try:
                for port in (*range(first, first + count), first - 10007):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return list(range(first, first + count))
            except OSError:
                continue


class Proxy:
    """A port that passes everything on to another, until it is unplugged: then nothing more, and no end either."""

    def __init__(self, port: int):
        self._to = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.unplugged = False
        self._open = [self._socket]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._to), 1)
                except OSError:
                    near.close()  # the leader does not listen yet
                    continue
                self._open += [near, far]
                far.settimeout(None)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if self.unplugged:
                    continue
                target.sendall(data)
            if not self.unplugged:
                target.shutdown(socket.SHUT_RDWR)


class Job:
    """The processes of one job.

    Attributes:
        size: its ranks.
        ended: rank -> when it ended, by `time.monotonic`.
    """

    def __init__(self, folder: Path, size: int, launcher: bool, absent: int | None = None, **environment: str):
        self.size = size
        self.folder = folder
        self.ended: dict[int, float] = {}
        self._by_hand: dict[int, subprocess.Popen[bytes]] = {}
        self._launcher: subprocess.Popen[bytes] | None = None
        ports = free_ports(size)
        self.proxy = Proxy(ports[0] - 10007)
        folder.mkdir(parents=True, exist_ok=True)
        base = {name: text for name, text in os.environ.items() if not name.startswith(("MLX_", "PHI4_MLX_"))}
        base |= {"PYTHONPATH": str(ROOT), "FOLDER": str(folder), "PROXY": str(self.proxy.port)} | environment
        program = [sys.executable, str(PROGRAM)]
        if launcher:
            base |= {} if absent is None else {"ABSENT": str(absent)}
            command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(size), "--hosts", "127.0.0.1"]
            self._launcher = subprocess.Popen(
                [*command, "--backend", "ring", "-p", str(ports[0]), "--", *program], env=base,
                stdin=subprocess.PIPE, stdout=(folder / "launcher.out").open("w"), stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            return
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        for rank in range(size):
            if rank != absent:
                own = base | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                with (folder / f"{rank}.out").open("w") as out:
                    self._by_hand[rank] = subprocess.Popen(program, env=own, stdout=out, stderr=out)

    def process(self, rank: int) -> int | None:
        """The id of a rank's process, as soon as it runs."""
        with contextlib.suppress(OSError):
            return int((self.folder / f"{rank}.pid").read_text())
        return None

    def wait_for(self, ranks: Iterator[int] | range, suffix: str, timeout_s: float = 120) -> None:
        """Waits for a file of each rank: "pid" when it runs, "joined" when it has met the others."""
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            while not (self.folder / f"{rank}.{suffix}").exists():
                assert time.monotonic() < deadline, f"rank {rank} has no {suffix}; {self.lines(rank)}"
                time.sleep(0.01)

    def fail(self, failure: str, victim: int) -> None:
        """Breaks one rank."""
        process = self.process(victim)
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            if failure == "killed":
                os.kill(process, signal.SIGKILL)
            elif failure == "frozen":
                os.kill(process, signal.SIGSTOP)
            elif failure == "unplugged":
                self.proxy.unplugged = True

    def wait(self, ranks: list[int], timeout_s: float) -> bool:
        """Waits for the end of some ranks; True if all have ended in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for rank in ranks:
                if rank not in self.ended and not self._runs(rank):
                    self.ended[rank] = time.monotonic()
            if all(rank in self.ended for rank in ranks):
                return True
            time.sleep(0.02)
        return False

    def _runs(self, rank: int) -> bool:
        if rank in self._by_hand:
            return self._by_hand[rank].poll() is None
        process = self.process(rank)
        if process is None:
            return self._launcher is not None and self._launcher.poll() is None
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True

    def code(self, rank: int) -> int | None:
        """The exit code of a rank; None where mlx.launch keeps it."""
        return self._by_hand[rank].poll() if rank in self._by_hand else None

    def lines(self, rank: int) -> list[str]:
        """What a rank has said on standard error; mlx's own lines about its sockets apart."""
        with contextlib.suppress(OSError):
            text = (self.folder / f"{rank}.err").read_text(errors="replace")
            return [line for line in text.splitlines() if not line.startswith("[ring]")]
        return []

    def launched(self) -> str:
        """What mlx.launch has said."""
        return "" if self._launcher is None else (self.folder / "launcher.out").read_text(errors="replace")

    def close(self) -> None:
        """Kills what still runs."""
        for rank in range(self.size):
            if (process := self.process(rank)) is not None and self._runs(rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for each in (*self._by_hand.values(), *([self._launcher] if self._launcher else [])):
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(10)
            each.kill()
            each.wait()
        self.proxy.close()
