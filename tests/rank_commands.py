"""A command of phi4_mlx as two ranks on this machine, by hand or with `mlx.launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.rank_jobs import free_ports

HANG_S = 150.0  # whatever takes longer is stuck
PYTHON = [sys.executable, "-c", "import sys; {before}; from phi4_mlx.cli import main; sys.exit(main())"]

Ended = tuple[int, str, str]  # exit code, standard output, standard error


def environment(folder: Path, rank: int | None = None, size: int = 2) -> dict[str, str]:
    """The environment of a rank; of a process on its own for None. The first call chooses the ports."""
    base = {name: text for name, text in os.environ.items() if not name.startswith(("MLX_", "PHI4_MLX_"))}
    base["PYTHONPATH"] = str(ROOT)
    if rank is None:
        return base
    hosts = folder / "hosts.json"
    if not hosts.exists():
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    return base | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "PHI4_MLX_JOIN_S": "60"}


class RankCommand:
    """A command that runs as two ranks.

    Args:
        folder: an empty one, for the host file.
        words: the command and its options.
        others: the words of rank 1 where they differ.
        before: statements that rank 1 runs first.
    """

    def __init__(self, folder: Path, *words: str, others: tuple[str, ...] | None = None, before: str = "pass") -> None:
        self.ranks = []
        for rank, (own, first) in enumerate([(words, "pass"), (others or words, before)]):
            program = [*PYTHON[:2], PYTHON[2].format(before=first), *own]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self.ranks.append(subprocess.Popen(program, env=environment(folder, rank), text=True, **pipes))

    def wait(self, given: str = "") -> list[Ended]:
        """How each rank ended; `given` is the standard input of rank 0."""
        try:
            (zero, one) = self.ranks
            out, err = zero.communicate(given, HANG_S)
            other_out, other_err = one.communicate("", HANG_S)
            return [(zero.returncode, out, err), (one.returncode, other_out, other_err)]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends what still runs."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def over_ranks(folder: Path, *words: str, given: str = "") -> str:
    """What rank 0 of a command printed; the other has printed nothing, and both have ended well."""
    folder.mkdir(exist_ok=True)
    (code, out, err), other = RankCommand(folder, *words).wait(given)
    assert code == 0, err
    assert other == (0, "", ""), other
    return out


def alone(*words: str, given: str = "") -> str:
    """What a command printed in one process."""
    done = subprocess.run(
        [*PYTHON[:2], PYTHON[2].format(before="pass"), *words], env=environment(Path()), input=given,
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
