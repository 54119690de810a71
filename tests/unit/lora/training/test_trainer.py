"""The training loop: learning, weighting by target, resuming to the bit, stopping, and losses that are not finite."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter
from phi4_mlx.data.samples import Sample
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.lora.progress import Step
from phi4_mlx.lora.saving import checkpoints, run_folder
from phi4_mlx.lora.saving.metrics import MetricsLog, read_metrics
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.gradients import mean_gradients
from phi4_mlx.lora.training.loss import sft_loss
from phi4_mlx.lora.training.trainer import Trainer, evaluate
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model
from tests.counting_run import finish, same, samples, trainer


@pytest.mark.slow
def test_it_learns(any_model: Callable[..., LanguageModel], tmp_path: Path) -> None:
    steps = list(trainer(any_model, tmp_path, iters=40, batch_size=8).run())
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert [step.step for step in steps] == list(range(1, 41))
    validated = [step.valid_loss for step in steps if step.valid_loss is not None]
    assert len(validated) == 10 and validated[-1] < validated[0]
    rates = [step.learning_rate for step in steps]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert max(rates) == rates[2] and rates[-1] == pytest.approx(1e-3, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "sgd"])
@pytest.mark.parametrize("cut", [4, 8])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    tiny_model: Callable[..., Model], tmp_path: Path, optimizer: str, cut: int
) -> None:
    losses, adapter = finish(trainer(tiny_model, tmp_path / "whole", optimizer=optimizer))
    broken = trainer(tiny_model, tmp_path / "broken", optimizer=optimizer)
    first = [step.loss for step, _ in zip(broken.run(), range(cut + 2), strict=False)]  # two steps too many, then gone
    mx.random.seed(99)
    again = trainer(tiny_model, tmp_path / "broken", optimizer=optimizer)
    assert again.resume() == cut
    rest, resumed = finish(again)
    assert first[:cut] + rest == losses
    assert same(resumed, adapter)


class Dead(BaseException):
    """An exception that the trainer does not catch, like a power cut."""


def die(monkeypatch: pytest.MonkeyPatch, run: Trainer, step: int, moment: str, before: bool) -> None:
    """Ends a run while a step is written: right before one of its writes, or right after it."""
    place, name = {
        "metrics": (run.folder.metrics, "add"),
        "best": (run_folder, "write_folder"),
        "checkpoint": (run_folder, "save_checkpoint"),
        "adapter": (run_folder, "write_folder"),
    }[moment]
    real = getattr(place, name)

    def dying(*args: Any) -> None:
        of_kind = name != "write_folder" or (args[0].name == "best") == (moment == "best")
        if before and of_kind and run.progress.step == step:
            raise Dead
        real(*args)
        if of_kind and run.progress.step == step:
            raise Dead

    monkeypatch.setattr(place, name, dying)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["metrics", "best", "checkpoint", "adapter"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", [8, 12])
def test_a_run_that_dies_while_a_step_is_written_goes_on_as_if_it_had_not(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, moment: str,
    before: bool,
) -> None:  # fmt: skip
    """Metrics, best adapter, checkpoint and adapter agree, whichever of them was the last to be written."""

    def recorded(folder: Path, step: int = 0) -> Trainer:
        run = trainer(tiny_model, folder)
        run.folder.metrics = MetricsLog(folder, step)
        return run

    _, adapter = finish(recorded(tmp_path / "whole"))
    run = recorded(tmp_path / "broken")
    die(monkeypatch, run, step, moment, before)
    with pytest.raises(Dead):
        finish(run)
    monkeypatch.undo()
    again = trainer(tiny_model, tmp_path / "broken")
    again.folder.metrics = MetricsLog(tmp_path / "broken", again.resume())
    assert same(finish(again)[1], adapter)
    kept = [
        [(line["step"], line["loss"], line.get("valid_loss")) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 12
    for file in ("adapters.safetensors", "best/adapters.safetensors"):
        whole, broken = (mx.load(str(tmp_path / name / file)) for name in ("whole", "broken"))
        assert same(whole, broken), file


def test_a_checkpoint_of_another_base_is_refused(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    steps = trainer(tiny_model, tmp_path).run()
    for _ in range(5):
        next(steps)
    with pytest.raises(CheckpointError, match=r"base|model"):
        trainer(lambda: tiny_model(intermediate_size=192), tmp_path).resume()


def test_resuming_a_finished_or_an_unstarted_run(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path)
    with pytest.raises(RequestError, match="no checkpoint"):
        run.resume()
    finish(run)
    again = trainer(tiny_model, tmp_path)
    assert again.resume() == 12 and finish(again)[0] == []


def test_accumulation_weighs_each_target_the_same(any_model: Callable[..., LanguageModel], tmp_path: Path) -> None:
    """Two batches of one sample are one batch of two samples, whatever their lengths."""
    one = trainer(any_model, tmp_path / "a", dropout=0, batch_size=2, iters=1)
    two = trainer(any_model, tmp_path / "b", dropout=0, batch_size=1, grad_accumulation_steps=2, iters=1)
    pair = samples(2)
    batch = next(Batches(pair, batch_size=2))
    rows = list(Batches(pair, batch_size=1).fixed())
    (loss, tokens, grads), (loss2, tokens2, grads2) = (
        mean_gradients(one.model, sft_loss, iter([batch]), 1),
        mean_gradients(two.model, sft_loss, iter(rows), 2),
    )
    assert tokens == tokens2 and loss == pytest.approx(loss2, abs=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(grads2), strict=True):
        assert mx.allclose(a, b, rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packed_samples_have_the_loss_and_gradients_of_rows_of_their_own(
    any_model: Callable[..., LanguageModel], kind: str
) -> None:
    """Every target weighs the same, on both sides of the RoPE boundary and in any number of stretches."""
    model = any_model()
    add_adapter(model, rank=4, kind=kind)
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.03 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    data = [Sample([(3 * k + i) % 500 for i in range(n)], [False] + [i % 3 > 0 for i in range(n - 1)], f"x:{k}")
            for k, n in enumerate((2, 9, 70, 300, 400, 20, 33))]  # fmt: skip
    found = []
    for packing in (True, False):
        (batch,) = Batches(data, batch_size=7, packing=packing).fixed()
        found.append(mean_gradients(model, sft_loss, iter([batch]), 1))
    (loss, tokens, grads), (loss2, tokens2, grads2) = found
    assert tokens == tokens2 == sum(sum(each.targets) for each in data) and loss == pytest.approx(loss2, abs=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(grads2), strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("length", "in_update", "steps"), [
    ({"iters": 10}, 4, [4, 8, 10]), ({"iters": 3}, 1, [1, 2, 3]), ({"epochs": 2}, 5, [5, 10, 15, 20, 24]),
    ({"epochs": 1}, 100, [12]), ({"epochs": 1}, 12, [12]),
])  # fmt: skip
def test_a_run_is_as_long_as_mlx_lms(
    tiny_model: Callable[..., Model], tmp_path: Path, length: dict[str, int], in_update: int, steps: list[int]
) -> None:
    """An iteration is a batch of --batch-size samples, and every few of them make an update; an epoch has 12 here."""
    options = {"iters": None, "grad_accumulation_steps": in_update, "save_every": 5, "steps_per_eval": 9}
    run = trainer(tiny_model, tmp_path, **options | length)
    drawn: list[int] = []
    real = type(run.batches).__next__
    run.batches.__class__ = type("Counted", (Batches,), {"__next__": lambda self: (drawn.append(1), real(self))[1]})
    made = list(run.run())
    assert [step.step for step in made] == steps and len(drawn) == steps[-1]
    assert [step.step for step in made if step.valid_loss is not None] == [
        now for before, now in zip([0, *steps], steps, strict=False) if now == steps[-1] or now // 9 > before // 9
    ]
    if "epochs" in length:
        assert (run.batches.epoch, run.batches.step) == (length["epochs"], 0)


def test_a_longer_run_says_that_the_last_update_was_short(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    options = {"grad_accumulation_steps": 4, "lr_schedule": "constant"}
    finish(trainer(tiny_model, tmp_path, iters=6, **options))
    warnings: list[str] = []
    again = trainer(tiny_model, tmp_path, iters=9, warn=warnings.append, **options)
    assert again.resume() == 6 and "last update has 2 batches" in warnings[1]
    assert [step.step for step in again.run()] == [8, 9]


def test_sums_of_gradients_do_not_outgrow_half_precision(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of 1,000 times 100 targets overflows fp16; their mean does not."""
    run = trainer(tiny_model, tmp_path, grad_accumulation_steps=2)
    run.model.set_dtype(mx.float16)
    grads = tree_map(lambda weight: mx.full(weight.shape, 1000, mx.float16), run.model.trainable_parameters())
    monkeypatch.setattr(nn, "value_and_grad", lambda *_: lambda *_: ((mx.array(1.0), mx.array(100)), grads))
    loss, tokens, found = mean_gradients(run.model, sft_loss, run.batches, 2)
    assert (loss, tokens) == (1.0, 200)
    assert all(grad.dtype == mx.float16 and (grad == 1000).all() for _, grad in tree_flatten(found))


def test_a_validation_has_one_batch_in_memory(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    run, order = trainer(tiny_model, tmp_path), []

    def batches() -> Any:
        for n, batch in enumerate(run.batches.fixed()):
            order.append(f"made {n}")
            yield batch

    def loss(model: Model, batch: Batch) -> Any:
        order.append(f"used {len(order) // 2}")
        return sft_loss(model, batch)

    evaluate(run.model, batches(), loss)
    assert order[:4] == ["made 0", "used 0", "made 1", "used 1"]


def test_blocks_are_run_again_in_training_alone(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, checkpointed = trainer(tiny_model, tmp_path, grad_checkpoint=True), []
    monkeypatch.setattr(nn.utils, "checkpoint", lambda layer: checkpointed.append(layer) or layer)
    run.model.eval()(mx.array([[1, 2, 3]]))
    assert not checkpointed
    run.model.train()(mx.array([[1, 2, 3]]))
    assert len(checkpointed) == 2


def test_only_the_newest_checkpoints_stay(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    finish(trainer(tiny_model, tmp_path, save_every=2, keep_checkpoints=2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000010", "00000012"]


def test_a_full_disk_is_told_once_and_training_goes_on(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints before it stay complete; only at the end it is an error."""
    warnings: list[str] = []
    run = trainer(tiny_model, tmp_path, warn=warnings.append, save_every=2)
    steps = run.run()
    made = [next(steps) for _ in range(4)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004"]

    def full(path: str, tensors: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(checkpoints.mx, "save_safetensors", full)
    with pytest.raises(RequestError, match=r"checkpoints.*no space.*--resume"):
        made += list(steps)
    assert len(warnings) == 1 and "no space" in warnings[0] and len(made) >= 4 and run.progress.step == 12
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004"]


def test_a_damaged_checkpoint_is_named(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    trainer(tiny_model, tmp_path).save()
    path = tmp_path / "checkpoints" / "00000000" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"00000000 is damaged.*remove"):
        trainer(tiny_model, tmp_path).resume()


@pytest.mark.parametrize(
    ("changes", "named"), [({"learning_rate": 0.5}, "learning_rate"), ({"batch_size": 1}, "batch_size")]
)
def test_another_runs_checkpoint_is_refused(
    tiny_model: Callable[..., Model], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    trainer(tiny_model, tmp_path).save()
    with pytest.raises(RequestError, match=f"{named}.*adapter-path"):
        trainer(tiny_model, tmp_path, **changes).resume()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_after_the_step_with_a_checkpoint(
    tiny_model: Callable[..., Model], tmp_path: Path, number: signal.Signals
) -> None:
    run, before, steps = trainer(tiny_model, tmp_path, save_every=100), signal.getsignal(number), 0
    for step in run.run():
        steps = step.step
        if steps == 2:
            os.kill(os.getpid(), number)
    assert steps == 2 and signal.getsignal(number) is before
    assert trainer(tiny_model, tmp_path, save_every=100).resume() == 2


def spoiled(run: Trainer, at: int, loss: float) -> None:
    """Replaces the training loss of one step."""
    real = run.loss

    def spoiling(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
        mean, n = real(model, batch)
        return (0 * mean + loss if model.training and run.progress.step + 1 == at else mean), n

    run.loss = spoiling


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "at"), [(math.nan, 6), (math.inf, 6), (40.0, 12), (40.0, 56)])
def test_a_loss_that_is_no_loss_stops_before_it_does_harm(
    tiny_model: Callable[..., Model], tmp_path: Path, loss: float, at: int
) -> None:
    run = trainer(tiny_model, tmp_path, iters=60, save_every=100, steps_per_eval=1000)
    spoiled(run, at, loss)
    seen: list[Step] = []
    message = rf"step {at}: the loss .*model of step {at - 1};.*--resume.*--learning-rate"
    with pytest.raises(RequestError, match=message):
        seen.extend(run.run())
    again = trainer(tiny_model, tmp_path, iters=60, save_every=100, steps_per_eval=1000)
    assert again.resume() == at - 1
    assert all(bool(mx.isfinite(array).all()) for array in adapter_parameters(again.model).values())


@pytest.mark.parametrize("loss", [30.0, 40.0])
def test_the_first_steps_may_be_anything_and_a_rare_kind_of_sample_is_no_spike(
    tiny_model: Callable[..., Model], tmp_path: Path, loss: float
) -> None:
    run = trainer(tiny_model, tmp_path, iters=14, save_every=100, steps_per_eval=1000)
    for at in (9, 13):
        spoiled(run, at, loss)  # once it has been as high as that, it may be again
    assert len(list(run.run())) == 14


def test_before_the_first_step_there_is_nothing_to_resume(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "a")
    spoiled(run, 1, math.nan)
    with pytest.raises(RequestError, match=r"step 1: the loss is nan .*nothing was learned") as caught:
        finish(run)
    assert "step 0" not in str(caught.value) and "--resume" not in str(caught.value) and not (tmp_path / "a").exists()


def test_a_run_that_a_batch_stopped_goes_on_behind_it(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    """Also if there is a checkpoint of the same step, from before that batch."""
    run = trainer(tiny_model, tmp_path)
    spoiled(run, 5, math.nan)
    with pytest.raises(RequestError, match="--resume continues behind that batch"):
        finish(run)
    again = trainer(tiny_model, tmp_path)
    assert again.resume() == 4 and again.batches.step + again.batches.epoch * again.batches.steps_per_epoch == 5
    assert same(dict(mx.load(str(tmp_path / "adapters.safetensors"))), adapter_parameters(again.model))


def test_training_stops_when_validation_no_longer_improves(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path, iters=200, patience=2, learning_rate=0.0)
    steps = [step.step for step in run.run()]
    assert steps[-1] == 12 and run.progress.best_step == 4  # nothing is learned at rate 0: the first stays the best
