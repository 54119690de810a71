"""`python -m phi4_mlx.lora` as a process: dry run, training, kill -9 and resume, and mistakes in one line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "3"))


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "phi4_mlx.lora", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(*words: str) -> tuple[int, str, str]:
    process = start(*words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def options(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    draw, lines = random.Random(1), []
    for _ in range(40):
        word = draw.choice(["red", "green", "blue"])
        turns = [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word}!"}]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "data" / "valid.jsonl").write_text("\n".join(lines[:5]))
    config = {
        "batch_size": 2, "max_seq_length": 64, "iters": 30, "save_every": 4, "steps_per_eval": 10, "mask_prompt": True,
        "learning_rate": 1e-2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.1},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return ["--model", str(tiny_checkpoint()), "--data", str(tmp_path / "data"), "-c", str(tmp_path / "config.yaml")]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def steps_made(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def adapter(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "adapters.safetensors")))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_killed_at_random_and_resumed_is_the_unbroken_run(options: list[str], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = finish(*options, "--adapter-path", str(whole))
    assert code == 0, err
    assert "predicted peak" in err and "best validation loss" in err
    draw, resume = random.Random(2), []
    for _ in range(KILLS):
        process = start(*options, "--adapter-path", str(broken), *resume)
        fatal = draw.randint(1, 28)  # the step after which it may die, at any moment
        while process.poll() is None and steps_made(broken) < fatal:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        resume = ["--resume"] if (broken / "checkpoints").exists() else []
    assert steps_made(broken)
    code, _, err = finish(*options, "--adapter-path", str(broken), *resume)
    assert code == 0, err
    assert losses(broken) == losses(whole) and len(losses(whole)) == 30
    assert same(adapter(broken), adapter(whole)) and same(adapter(broken / "best"), adapter(whole / "best"))


def test_a_dry_run_shows_what_will_be_learned_and_writes_nothing(options: list[str], tmp_path: Path) -> None:
    code, out, err = finish(*options, "--adapter-path", str(tmp_path / "a"), "--dry-run")
    assert code == 0, err
    assert out.count("<|user|>Say ") == 3 and out.count("\n> ") == 3 and not (tmp_path / "a").exists()


def test_a_run_is_not_begun_over_another(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints" / "00000005").mkdir(parents=True)
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "a"))
    assert code == 2 and "--resume" in err.splitlines()[-1]


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_there_is_not_written_over(options: list[str], tmp_path: Path, file: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / file).write_bytes(b"{}")
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "a"))
    assert code == 2 and "--adapter-path" in err.splitlines()[-1]
    assert (tmp_path / "a" / file).read_bytes() == b"{}"


def test_there_must_be_something_to_resume(options: list[str], tmp_path: Path) -> None:
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "mistyped"), "--resume")
    assert code == 2 and "no checkpoint" in err.splitlines()[-1] and not (tmp_path / "mistyped").exists()


def test_yaml_numbers_as_mlx_lm_writes_them(options: list[str], tmp_path: Path) -> None:
    """`1e-5` is text to YAML 1.1, and the schedule is an object there."""
    schedule = "lr_schedule: {name: cosine_decay, warmup: 2, arguments: [1e-5, 30]}"
    more = tmp_path / "more.yaml"
    more.write_text(f"learning_rate: 1e-5\n{schedule}\n")
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "a"), "-c", str(more), "--dry-run")
    assert code == 0, err


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ("{", [], "train.jsonl:41"),
        ("", ["--iters", "-1"], "--iters"),
        ("", ["--learning-rate", "nan"], "--learning-rate"),
        ("", ["--fine-tune-type", "magic"], "magic"),
        ("", ["--batch-size", "0"], "--batch-size"),
        ("", ["-c", "/nothing/here.yaml"], "here.yaml"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    options: list[str], tmp_path: Path, line: str, words: list[str], message: str
) -> None:
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("\n" + line)
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "a"), *words)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_two_processes_are_one_with_the_whole_batch(options: list[str], tmp_path: Path) -> None:
    """Data-parallel, started by MLX's own launcher; gradients are shared, so the adapters come out the same."""
    config = tmp_path / "config.yaml"  # without dropout, which drops by row
    config.write_text(config.read_text().replace('"dropout": 0.1', '"dropout": 0.0'))
    options = [*options, "--iters", "4", "--batch-size", "4"]
    code, _, err = finish(*options, "--adapter-path", str(tmp_path / "one"))
    assert code == 0, err
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring"]
    words = ["--env", f"PYTHONPATH={ROOT}", "--", sys.executable, "-m", "phi4_mlx.lora", *options]
    done = subprocess.run(
        [*launch, *words, "--adapter-path", str(tmp_path / "two")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert one.keys() == two.keys() and all(mx.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)


def test_an_adapter_can_be_begun_with(options: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, err = finish(*options, "--adapter-path", str(first))
    assert code == 0, err
    file = str(first / "adapters.safetensors")
    more = ["--resume-adapter-file", file, "--learning-rate", "0", "--iters", "1"]
    code, _, err = finish(*options, "--adapter-path", str(second), *more)
    assert code == 0, err
    assert losses(second)[0] < losses(first)[0] - 1 and same(adapter(second), adapter(first))
