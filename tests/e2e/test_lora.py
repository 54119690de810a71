"""`python -m phi4_mlx.lora` as a process: dry run, training, kill -9 and resume, one-line errors."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from tests.conftest import ROOT
from tests.kinds import WRITERS

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
def options(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The words of a run; the fixture's parameter is the kind of model."""
    model = WRITERS[getattr(request, "param", "phi3")](tmp_path / "tiny")
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
    return ["--model", str(model), "--data", str(tmp_path / "data"), "-c", str(tmp_path / "config.yaml")]


def losses(folder: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[name] for line in lines if name in line]


def steps_made(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def adapter(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "adapters.safetensors")))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("options", WRITERS, indirect=True)
def test_killed_at_random_and_resumed_is_the_unbroken_run(options: list[str], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = finish(*options, "--adapter-path", str(whole))
    assert code == 0, err
    assert "predicted peak" in err and "best validation loss" in err
    draw, resume, killed = random.Random(2), [], 0
    metrics = broken / "metrics.jsonl"
    for _ in range(KILLS):
        before = metrics.stat().st_ino if metrics.exists() else 0
        process = start(*options, "--adapter-path", str(broken), *resume)
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_ino == before):
            time.sleep(0.005)  # until it has begun its own file, with what stands of the old one
        fatal = steps_made(broken) + draw.randint(1, 6)  # the step after which it may die, at any moment
        while process.poll() is None and steps_made(broken) < fatal:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
        resume = ["--resume"] if any((broken / "checkpoints").glob("0*")) else []
    assert killed >= min(KILLS, 3)
    code, _, err = finish(*options, "--adapter-path", str(broken), *resume)
    assert code == 0, err
    assert losses(broken) == losses(whole) and len(losses(whole)) == 30
    assert same(adapter(broken), adapter(whole)) and same(adapter(broken / "best"), adapter(whole / "best"))


DIE = """
import os, sys
from phi4_mlx.lora.saving import run_folder
from phi4_mlx.lora.__main__ import main

save = run_folder.save_checkpoint
def dying(folder, step, *rest):
    if step == 20 and {before}:
        os._exit(9)
    save(folder, step, *rest)
    if step == 20:
        os._exit(9)
run_folder.save_checkpoint = dying
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_killed_where_a_checkpoint_is_written_it_is_the_unbroken_run(
    options: list[str], tmp_path: Path, before: bool
) -> None:
    """Step 20 is validated and the best so far: nothing is missing, on either side of its checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(*options, "--adapter-path", str(whole))[0] == 0
    words = [sys.executable, "-c", DIE.format(before=before), *options, "--adapter-path", str(broken)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300)
    assert done.returncode == 9 and steps_made(broken) == 20
    assert sorted((broken / "checkpoints").glob("0*"))[-1].name == ("00000016" if before else "00000020")
    assert len(losses(broken, "valid_loss")) == 2 and adapter(broken / "best")
    code, _, err = finish(*options, "--adapter-path", str(broken), "--resume")
    assert code == 0, err
    assert losses(broken) == losses(whole) and losses(broken, "valid_loss") == losses(whole, "valid_loss")
    assert same(adapter(broken), adapter(whole)) and same(adapter(broken / "best"), adapter(whole / "best"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "number", "code"),
    [("phi3", signal.SIGINT, 130), ("phi3", signal.SIGTERM, 143), ("phi4flash", signal.SIGTERM, 143)],
    indirect=["options"],
)
def test_a_signal_ends_a_run_as_signals_do_with_all_saved(
    options: list[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "a"
    process = start(*options, "--adapter-path", str(folder), "--save-every", "1000", "--iters", "100000")
    while process.poll() is None and steps_made(folder) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    step = steps_made(folder)
    assert process.returncode == code and "Traceback" not in err
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    assert f"stopping after this step; {again} ends the run at once" in err
    command = shlex.join([*options, "--adapter-path", str(folder), "--save-every", "1000", "--iters", "100000"])
    went_on = f"stopped at {step} of 100,000; --resume goes on"
    assert f"{went_on}: python -m phi4_mlx.lora {command} --resume" in err or f"{went_on}\n" in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{step:08}"] and adapter(folder)


FULL = """
import resource, sys
from phi4_mlx.lora.__main__ import main

resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))  # an adapter fits, a checkpoint does not
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_no_training(options: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-c", FULL, *options, "--adapter-path", str(tmp_path / "a")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "tensors.safetensors could not be written" in warnings[0]
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "tensors.safetensors could not be written" in last and "make room" in last
    assert len(losses(tmp_path / "a")) == 30 and adapter(tmp_path / "a") and adapter(tmp_path / "a" / "best")
    assert not any((tmp_path / "a" / "checkpoints").glob("0*"))


def test_the_test_set_is_measured_after_training_or_alone(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "data" / "test.jsonl").write_bytes((tmp_path / "data" / "valid.jsonl").read_bytes())
    words = [*options, "--adapter-path", str(tmp_path / "a"), "--test"]
    code, _, err = finish(*words)
    assert code == 2 and "holds no adapter_config.json" in err.splitlines()[-1]  # alone, as in mlx-lm: nothing to test
    code, _, err = finish(*words, "--train", "--iters", "2")
    told, chat, fuse = err.splitlines()[-3:]
    assert chat.startswith("chat with it: ") and fuse.startswith("make it a model of its own: ")
    assert code == 0 and told.startswith("test loss ") and ", perplexity " in told
    code, _, err = finish(*words)
    assert code == 0 and err.splitlines()[-1] == told and len(losses(tmp_path / "a")) == 2


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


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(options: list[str], tmp_path: Path) -> None:
    """Data-parallel, started by MLX's launcher; gradients are summed, so both adapters are equal."""
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


@pytest.mark.slow
def test_an_adapter_can_be_begun_with(options: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, err = finish(*options, "--adapter-path", str(first))
    assert code == 0, err
    file = str(first / "adapters.safetensors")
    more = ["--resume-adapter-file", file, "--learning-rate", "0", "--iters", "1"]
    code, _, err = finish(*options, "--adapter-path", str(second), *more)
    assert code == 0, err
    assert losses(second)[0] < losses(first)[0] - 1 and same(adapter(second), adapter(first))
