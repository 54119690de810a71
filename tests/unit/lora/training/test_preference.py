"""DPO and ORPO: equality with the obvious code, memory, refusals, and the margin after training."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.data.samples import Pair, Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.loss import next_token_loss
from phi4_mlx.lora.training.preference import REMEMBERED, PreferenceLoss
from phi4_mlx.lora.training.trainer import Trainer, evaluate
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Model

BETA = 0.4


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer), "train.jsonl:1")


def some_pairs(seed: int = 1) -> list[Pair]:
    """Pairs of different lengths, also beyond the RoPE boundary (64) and of one token, and with a token left out."""
    draw = random.Random(seed)
    made = []
    for prompt_length, lengths in ((5, (3, 7)), (30, (50, 2)), (12, (1, 1)), (3, (9, 80))):
        prompt = draw.choices(range(512), k=prompt_length)
        made.append(Pair(*(sample(prompt, draw.choices(range(512), k=length)) for length in lengths)))
    made[0].chosen.targets[-2] = False
    return made


def packed(pairs: list[Pair], **options: Any) -> Batch:
    """A batch of all pairs."""
    (batch,) = Batches(pairs, batch_size=len(pairs), max_seq_length=100, **options).fixed()
    return batch


def with_adapter(model: Model, kind: str = "lora", dropout: float = 0.0, trained: bool = True) -> Model:
    """The model with an adapter that changes its output, as after some training."""
    add_adapter(model, rank=4, scale=2.0, kind=kind, dropout=dropout)
    for number, layer in enumerate(adapter_layers(model).values()):
        if trained:
            layer.lora_b = 0.03 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    return model.train()


def naive_log_probs(model: Model, sample: Sample) -> mx.array:
    """The log-probabilities of a sample's targets, from all of its logits, alone in its row."""
    logits = model(mx.array([sample.ids[:-1]]))[0]
    by_token = nn.log_softmax(logits.astype(mx.float32))[mx.arange(len(sample.ids) - 1), mx.array(sample.ids[1:])]
    return by_token[mx.array([at for at, wanted in enumerate(sample.targets[1:]) if wanted])]


def naive_margins(model: Model, base: Model, pairs: list[Pair]) -> list[mx.array]:
    """The argument of DPO's sigmoid, for each pair."""
    gains = [
        [(naive_log_probs(model, each) - naive_log_probs(base, each)).sum() for each in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    return [BETA * (chosen - rejected) for chosen, rejected in gains]


def naive_dpo(model: Model, base: Model, pairs: list[Pair]) -> mx.array:
    return -mx.stack([nn.log_sigmoid(margin) for margin in naive_margins(model, base, pairs)]).mean()


def naive_orpo(model: Model, base: Model, pairs: list[Pair]) -> mx.array:
    losses = []
    for pair in pairs:
        chosen, rejected = (naive_log_probs(model, each).mean() for each in (pair.chosen, pair.rejected))
        odds, other_odds = (mx.exp(p) / (1 - mx.exp(p)) for p in (chosen, rejected))
        losses.append(-chosen - BETA * nn.log_sigmoid(mx.log(odds / other_odds)))
    return mx.stack(losses).mean()


def plain_loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """The loss of plain fine-tuning on both answers."""
    return next_token_loss(model, batch.inputs, batch.targets, batch.mask, batch.segments)


NAIVE = {"dpo": naive_dpo, "orpo": naive_orpo}


def flat_grad(loss: Callable[..., Any], model: Model, *arguments: Any) -> tuple[Any, dict[str, mx.array]]:
    value, grads = nn.value_and_grad(model, loss)(model, *arguments)
    return value, dict(tree_flatten(grads))


def assert_close(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mx.abs(ours[name] - expected).max().item() < 1e-5, name
    assert max(mx.abs(grad).max().item() for grad in theirs.values()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "orpo"])
@pytest.mark.parametrize(("kind", "recompute"), [("lora", False), ("lora", True), ("dora", False)])
def test_loss_and_gradients_are_those_of_the_whole_logits(
    any_model: Callable[..., LanguageModel], task: str, kind: str, recompute: bool
) -> None:
    model, pairs = with_adapter(any_model(), kind), some_pairs()
    batch = packed(pairs)
    assert batch.segments.max().item() > 2
    theirs, their_grads = flat_grad(NAIVE[task], model, any_model(), pairs)
    model.recompute = recompute
    (ours, count), our_grads = flat_grad(PreferenceLoss(task, BETA), model, batch)
    assert abs(ours.item() - theirs.item()) < 1e-5 and count.item() == len(pairs)
    assert_close(our_grads, their_grads)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_pairs_in_rows_are_the_mean_of_pairs_alone(any_model: Callable[..., LanguageModel], task: str) -> None:
    model, pairs, loss = with_adapter(any_model()), some_pairs(), PreferenceLoss(task, BETA)
    (ours, _), our_grads = flat_grad(loss, model, packed(pairs))
    alone = [flat_grad(loss, model, packed([pair])) for pair in pairs]
    assert [count.item() for (_, count), _ in alone] == [1] * len(pairs)
    assert abs(ours.item() - sum(each.item() for (each, _), _ in alone) / len(pairs)) < 1e-5
    assert_close(our_grads, {name: sum(grads[name] for _, grads in alone) / len(pairs) for name in our_grads})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dpo_begins_at_ln_2(any_model: Callable[..., LanguageModel], kind: str) -> None:
    """A fresh adapter changes nothing, and the base has no dropout: the margin is exactly 0."""
    model, loss = with_adapter(any_model(), kind, dropout=0.5, trained=False), PreferenceLoss("dpo", BETA)
    value, _ = loss(model, packed(some_pairs()))
    assert value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.figures().margin == 0


@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_a_step_down_the_gradient_raises_chosen_over_rejected(tiny_model: Callable[..., Model], task: str) -> None:
    model, loss, batch = with_adapter(tiny_model()), PreferenceLoss(task, BETA), packed(some_pairs())
    _, grads = nn.value_and_grad(model, loss)(model, batch)
    before = loss.figures()
    optim.SGD(1e-3).update(model, grads)
    loss(model, batch)
    assert loss.figures().margin > before.margin + 1e-3


@pytest.mark.parametrize("grad", [False, True])
def test_the_base_is_the_same_whatever_dropout_drops(tiny_model: Callable[..., Model], grad: bool) -> None:
    """The adapter adds nothing here, so the margin is 0 only if dropout leaves the base alone."""
    pairs = some_pairs()
    model, loss = with_adapter(tiny_model(), dropout=0.5, trained=False), PreferenceLoss("dpo", BETA)
    for layer in adapter_layers(model).values():
        layer.lora_a = layer.lora_a * 0  # drops of nothing are nothing: the policy is the base too
        layer.lora_b = layer.lora_b + 1
    batch = packed(pairs)
    for seed in range(2):
        mx.random.seed(seed)
        value, _ = flat_grad(loss, model, batch)[0] if grad else loss(model, batch)
        assert value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.figures().margin == 0


def test_figures_are_those_of_the_pairs_since_the_last_call(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, pairs = with_adapter(tiny_model()), tiny_model(), some_pairs()
    loss = PreferenceLoss("dpo", BETA)
    margins = [margin.item() for margin in naive_margins(model, base, pairs)]
    for pair in pairs:
        flat_grad(loss, model, packed([pair]))
    figures = loss.figures()
    assert figures.pairs == 4 and figures.accuracy == sum(margin > 0 for margin in margins) / 4
    assert 0 < figures.accuracy < 1
    assert figures.margin == pytest.approx(sum(margins) / 4, abs=1e-5)
    assert loss.figures().pairs == 0 and loss.figures().margin == 0
    monkeypatch.setattr(loss, "_margins", deque(maxlen=2))
    for pair in pairs:  # a caller that never asks
        loss(model, packed([pair]))
    assert loss.figures().pairs == 2 and PreferenceLoss("dpo")._margins.maxlen == REMEMBERED


def test_the_base_takes_no_memory_of_its_own(tiny_model: Callable[..., Model]) -> None:
    """No second model, and no activations of the base's pass are in memory during backward."""
    model = with_adapter(tiny_model(num_hidden_layers=4))
    batch = packed(some_pairs())

    def peak(loss: Callable[..., Any]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        result = flat_grad(loss, model, batch)
        mx.eval(result)
        found = mx.get_peak_memory() - before
        del result
        assert mx.get_active_memory() - before < 10_000
        return found

    mx.eval(vars(batch), model.parameters())
    for recompute in (False, True):
        model.recompute = recompute
        peak(plain_loss)  # whatever the first run leaves behind
        assert peak(PreferenceLoss("dpo")) < 1.1 * peak(plain_loss), recompute


def test_the_head_runs_on_answers_alone(tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    head = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, hidden: (rows.append(len(hidden)), head(self, hidden))[1])
    long = Pair(sample([1] * 90, [2, 3]), sample([1] * 90, [4]))
    model, batch = with_adapter(tiny_model()), packed([*some_pairs(), long])

    def cost(loss: Callable[..., Any]) -> int:
        rows.clear()
        loss(model, batch)
        return sum(rows)

    once = cost(plain_loss)
    assert once <= 2 * batch.mask.sum().item() < batch.mask.size
    assert cost(PreferenceLoss("orpo")) == once
    assert cost(PreferenceLoss("dpo")) == 2 * once


def test_dpo_without_an_adapter_is_refused(tiny_model: Callable[..., Model]) -> None:
    batch = packed(some_pairs())
    with pytest.raises(RequestError, match=r"embed_tokens.weight would be trained; use --fine-tune-type lora .*orpo"):
        PreferenceLoss("dpo")(tiny_model(), batch)
    model = tiny_model()
    model.freeze()
    with pytest.raises(RequestError, match="there is no adapter"):
        PreferenceLoss("dpo")(model, batch)
    model = with_adapter(model)
    model.model.norm.unfreeze()
    with pytest.raises(RequestError, match=r"model\.norm\.weight would be trained"):
        PreferenceLoss("dpo")(model, batch)
    assert model.model.norm.trainable_parameters() and all(layer.on for layer in adapter_layers(model).values())


@pytest.mark.parametrize("tied", [True, False])
def test_orpo_needs_no_adapter(tiny_model: Callable[..., Model], tied: bool) -> None:
    model, pairs = tiny_model(tie_word_embeddings=tied), some_pairs()
    (ours, _), our_grads = flat_grad(PreferenceLoss("orpo", BETA), model, packed(pairs))
    theirs, their_grads = flat_grad(naive_orpo, model, model, pairs)
    assert abs(ours.item() - theirs.item()) < 1e-5
    assert_close(our_grads, their_grads)


@pytest.mark.parametrize("task", ["dpo", "orpo"])
@pytest.mark.parametrize("likelier", ["chosen", "rejected"])
def test_certainty_is_never_nan(tiny_model: Callable[..., Model], task: str, likelier: str) -> None:
    """One answer has probability 1, the other 0."""
    model = with_adapter(tiny_model())
    model.model.norm.weight = 1000 * model.model.norm.weight
    order = mx.argsort(model(mx.array([[1]]))[0, 0]).tolist()
    first, second = (order[-1], order[0]) if likelier == "chosen" else (order[0], order[-1])
    pair = Pair(sample([1], [first]), sample([1], [second]))
    assert naive_log_probs(model, getattr(pair, likelier)).item() == 0
    (value, _), grads = flat_grad(PreferenceLoss(task), model, packed([pair]))
    assert math.isfinite(value.item())
    assert all(mx.isfinite(grad).all().item() for grad in grads.values())


def test_no_pair_is_no_loss_and_never_nan(tiny_model: Callable[..., Model]) -> None:
    """The case of a process without a row of the last batch."""
    model, loss = with_adapter(tiny_model()), PreferenceLoss("dpo")
    batch = Batch(*(mx.zeros((1, 32), kind) for kind in (mx.int32, mx.int32, mx.bool_, mx.int32)))
    (value, count), grads = flat_grad(loss, model, batch)
    assert value.item() == 0 and count.item() == 0 and loss.figures().pairs == 0
    assert all((grad == 0).all().item() for grad in grads.values())


@pytest.mark.parametrize("emptied", [[(2, "chosen")], [(2, "rejected")], [(1, "chosen"), (2, "rejected")]])
def test_what_is_no_pair_is_refused(tiny_model: Callable[..., Model], emptied: list[tuple[int, str]]) -> None:
    """Also if two pairs of a row each lose one answer, and the remaining answers look like a pair."""
    pairs = some_pairs()
    for number, answer in emptied:
        targets = getattr(pairs[number], answer).targets
        targets[:] = [False] * len(targets)
    with pytest.raises(RequestError, match="each with a target"):
        PreferenceLoss("orpo")(tiny_model(), packed(pairs))
    with pytest.raises(RequestError, match="takes pairs of answers"):
        PreferenceLoss("orpo")(tiny_model(), packed([some_pairs()[0].chosen]))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("task", "beta", "message"),
    [
        ("sft", 0.1, "'sft' is not a preference task; known are dpo, orpo"),
        ("dpo", 0.0, "beta must be a number from 1e-06 to 100, not 0.0"),
        ("orpo", -1.0, r"beta .* not -1\.0"),
        ("orpo", math.nan, "beta .* not nan"),
        ("dpo", math.inf, "beta .* not inf"),
    ],
)
def test_options_out_of_range_are_refused(task: str, beta: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PreferenceLoss(task, beta)


def unliked_pairs(base: Model, count: int) -> list[Pair]:
    """Pairs whose rejected answer is likelier under the base; the answers differ in their last tokens."""
    draw, made = random.Random(5), []
    while len(made) < count:
        prompt, middle = draw.choices(range(200), k=draw.randint(4, 8)), draw.choices(range(200, 400), k=2)
        answers = [sample(prompt, [*middle, style, style]) for style in (401, 402)]
        first, second = sorted(answers, key=lambda each: naive_log_probs(base, each).sum().item())
        if first is answers[0]:
            made.append(Pair(first, second))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_training_makes_the_chosen_answers_likelier_and_leaves_the_base_alone(
    tiny_model: Callable[..., Model], tmp_path: Path, task: str
) -> None:
    base = tiny_model()
    pairs = unliked_pairs(base, 40)
    train, held_out = pairs[:30], pairs[30:]
    model, loss = tiny_model(), PreferenceLoss(task, BETA)
    add_adapter(model, rank=4, scale=4.0, dropout=0.1)

    def rate() -> float:
        """The share of held-out pairs whose chosen answer is likelier."""
        model.eval()
        log_probs = [[naive_log_probs(model, each).sum().item() for each in vars(pair).values()] for pair in held_out]
        return sum(chosen > rejected for chosen, rejected in log_probs) / len(log_probs)

    assert rate() == 0
    settings = Settings(task=task, iters=12, batch_size=6, learning_rate=2e-2, grad_checkpoint=True)
    loss._margins.append(mx.array([9.0]))  # what was no step is in no step's figures
    folder = RunFolder(tmp_path, len(model.layers))
    trainer = Trainer(model, Batches(train, batch_size=6, max_seq_length=64), settings, folder, loss=loss)
    steps = list(trainer.run())
    assert rate() > 0.8
    assert steps[-1].loss < 0.7 * steps[0].loss and steps[0].accuracy == 0 and steps[-1].accuracy == 1
    assert steps[-1].margin > steps[0].margin and loss.figures().pairs == 0  # each step tells its own
    evaluate(model, [packed(held_out)], loss)
    assert loss.figures().accuracy > 0.8
    ids = mx.array([pairs[0].chosen.ids])
    on = model(ids)
    for layer in adapter_layers(model).values():
        layer.on = False
    assert mx.array_equal(model(ids), base(ids)) and not mx.array_equal(on, base(ids))
