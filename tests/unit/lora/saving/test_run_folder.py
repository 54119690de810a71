"""A run's folder: complete whatever fails, written in the order that keeps a checkpoint true, and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError
from phi4_mlx.files import checksums
from phi4_mlx.lora.saving import checkpoints, run_folder
from phi4_mlx.lora.saving.checkpoints import keep_newest, newest_checkpoint, save_checkpoint
from phi4_mlx.lora.saving.metrics import MetricsLog, read_metrics
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.loss import sft_loss
from phi4_mlx.lora.training.trainer import Trainer
from phi4_mlx.models.text import Model
from tests.counting_run import finish, same, samples, trainer
from tests.damage import flipped_bits, some_bytes

ONE = {"a": mx.array([1.0])}


class Dead(BaseException):
    """An exception that nothing catches, like a power cut."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state_file(folder: Path) -> Path:
    return checkpoints.checkpoints(folder)[-1] / "state.json"


def seal(folder: Path) -> None:
    """Lists the checksums of a checkpoint again, after a change."""
    names = ("tensors.safetensors", "state.json")
    (folder / "checksums.sha256").write_text(checksums.checksums((name, folder / name) for name in names))


# --- checkpoints ---


@pytest.mark.parametrize("fatal", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_of_the_same_step_takes_the_olds_place_whenever_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int, after: bool
) -> None:
    """At any moment there is a newest checkpoint, and every named one is complete."""
    save_checkpoint(tmp_path, 7, ONE, {"n": 1})
    real, calls = Path.rename, 0

    def dying(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == fatal and not after:
            raise Dead
        moved = real(path, target)
        if calls == fatal:
            raise Dead
        return moved

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(checkpoints, "_put_back", lambda folder: None)  # a killed run puts nothing back
    with pytest.raises(Dead):
        save_checkpoint(tmp_path, 7, ONE, {"n": 2})
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["n"] == (2 if fatal == 2 and after else 1)
    save_checkpoint(tmp_path, 8, ONE, {"n": 3})
    assert names(tmp_path) == ["00000007", "00000008"]


def test_what_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, ONE, {})
    seen: list[str] = []

    def half(folder: Path, **options: Any) -> None:
        seen.append(folder.name)
        (folder / "state.json").unlink()  # and dies

    monkeypatch.setattr(shutil, "rmtree", half)
    keep_newest(tmp_path, 2)
    monkeypatch.undo()
    assert all(name.startswith(".") for name in seen)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["00000003", "00000004"]
    save_checkpoint(tmp_path, 5, ONE, {})
    assert names(tmp_path) == ["00000003", "00000004", "00000005"]


def test_a_step_is_saved_once_but_for_another_place_in_the_data(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = run_folder.save_checkpoint

    def save(folder: Path, step: int, *rest: Any) -> None:
        saved.append(step)
        real(folder, step, *rest)

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    run = trainer(tiny_model, tmp_path)
    finish(run)
    assert saved == [4, 8, 12]
    run.save()
    assert saved == [4, 8, 12]
    next(run.batches)  # behind a batch that was no good
    run.save()
    assert saved == [4, 8, 12, 12] and names(tmp_path)[-1] == "00000012"
    again = trainer(tiny_model, tmp_path)
    again.resume()
    again.save()
    assert saved == [4, 8, 12, 12] and again.batches.step == run.batches.step


# --- a disk that is full for a while ---


def full(*names: str) -> Callable[..., Any]:
    """A `write_folder` that fails for folders of these names, as on a full disk."""
    real = run_folder.write_folder

    def write(folder: Path, *rest: Any) -> None:
        if folder.name in names:
            raise OSError(28, "No space left on device", str(folder / "adapters.safetensors"))
        real(folder, *rest)

    return write


def test_a_best_adapter_that_could_not_be_written_is_not_forgotten(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written as it was, although the model has changed since."""
    options = {"steps_per_eval": 2, "iters": 8}
    losses = iter([3.0, 1.0, 2.0, 4.0] * 2)
    monkeypatch.setattr("phi4_mlx.lora.training.trainer.evaluate", lambda *args: next(losses))
    finish(trainer(tiny_model, tmp_path / "whole", **options))
    warnings: list[str] = []
    run = trainer(tiny_model, tmp_path / "full", warn=warnings.append, **options)
    writes = run_folder.write_folder
    for step in run.run():
        if step.step == 1:
            monkeypatch.setattr(run_folder, "write_folder", full("best"))
        if step.step == 7:
            monkeypatch.setattr(run_folder, "write_folder", writes)
            assert not (tmp_path / "full" / "best").exists()
        if step.step == 8:  # the next checkpoint tries it again
            assert (tmp_path / "full" / "best" / "adapters.safetensors").exists()
    assert run.progress.best_step == 4
    assert len(warnings) == 1 and "best/adapters.safetensors could not be written: No space left" in warnings[0]
    assert "training continues" in warnings[0] and "\n" not in warnings[0]
    files = [mx.load(str(tmp_path / name / "best" / "adapters.safetensors")) for name in ("whole", "full")]
    assert same(*files)


def test_metrics_that_could_not_be_written_come_with_the_next_ones(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    run = trainer(tiny_model, tmp_path, warn=warnings.append)
    run.folder.metrics = log = MetricsLog(tmp_path, 0)
    real = os.fsync

    def failing(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), log.path.stat()):
            with log.path.open("ab") as file:
                file.write(b'{"step": 3, "lo')  # half a line got through
            raise OSError(28, "No space left on device")
        real(descriptor)

    for step in run.run():
        if step.step == 2:
            monkeypatch.setattr(os, "fsync", failing)
        if step.step == 5:
            monkeypatch.undo()
    assert len(warnings) == 1 and "metrics.jsonl could not be written: No space left" in warnings[0]
    assert [line["step"] for line in read_metrics(log.path)] == list(range(1, 13))


def test_at_the_end_what_is_not_written_is_an_error_and_the_rest_is_written(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "write_folder", full("best"))
    run = trainer(tiny_model, tmp_path)
    with pytest.raises(RequestError, match=r"best/adapters\.safetensors could not be written: No space.*--resume"):
        finish(run)
    assert names(tmp_path)[-1] == "00000012" and (tmp_path / "adapters.safetensors").exists()


# --- what is resumed ---


def change(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The state with another value at a path like "progress.step"; None removes it."""
    *way, last = path.split(".")
    place = state
    for name in way:
        place = place[name]
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import make_tiny_model

    folder = tmp_path_factory.mktemp("saved")
    finish(trainer(make_tiny_model, folder, iters=2, save_every=1, keep_checkpoints=2))
    return folder


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("settings", None, "state.json has no settings"),
        ("settings", 5, "state.json has settings 5"),
        ("progress", [], "has progress"),
        ("base", 7, "has base 7"),
        ("surplus", 1, "'surplus', which is not known"),
        ("progress.step", None, "progress has no step"),
        ("progress.step", "2", "progress has step '2'"),
        ("progress.step", True, "progress has step True"),
        ("progress.best_loss", "low", "progress has best_loss 'low'"),
        ("progress.recent", [None], "not numbers from 0"),
        ("progress.step", -1, "not numbers from 0"),
        ("progress.more", 1, "'more', which is not known"),
        ("settings.iters", None, "its settings do not match: 'iters'"),
        ("settings.old_option", 1, "its settings do not match: 'old_option'"),
        ("batches", {}, "another run: seed is None"),
        ("batches.epoch", "x", "is damaged: epoch 'x'"),
        ("batches.step", 10**6, "are not a position"),
    ],
)
def test_a_damaged_state_is_one_line(
    tiny_model: Callable[..., Model], saved: Path, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    file = state_file(tmp_path / "run")
    file.write_text(json.dumps(change(json.loads(file.read_text()), path, value)))
    seal(file.parent)
    with pytest.raises(Phi4Error, match="checkpoint") as caught:
        trainer(tiny_model, tmp_path / "run", iters=2).resume()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "null", "[1]", "{", "", None])
def test_a_state_that_is_none_is_one_line_with_a_way_out(
    tiny_model: Callable[..., Model], saved: Path, tmp_path: Path, content: str | None
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    file = state_file(tmp_path / "run")
    file.unlink()
    if content is not None:
        file.write_text(content)
        seal(file.parent)
    with pytest.raises(CheckpointError, match=r"00000002 is damaged: .*remove it, and --resume takes") as caught:
        trainer(tiny_model, tmp_path / "run", iters=2).resume()
    assert "\n" not in str(caught.value)
    shutil.rmtree(file.parent)
    assert trainer(tiny_model, tmp_path / "run", iters=2).resume() == 1


def test_every_flipped_bit_of_a_checkpoint_is_refused(
    tiny_model: Callable[..., Model], saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    run, draw = trainer(tiny_model, tmp_path / "run", iters=2), random.Random(3)
    files = sorted(state_file(tmp_path / "run").parent.iterdir())
    assert [file.name for file in files] == ["checksums.sha256", "state.json", "tensors.safetensors"]
    for file in files:
        whole = file.read_bytes()
        for _ in flipped_bits(file, some_bytes(file, 100, draw), draw):
            with pytest.raises(CheckpointError, match=r"(its saved SHA-256|a list of its files); remove it, and"):
                run.resume()
        for damaged in (whole[:-1], whole + b"\n", b""):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="is damaged"):
                run.resume()
        file.unlink()
        with pytest.raises(CheckpointError, match=f"is damaged: .*{file.name}"):
            run.resume()
        file.write_bytes(whole)
    assert run.progress.step == 0 and run.resume() == 2


@pytest.mark.parametrize("forge", [lambda data: b"\xff" * 8 + data, lambda data: data[:8] + b"[" + data[9:]])
def test_a_forged_header_is_found_before_mlx_reads_it(
    tiny_model: Callable[..., Model], saved: Path, tmp_path: Path, forge: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(saved, tmp_path / "run")
    file = state_file(tmp_path / "run").with_name("tensors.safetensors")
    file.write_bytes(forge(file.read_bytes()))
    seal(file.parent)
    run = trainer(tiny_model, tmp_path / "run", iters=2)
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("MLX reads a forged header"))
    with pytest.raises(CheckpointError, match=r"is damaged: tensors\.safetensors .* has a false header"):
        run.resume()


@pytest.mark.parametrize("what", ["missing", "left over", "shape"])
def test_tensors_that_do_not_fit_are_named_before_anything_changes(
    tiny_model: Callable[..., Model], saved: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    file = state_file(tmp_path / "run").with_name("tensors.safetensors")
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    name = next(name for name in tensors if name.endswith("lora_b"))
    if what == "missing":
        del tensors[name]
    else:
        tensors[name if what == "shape" else "model/x"] = mx.ones((2, 2))
    mx.save_safetensors(str(file), tensors)
    seal(file.parent)
    run = trainer(tiny_model, tmp_path / "run", iters=2)
    with pytest.raises(CheckpointError, match=rf"is damaged: {'model/x' if what == 'left over' else name} .*{what}"):
        run.resume()
    assert run.progress.step == 0 and run.batches.step == 0


def test_another_base_of_the_same_shape_and_other_validation_data_are_told(
    tiny_model: Callable[..., Model], saved: Path
) -> None:
    nearly = tiny_model()
    weight = nearly.layers[1].mlp.down_proj.weight
    weight[17, 5] = weight[17, 5] * 1.0000002  # as after fusing an adapter, the norms are the same
    for other in (nearly, tiny_model(seed=1)):
        with pytest.raises(CheckpointError, match="on another base model"):
            trainer(lambda other=other: other, saved, iters=2).resume()
    for config in ({"rope_theta": 20_000.0}, {"num_hidden_layers": 3}):
        with pytest.raises(CheckpointError, match="on another base model"):
            trainer(lambda config=config: tiny_model(**config), saved, iters=2).resume()
    run = trainer(tiny_model, saved, iters=2)
    run.validation = Batches(samples(7), batch_size=2, max_seq_length=64)
    with pytest.raises(CheckpointError, match="with another validation set"):
        run.resume()
    run.validation = None
    with pytest.raises(CheckpointError, match="with another validation set"):
        run.resume()


def test_the_same_base_under_another_name_goes_on(tiny_model: Callable[..., Model], saved: Path) -> None:
    assert trainer(tiny_model, saved, iters=2, model="/moved/here", data="/there").resume() == 2


def test_checkpointing_may_change_and_so_may_the_length_under_a_constant_rate(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    options = {"lr_schedule": "constant", "steps_per_eval": 100}
    _, longer = finish(trainer(tiny_model, tmp_path / "whole", iters=10, **options))
    finish(trainer(tiny_model, tmp_path / "cut", iters=6, **options))
    warnings: list[str] = []
    run = trainer(tiny_model, tmp_path / "cut", warn=warnings.append, iters=10, grad_checkpoint=True, **options)
    assert run.resume() == 6
    assert len(warnings) == 2 and "grad_checkpoint has changed" in warnings[0]
    assert warnings[1] == "the run had 6 batches, and has 10 now"
    _, resumed = finish(run)
    assert all(mx.allclose(longer[name], resumed[name], atol=1e-4) for name in longer)
    finish(trainer(tiny_model, tmp_path / "cosine", iters=4))
    with pytest.raises(RequestError, match="of 4 batches, here it is one of 8, and its --lr-schedule cosine falls"):
        trainer(tiny_model, tmp_path / "cosine", iters=8).resume()


# --- signals ---


def interrupted(run: Trainer, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Runs with a signal, and two more while the checkpoint of the first is being written."""
    real = run_folder.save_checkpoint

    def save(*args: Any) -> None:
        os.kill(os.getpid(), number)
        real(*args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    for step in run.run():
        if step.step == 2:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_while_files_are_written_tears_nothing(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals,
    ends: type[BaseException],
) -> None:  # fmt: skip
    run = trainer(tiny_model, tmp_path, save_every=100)
    interrupted(run, monkeypatch, number)
    assert run.progress.step == 2 and names(tmp_path) == ["00000002"]
    assert (tmp_path / "adapters.safetensors").exists()
    with pytest.raises(ends) as caught:
        run.stop.pass_on()
    assert getattr(caught.value, "code", 143) == 143


def test_a_second_signal_within_a_step_leaves_at_once_and_saves_no_half_step(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    run = trainer(tiny_model, tmp_path, save_every=2)

    def loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return sft_loss(model, batch)

    run.loss = loss
    with pytest.raises(KeyboardInterrupt):
        finish(run)
    run.rescue()
    assert names(tmp_path) == ["00000002"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    losses, adapter = finish(trainer(tiny_model, tmp_path / "whole", save_every=2))
    again = trainer(tiny_model, tmp_path, save_every=2)
    again.resume()
    rest, resumed = finish(again)
    assert rest == losses[2:] and same(resumed, adapter)


def test_a_caller_in_trouble_between_two_steps_can_save(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path, save_every=100)
    steps = run.run()
    for _ in range(3):
        next(steps)
    run.rescue()
    assert names(tmp_path) == ["00000003"]


def test_a_run_does_not_end_before_its_checkpoint(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    finish(trainer(tiny_model, tmp_path, iters=6, lr_schedule="constant"))
    with pytest.raises(RequestError, match="is of step 6, and the run is to end at 4; give a larger --iters"):
        trainer(tiny_model, tmp_path, iters=4, lr_schedule="constant").resume()
