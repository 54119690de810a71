"""`generate --prompts` over two ranks: as alone, also after kills; and ranks that differ."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, TinyCheckpoint, write_tiny_checkpoint
from tests.rank_jobs import free_ports

PROMPTS = 80


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    draw = random.Random(4)
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for n in range(PROMPTS):
            text = "".join(draw.choices("abcdefgh ", k=draw.randrange(3, 50))) + "x"
            file.write(json.dumps({"prompt": text, "id": n, "max_tokens": draw.randrange(2, 150)}) + "\n")
    return path


@contextlib.contextmanager
def started(folder: Path, *commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One rank for each command, or a process on its own; all are killed in the end."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MLX_")}
    environment |= {"PYTHONPATH": str(ROOT), "PHI4_MLX_JOIN_S": "60"}
    if len(commands) > 1:
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
        environment |= {"MLX_HOSTFILE": str(hosts)}
    found = [
        subprocess.Popen(
            [sys.executable, "-m", "phi4_mlx", "generate", *command], env=environment | {"MLX_RANK": str(rank)}
            if len(commands) > 1 else environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/",
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip
    try:
        yield found
    finally:
        for each in found:
            each.kill()
            each.communicate()


def lines(path: Path) -> list[int]:
    """The numbers of the answers in a file, all of them whole."""
    data = path.read_bytes() if path.exists() else b""
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line)["line"] for line in data.split(b"\n")[:-1]]


def answered(path: Path) -> int:
    """The answers that are kept, in the file or waiting beside it; both may just be written."""
    written = path.read_bytes().count(b"\n") if path.exists() else 0
    journal = path.with_name(f"{path.name}.run")
    waiting = (
        [json.loads(line)["index"] for line in journal.read_bytes().split(b"\n")[1:-1]] if journal.exists() else []
    )
    return written + len({index for index in waiting if index >= written})


def whole(folder: Path, *commands: list[str], code: int = 0) -> list[str]:
    """What each rank says until it ends."""
    with started(folder, *commands) as ranks:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [code] * len(ranks), said
    return said


@pytest.mark.slow
def test_a_run_over_ranks_that_is_killed_twice_ends_as_one_alone(
    tmp_path: Path, prompts: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    shared = ["--model", str(tiny_checkpoint()), "--prompts", str(prompts), "--seed", "4", "--temp", "1"]
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    whole(tmp_path, [*shared, "--output", str(alone)])
    command = [*shared, "--output", str(out)]
    for victims, wanted in (([1], 10), ([0, 1], 35)):
        with started(tmp_path, command, command) as ranks:
            deadline = time.monotonic() + 100
            while answered(out) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            for victim in victims:
                ranks[victim].kill()
            said = [rank.communicate(timeout=20)[1] for rank in ranks]
            assert all(rank.returncode for rank in ranks), said
            if victims == [1]:
                assert "rank 1 (127.0.0.1)" in said[0]
        assert wanted <= answered(out) < PROMPTS and lines(out) == [*range(1, len(lines(out)) + 1)]
    whole(tmp_path, command, command)
    assert out.read_bytes() == alone.read_bytes()
    assert len(lines(out)) == PROMPTS


@pytest.mark.slow
def test_a_model_that_ranks_hold_together_answers_as_alone(
    tmp_path: Path, prompts: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:6]))
    shared = ["--model", str(tiny_checkpoint()), "--prompts", str(few), "--max-tokens", "4"]
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    whole(tmp_path, [*shared, "--output", str(alone)])
    command = [*shared, "--output", str(out), "--parallel", "pipeline"]
    whole(tmp_path, command, command)
    assert out.read_bytes() == alone.read_bytes()


def test_ranks_with_other_models_or_prompts_are_refused(tmp_path: Path, prompts: Path) -> None:
    models = [write_tiny_checkpoint(tmp_path / str(seed) / "tiny", seed=seed) for seed in (0, 1)]
    one, other = (["--model", str(each), "--prompts", str(prompts), "--output", "/none/out"] for each in models)
    for said in whole(tmp_path, one, other, code=2):
        assert said.count("\n") == 1 and "--model is " in said and "all ranks need the same" in said
