"""`generate --prompts` over two ranks: as alone, also after kills; mistakes; and what `plan` measures there."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.conftest import TinyCheckpoint, write_tiny_checkpoint
from tests.rank_commands import RankCommand, alone, over_ranks

PROMPTS = 60


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    draw = random.Random(4)
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for n in range(PROMPTS):
            text = "".join(draw.choices("abcdefgh ", k=draw.randrange(3, 50))) + "x"
            file.write(json.dumps({"prompt": text, "id": n, "max_tokens": draw.randrange(2, 90)}) + "\n")
    return path


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


@pytest.mark.slow
def test_a_run_over_ranks_that_is_killed_twice_ends_as_one_alone(
    tmp_path: Path, prompts: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    shared = ["generate", "--model", str(tiny_checkpoint()), "--prompts", str(prompts), "--seed", "4", "--temp", "1"]
    once, out = tmp_path / "once.jsonl", tmp_path / "out.jsonl"
    alone(*shared, "--output", str(once))
    for victims, wanted in (([1], 6), ([0, 1], 25)):
        (folder := tmp_path / str(wanted)).mkdir()
        command = RankCommand(folder, *shared, "--output", str(out))
        try:
            deadline = time.monotonic() + 100
            while answered(out) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            for victim in victims:
                command.ranks[victim].kill()
            said = [rank.communicate(timeout=20)[1] for rank in command.ranks]
            assert all(rank.returncode for rank in command.ranks), said
        finally:
            command.kill()
        if victims == [1]:
            assert "rank 1 (127.0.0.1)" in said[0]
        assert wanted <= answered(out) < PROMPTS and lines(out) == [*range(1, len(lines(out)) + 1)]
    over_ranks(tmp_path / "last", *shared, "--output", str(out))
    assert out.read_bytes() == once.read_bytes()
    assert len(lines(out)) == PROMPTS


@pytest.mark.slow
def test_a_model_that_ranks_hold_together_answers_as_alone(
    tmp_path: Path, prompts: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:6]))
    shared = ["generate", "--model", str(tiny_checkpoint()), "--prompts", str(few), "--max-tokens", "4"]
    once, out = tmp_path / "once.jsonl", tmp_path / "out.jsonl"
    alone(*shared, "--output", str(once))
    over_ranks(tmp_path / "ranks", *shared, "--output", str(out), "--parallel", "pipeline")
    assert out.read_bytes() == once.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["prompts", "option"])
def test_a_mistake_ends_both_ranks(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "p.jsonl").write_text('"hi"\n3\n' if wrong == "prompts" else '"hi"\n')
    words = ["generate", "--model", "demo", "--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out")]
    words += ["--verbose"] if wrong == "option" else []
    (code, _, err), (other, *_) = RankCommand(tmp_path, *words).wait()
    assert code == other == 2 and err.count("\n") == 1
    assert ("p.jsonl:2: holds 3" if wrong == "prompts" else "--verbose") in err


@pytest.mark.slow
def test_ranks_with_other_models_are_refused(tmp_path: Path, prompts: Path) -> None:
    models = [write_tiny_checkpoint(tmp_path / str(seed) / "tiny", seed=seed) for seed in (0, 1)]
    one, other = (
        ("generate", "--model", str(each), "--prompts", str(prompts), "--output", "/none/out") for each in models
    )
    for code, _, err in RankCommand(tmp_path, *one, others=other).wait():
        assert code == 2 and err.count("\n") == 1 and "--model is " in err and "all ranks need the same" in err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_what_plan_predicts_is_measured(tmp_path: Path, tiny_checkpoint: TinyCheckpoint, parallel: str) -> None:
    words = ["plan", "--model", str(tiny_checkpoint()), "--parallel", parallel, "--json"]
    found = json.loads(over_ranks(tmp_path / "ranks", *words))
    measured = found["measured"]
    assert measured["parallel"] == parallel
    assert measured["predicted_bytes"] == found["splits"][0]["weights_bytes"]
    assert measured["held_bytes"] == pytest.approx(measured["predicted_bytes"], rel=0.01)
    assert measured["step_s"] > 0 and len(measured["matrices_s"]) == 2
