"""A run from Python: messages, files, folders that it refuses, and the order of the checks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import finetune, load
from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError
from phi4_mlx.files import lock
from phi4_mlx.lora import run as run_module
from phi4_mlx.lora import settings as settings_module
from phi4_mlx.lora.run import Finetuned, measure_adapter, preview
from phi4_mlx.lora.settings import LoraParameters, Settings
from tests.adapters import save_adapter
from tests.damage import flipped_bits, some_bytes

COLOURS = ("red", "green", "blue", "grey", "black", "white", "pink")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def given(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A tiny model and some data, as settings."""
    lines = [{"prompt": f"Say {word} {n}.", "completion": f"{word}!"} for n in range(4) for word in COLOURS]
    (tmp_path / "data").mkdir()
    for split, part in (("train", lines[:20]), ("valid", lines[20:24]), ("test", lines[24:])):
        write_lines(tmp_path / "data" / f"{split}.jsonl", part)
    pairs = [{"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": f"{word}?"} for word in COLOURS]
    (tmp_path / "pairs").mkdir()
    for split in ("train", "valid", "test"):
        write_lines(tmp_path / "pairs" / f"{split}.jsonl", pairs)
    return {
        "model": str(tiny_checkpoint()), "data": str(tmp_path / "data"), "adapter_path": str(tmp_path / "adapter"),
        "iters": 6, "batch_size": 2, "max_seq_length": 64, "save_every": 3, "steps_per_eval": 3, "mask_prompt": True,
        "learning_rate": 1e-2, "lora_parameters": {"rank": 4, "scale": 2.0}, "steps_per_report": 2,
    }  # fmt: skip


def run(given: dict[str, Any], resume: bool = False, **changes: Any) -> tuple[Finetuned, list[str]]:
    told: list[str] = []
    return finetune({**given, **changes}, resume=resume, tell=told.append), told


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_and_tells_it(given: dict[str, Any], tmp_path: Path) -> None:
    done, told = run(given, test=True)
    folder = tmp_path / "adapter"
    assert done.adapter_path == folder and done.step == 6 and done.best_step in (3, 6)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and done.loss == lines[-1]["loss"]
    assert done.best_loss == min(line["valid_loss"] for line in lines if "valid_loss" in line)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["model"] == given["model"] and config["num_layers"] == 2
    text = "\n".join(told)
    for expected in (
        "train: 20 samples", "valid: 4 samples", "test: 4 samples",
        "parameters to train; 6 updates of 2 samples = 0.6 epochs of 20 samples; predicted peak",
        "step 2: loss", "targets/s", "adapter in", "metrics in", "best validation loss", "perplexity",
    ):  # fmt: skip
        assert expected in text, expected
    assert any(line.startswith("step 4:") and line.endswith(" s left") for line in told)
    model, _ = load(given["model"], folder)
    assert mx.abs(model(mx.array([[5, 6, 7]])) - load(given["model"])[0](mx.array([[5, 6, 7]]))).max() > 1e-4
    tested: list[str] = []
    loss = measure_adapter(Settings.from_mapping({**given, "test": True}, "here"), tested.append)
    assert loss == pytest.approx(done.test_loss, abs=1e-5)
    assert tested[0].startswith("test: ") and tested[1].startswith("test loss ") and len(tested) == 2


def test_the_default_model_is_named_in_the_adapter(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = given.pop("model")
    monkeypatch.setattr(settings_module, "DEFAULT_MODEL", model)
    done, _ = run(given, iters=1)
    assert json.loads((done.adapter_path / "adapter_config.json").read_text())["model"] == model


@pytest.mark.slow
def test_many_epochs_are_told(given: dict[str, Any]) -> None:
    _, told = run(given, iters=12, batch_size=20, val_batches=1)
    assert any("= 12 epochs" in line for line in told) and any("comes 12 times" in line for line in told)
    assert not any("times" in line for line in run(given, iters=10, batch_size=20, adapter_path=f"{given['data']}x")[1])


@pytest.mark.slow
def test_epochs_are_batches_of_all_samples_and_resume_as_iters(given: dict[str, Any]) -> None:
    del given["iters"]
    done, told = run(given, epochs=2, batch_size=8, grad_accumulation_steps=4)
    assert done.step == 6 and [line["step"] for line in metrics(done.adapter_path)] == [4, 6]
    assert any("; 2 updates of 26.7 samples = 2 epochs of 20 samples; " in line for line in told)
    again, told = run(given, iters=6, batch_size=8, grad_accumulation_steps=4, resume=True)
    assert again.step == 6 and any("has ended" in line for line in told)
    with pytest.raises(RequestError, match="iters 6 and epochs 2 are both given; leave one of them out"):
        run(given, iters=6, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_pairs_have_accuracy_and_margin_of_their_own_step(given: dict[str, Any], task: str) -> None:
    """Pairs of the memory plan's probes and of the last validation do not count."""
    del given["mask_prompt"]
    pairs = str(Path(given["data"]).with_name("pairs"))
    done, told = run(given, task=task, data=pairs, steps_per_eval=1, test=True, max_seq_length=32, save_every=1)
    lines = metrics(done.adapter_path)
    assert all(line["pairs"] > 0 and "tokens" not in line and "pairs_per_s" in line for line in lines)
    assert all(0 <= line["accuracy"] <= 1 and 0 <= line["valid_accuracy"] <= 1 for line in lines)
    if task == "dpo":
        assert lines[0]["margin"] == 0 and lines[0]["accuracy"] == 0  # before anything is learned
        assert lines[-1]["margin"] != 0
    assert any(" pairs/s" in line and "% ahead by" in line for line in told)
    assert any(line.startswith("test loss") and "of the pairs ahead" in line for line in told)


def test_it_resumes_says_that_a_run_had_ended_and_mends_its_adapter(given: dict[str, Any], tmp_path: Path) -> None:
    done, _ = run(given)
    file = done.adapter_path / "adapters.safetensors"
    kept = file.read_bytes()
    file.unlink()
    again, told = run(given, resume=True)
    assert again.step == 6 and again.loss is None and file.read_bytes() == kept
    assert any("has ended: step 6 was its last; its learning rate has fallen" in line for line in told)
    assert len(metrics(done.adapter_path)) == 6 and not any("predicted peak" in line for line in told)


def test_a_run_that_stopped_early_has_ended_until_it_is_given_more_patience(given: dict[str, Any]) -> None:
    options = {"iters": 30, "learning_rate": 0.0, "patience": 2}
    done, told = run(given, **options)
    assert done.step == 9 and any("stopped after step 9: validation no longer improves" in line for line in told)
    again, told = run(given, resume=True, **options)
    assert again.step == 9 and any("has ended: validation no longer improves" in line for line in told)
    assert run(given, resume=True, **{**options, "patience": 3})[0].step == 12


def test_patience_needs_a_validation_set(given: dict[str, Any]) -> None:
    (Path(given["data"]) / "valid.jsonl").unlink()
    with pytest.raises(RequestError, match=r"--patience 2 needs a validation set, and .* holds no valid\.jsonl"):
        run(given, patience=2)


# --- whose folder it is ---


@pytest.mark.parametrize("file", ["adapters.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_nobodys_adapter_is_written_over(given: dict[str, Any], file: str) -> None:
    folder = Path(given["adapter_path"])
    folder.mkdir()
    (folder / file).write_bytes(b"{}")
    with pytest.raises(RequestError, match=r"holds an? (PEFT )?adapter already.*name another --adapter-path"):
        run(given)
    assert [path.name for path in folder.iterdir()] == [file]


@pytest.mark.slow
def test_one_may_go_on_from_an_adapter_in_its_own_folder_but_not_over_a_run_or_pefts(
    given: dict[str, Any], tmp_path: Path
) -> None:
    done, _ = run(given, iters=3)
    folder = done.adapter_path
    for name in ("", "adapters.safetensors"):
        with pytest.raises(RequestError, match="holds a run already; continue it with --resume"):
            run(given, resume_adapter_file=str(folder / name))
        shutil.rmtree(folder / "checkpoints")
        first = metrics(folder)[-1]["loss"]
        assert run(given, resume_adapter_file=str(folder / name), iters=3)[0].step == 3
        assert metrics(folder)[0]["loss"] != first
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(RequestError, match=r"holds an adapter already, .* or start from it with --resume-adapter-file"):
        run(given, resume_adapter_file=str(tmp_path / "other"))
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(RequestError, match=r"a PEFT adapter already, which .*name another --adapter-path$"):
        run(given, resume_adapter_file=str(folder))


def test_what_a_killed_run_left_before_its_first_checkpoint_is_begun_over(given: dict[str, Any]) -> None:
    folder = Path(given["adapter_path"])
    (folder / "checkpoints" / ".00000003.partial").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(RequestError, match="holds no checkpoint to resume from; leave --resume out"):
        run(given, resume=True)
    assert len(metrics(run(given)[0].adapter_path)) == 6
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000003", "00000006"]


# --- what comes before what ---


class Read(Exception):
    """Weights were read."""


@pytest.fixture
def no_weights(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arrays: Any) -> None:
        raise Read

    monkeypatch.setattr(run_module.mx, "eval", read)


@pytest.mark.usefixtures("no_weights")
def test_data_errors_and_a_dry_run_come_before_the_weights(given: dict[str, Any]) -> None:
    shown = preview(Settings.from_mapping(given, "here"), 2)
    assert len(shown) == 2 and "Say red 0." in shown[0]
    data = Path(given["data"])
    with (data / "valid.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(RequestError, match=r"valid\.jsonl:5: not JSON"):
        run(given)
    (data / "valid.jsonl").unlink()
    (data / "test.jsonl").unlink()
    with pytest.raises(RequestError, match=r"holds no test\.jsonl, which --test needs"):
        run(given, test=True)


def test_the_library_of_report_to_and_the_folder_come_before_the_model(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "download", lambda *args, **options: pytest.fail("the model was loaded"))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(RequestError, match="--report-to wandb needs a library"):
        run(given, report_to="wandb")
    with pytest.raises(RequestError, match="no checkpoint"):
        run(given, resume=True)
    Path(given["adapter_path"]).touch()
    with pytest.raises(RequestError, match="adapter is not a folder; name another --adapter-path"):
        run(given)


def test_a_listener_that_has_left_costs_no_step(given: dict[str, Any]) -> None:
    def tell(sentence: str) -> None:
        if sentence.startswith("step 4"):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        finetune({**given, "save_every": 100}, tell=tell)
    again, _ = run(given, resume=True, save_every=100)
    assert [line["step"] for line in metrics(again.adapter_path)] == [1, 2, 3, 4, 5, 6]


def test_it_runs_in_a_thread_that_has_no_signals(given: dict[str, Any]) -> None:
    done: list[Finetuned] = []
    thread = threading.Thread(target=lambda: done.append(run(given, iters=1)[0]))
    thread.start()
    thread.join()
    assert done[0].step == 1


# --- what is trained ---


def tensors(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "adapters.safetensors")))


def test_full_fine_tuning_trains_the_last_blocks_or_everything(given: dict[str, Any], tmp_path: Path) -> None:
    last, _ = run(given, fine_tune_type="full", num_layers=1, adapter_path=str(tmp_path / "last"), iters=2)
    assert {name.split(".")[2] for name in tensors(last.adapter_path)} == {"1"}
    assert json.loads((last.adapter_path / "adapter_config.json").read_text())["num_layers"] == 1
    everything, _ = run(given, fine_tune_type="full", adapter_path=str(tmp_path / "all"), iters=2)
    assert "model.embed_tokens.weight" in tensors(everything.adapter_path)
    with pytest.raises(RequestError, match="num_layers 3 is out of range; the model has 2 layers"):
        run(given, fine_tune_type="full", num_layers=3)
    begun = {"fine_tune_type": "full", "iters": 1, "learning_rate": 0.0}
    again, _ = run(given, **begun, resume_adapter_file=str(last.adapter_path), adapter_path=str(tmp_path / "again"))
    before, after = tensors(last.adapter_path), tensors(again.adapter_path)
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(RequestError, match=r"holds model\.embed_tokens\.weight, which --num-layers 1 leaves out"):
        run(given, **begun, resume_adapter_file=str(everything.adapter_path), num_layers=1)
    with pytest.raises(RequestError, match="DPO compares with the base, which --fine-tune-type full changes"):
        run({**given, **begun}, task="dpo", data=str(Path(given["data"]).with_name("pairs")))


@pytest.fixture
def adapter(given: dict[str, Any], tmp_path: Path) -> Path:
    """An adapter of rank 4 for the last block that changes the output."""
    model, _ = load(given["model"])
    add_adapter(model, rank=4, scale=2.0, num_layers=1, seed=5)
    model.layers[1].mlp.down_proj.lora_b += 0.1
    save_adapter(model, tmp_path / "begun", {})
    return tmp_path / "begun"


@pytest.mark.parametrize("name", ["", "adapters.safetensors", "0000100_adapters.safetensors"])
def test_the_adapter_to_begin_with_is_the_file_that_was_named(
    given: dict[str, Any], adapter: Path, name: str
) -> None:
    if name.startswith("0"):  # as mlx-lm numbers them; the other file is of another time
        shutil.copy(adapter / "adapters.safetensors", adapter / name)
        old = tensors(adapter)
        mx.eval(old)
        mx.save_safetensors(str(adapter / "adapters.safetensors"), {key: 0 * value for key, value in old.items()})
    expected = dict(mx.load(str(adapter / (name or "adapters.safetensors"))))
    del given["lora_parameters"]
    done, _ = run(given, resume_adapter_file=str(adapter / name), iters=1, learning_rate=0.0)
    after = tensors(done.adapter_path)
    assert expected.keys() == after.keys() and all(mx.array_equal(expected[key], after[key]) for key in after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "dora"}, "is of the kind lora, and --fine-tune-type is dora; use --fine-tune-type lora"),
        ({"fine_tune_type": "full"}, "is of the kind lora"),
        ({"lora_parameters": {"rank": 8}}, "has rank 4, and the settings say 8; leave rank out"),
        ({"lora_parameters": {"scale": 20.0}}, "has scale 2.0, and the settings say 20.0"),
        ({"lora_parameters": {"dropout": 0.5}}, "has dropout 0.0"),
        ({"lora_parameters": {"keys": ["mlp.down_proj"]}}, "has keys"),
        ({"num_layers": 2}, "has num_layers 1, and the settings say 2"),
        ({"num_layers": -1}, "has num_layers 1, and the settings say 2"),
    ],
)
def test_an_adapter_that_is_not_what_the_settings_say_is_refused(
    given: dict[str, Any], adapter: Path, changes: dict[str, Any], message: str
) -> None:
    del given["lora_parameters"]
    with pytest.raises(RequestError) as caught:
        run(given, resume_adapter_file=str(adapter), **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(given["adapter_path"]).exists()


def test_what_was_not_said_goes_on_as_it_is(given: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    given["lora_parameters"] = {"rank": 4}
    done, _ = run(given, resume_adapter_file=str(adapter), iters=1, num_layers=1)
    config = json.loads((done.adapter_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 2.0 and config["num_layers"] == 1
    settings = Settings(
        model=given["model"], data=given["data"], adapter_path=str(tmp_path / "x"), resume_adapter_file=str(adapter),
        lora_parameters=LoraParameters(rank=5),
    )  # fmt: skip
    with pytest.raises(RequestError, match="has rank 4, and the settings say 5"):
        finetune(settings, tell=lambda sentence: None)


@pytest.mark.parametrize("name", ["nowhere", "adapter_model.bin"])
def test_what_is_no_adapter_is_one_line(given: dict[str, Any], adapter: Path, name: str) -> None:
    if name.endswith("bin"):
        (adapter / name).write_bytes(b"\x80")
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(Phi4Error, match=r"pickle|holds no adapter_config\.json") as caught:
        run(given, resume_adapter_file=str(adapter / name))
    assert isinstance(caught.value, (RequestError, CheckpointError)) and "\n" not in str(caught.value)


# --- one run in a folder ---


HOLD = """
import sys, time
from pathlib import Path
from phi4_mlx.lora.saving.run_lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(given: dict[str, Any]) -> None:
    folder = Path(given["adapter_path"])
    words = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for resume in (False, True):
        if resume:
            (folder / "checkpoints" / "00000001").mkdir(parents=True)
        with pytest.raises(RequestError, match=rf"{folder} is in use: process {holder.pid} is training there; "):
            run(given, resume=resume)
    shutil.rmtree(folder / "checkpoints")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert run(given)[0].step == 6 and not (folder / ".lock").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"holds no train\.jsonl"):
        run(given, data=str(Path(given["adapter_path"]).parent))
    assert not Path(given["adapter_path"]).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_a_warning(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    done, told = run(given, iters=1)
    assert done.step == 1 and f"{done.adapter_path} cannot be locked: {os.strerror(number)}" in told[0]


def test_a_folder_that_cannot_be_written_is_one_line(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"file/adapter cannot be written: Not a directory; name another"):
        run(given, adapter_path=str(tmp_path / "file" / "adapter"))


# --- advice that works ---


def test_a_run_whose_only_checkpoint_is_damaged_starts_from_its_adapter(given: dict[str, Any]) -> None:
    done, _ = run(given, iters=1)
    folder = done.adapter_path
    state = folder / "checkpoints" / "00000001" / "state.json"
    state.write_bytes(state.read_bytes() + b" ")
    advice = f"remove it, and start from the adapter: leave --resume out and give --resume-adapter-file {folder}$"
    with pytest.raises(CheckpointError, match=advice):
        run(given, iters=1, resume=True)
    shutil.rmtree(state.parent)
    with pytest.raises(RequestError, match="leave --resume out and start from its adapter"):
        run(given, iters=1, resume=True)
    assert run(given, iters=1, resume_adapter_file=str(folder))[0].step == 1


def test_a_run_that_is_stopped_before_its_first_step_is_started_again(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4_mlx.lora.training.trainer.any_process", lambda *_: True)
    _, told = run(given)
    assert told[-1] == "stopped before the first step: nothing was saved, and there is nothing to resume"
    monkeypatch.undo()
    with pytest.raises(RequestError, match="no checkpoint to resume from; leave --resume out to start a new run"):
        run(given, resume=True)
    assert run(given)[0].step == 6


def test_a_run_that_diverged_starts_again_from_its_adapter_elsewhere(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4_mlx.lora.training.trainer._flaw", lambda loss, norm, recent: "bad" if recent else "")
    folder = given["adapter_path"]
    with pytest.raises(RequestError, match=rf"--resume-adapter-file {folder} with a lower .* another --adapter-path"):
        run(given)
    monkeypatch.undo()
    assert run(given, resume_adapter_file=folder, learning_rate=1e-3, adapter_path=f"{folder}-2")[0].step == 6
    assert run(given, resume=True)[0].step == 6


def test_a_resumed_run_with_other_settings_or_data_becomes_a_new_one(given: dict[str, Any]) -> None:
    run(given, iters=1)
    (Path(given["data"]) / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for changes in ({"seed": 5}, {}):
        with pytest.raises(RequestError, match="leave --resume out and name another --adapter-path"):
            run(given, resume=True, iters=1, **changes)
    assert run(given, iters=1, adapter_path=f"{given['adapter_path']}-2")[0].step == 1


def test_a_flipped_bit_in_the_metrics_of_a_run_is_refused(given: dict[str, Any]) -> None:
    options = {"iters": 4, "save_every": 2, "lr_schedule": "constant"}
    done, _ = run(given, **options)
    file, draw = done.adapter_path / "metrics.jsonl", random.Random(2)
    whole = file.read_bytes()
    for _ in flipped_bits(file, some_bytes(file, 10, draw), draw):
        damaged = file.read_bytes()
        with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged .* step 4; move it away, and") as refused:
            run(given, **options | {"iters": 5}, resume=True)
        assert "\n" not in str(refused.value) and file.read_bytes() == damaged
    file.write_bytes(whole + b'{"step": 5, "lo')  # of a step that the killed run did not finish
    run(given, **options | {"iters": 5}, resume=True)
    assert [line["step"] for line in metrics(done.adapter_path)] == [1, 2, 3, 4, 5]
    file.rename(file.with_suffix(".old"))
    run(given, **options | {"iters": 6}, resume=True)
    assert [line["step"] for line in metrics(done.adapter_path)] == [6]
