"""The recipe of `demo-flash`: a model like Phi-4-mini-flash-reasoning, with the tokenizer of `demo`.

This project's trainer makes the updates, on all weights. Its gradient is compiled here, because a CPU spends most of a
step in small operations that a compiler fuses.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import problems
from cpu_math import cross_entropy, fast_cpu_math
from mlx.utils import tree_map_with_path

from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.config.sambay import SambaYConfig
from phi4_mlx.data.samples import Sample
from phi4_mlx.hub import resolve
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.settings import Schedule, Settings
from phi4_mlx.lora.training.batches import Batch, Batches
from phi4_mlx.lora.training.loss import Loss
from phi4_mlx.lora.training.signals import Stop
from phi4_mlx.lora.training.trainable import make_trainable
from phi4_mlx.lora.training.trainer import Trainer
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.sambay import Model, step_bias
from phi4_mlx.tokens.tokenizer import Tokenizer

SEED = 4
CONFIG = SambaYConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=1024,
    max_position_embeddings=4096,
    sliding_window=64,
    mamba_d_state=8,
    mamba_dt_rank=8,
)
BATCH_SIZE = 8
CONVERSATIONS, SETTLING_CONVERSATIONS = 28_000, 6_000
PEAK_RATE, SETTLING_RATE = 2.5e-3, 1e-3
WARMUP = 50
WIDTH = 16  # rows are padded to a multiple of this, since each width is compiled
LOG_STEPS = 100


def make_flash(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Trains the model.

    The last part computes the loss with weights rounded to 4 bits, so that quantisation does not cost accuracy, and
    adds products such as 3 times 12, which are learned in no time once 12 times 3 is known, and earlier turns without
    thoughts.

    Args:
        folder: gets the files of the tokenizer.

    Returns:
        The model and its config.json.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(resolve("demo") / name, folder / name)
    tokenizer = load_tokenizer_and_format(folder)
    mx.random.seed(SEED)
    model = Model(CONFIG)
    model.update(tree_map_with_path(initial, model.parameters()))
    mx.eval(model.parameters())
    first = samples(tokenizer, problems.conversations(1, CONVERSATIONS))
    last = samples(tokenizer, problems.conversations(2, SETTLING_CONVERSATIONS, digit_first=0.5, history=0.35))
    run(model, first, PEAK_RATE, answer_loss, folder / "run")
    run(model, last, SETTLING_RATE, rounded_loss(model), folder / "settling")
    return model, CONFIG.to_dict()


def initial(path: str, weight: mx.array) -> mx.array:
    """An initial weight: steps larger than Mamba's, because the texts are short, and no biases of attention."""
    if path.endswith("dt_proj.bias"):
        return step_bias(weight.size, steps=(0.01, 0.5))
    return mx.zeros_like(weight) if path.endswith(("Wqkv.bias", "out_proj.bias")) else weight


def samples(tokenizer: Tokenizer, conversations: Iterable[list[problems.Message]]) -> list[Sample]:
    """Conversations as samples whose targets are the assistant's words, but for answers that lost their thoughts."""
    made = []
    for number, messages in enumerate(conversations):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)[:-1]
        targets = tokenizer.chat_format.own_words(tokenizer, ids)
        answers = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        lost = [at for at in answers if "<think>" not in messages[at]["content"]]
        if lost:
            start = len(tokenizer.apply_chat_template(messages[: lost[-1] + 1], add_generation_prompt=False)) - 1
            targets = [False] * start + list(targets[start:])
        made.append(Sample(ids, targets, f"conversation {number}"))
    return made


def run(model: Model, data: list[Sample], rate: float, loss: Loss, folder: Path) -> None:
    """Trains on each sample once; the rate falls to zero.

    Args:
        model: the model.
        data: the samples.
        rate: highest learning rate.
        loss: the loss, of arrays that are not computed yet.
        folder: gets checkpoints.
    """
    batches = Batches(data, batch_size=BATCH_SIZE, packing=False, seed=SEED)
    steps = batches.steps_per_epoch
    schedule = Schedule("cosine_decay", (rate, steps - WARMUP), WARMUP)
    settings = Settings(
        fine_tune_type="full", epochs=1, batch_size=BATCH_SIZE, packing=False, lr_schedule=schedule, seed=SEED,
        weight_decay=0.02, optimizer_config={"betas": [0.9, 0.98]}, save_every=1000,
    )  # fmt: skip
    make_trainable(model, settings)
    shutil.rmtree(folder, ignore_errors=True)
    run_folder, stop = RunFolder(folder, len(model.layers)), Stop()
    gradients = CompiledGradients(model, loss)
    trainer = Trainer(model, batches, settings, run_folder, loss=loss, stop=stop, gradients=gradients)
    recent, seconds = [], 0.0
    with fast_cpu_math():
        for step in trainer.run():
            recent, seconds = [*recent, step.loss], seconds + step.seconds
            if step.step % LOG_STEPS == 0 or step.step == steps:
                mean = sum(recent) / len(recent)
                print(f"step {step.step:,} of {steps:,}  loss {mean:.4f}  {seconds / 60:.1f} min", flush=True)
                recent = []
    stop.pass_on()


class CompiledGradients:
    """The `gradients` of a trainer whose updates take one batch, compiled for each width of rows."""

    def __init__(self, model: LanguageModel, loss: Loss):
        def passed(parameters: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
            model.update(parameters)
            return loss(model, Batch(*arrays))

        self._step = mx.compile(mx.value_and_grad(passed))

    def __call__(
        self, model: LanguageModel, loss: Loss, batches: Iterator[Batch], *ignored: Any
    ) -> tuple[float, int, Any]:
        batch, parameters = next(batches), model.trainable_parameters()
        arrays = [batch.inputs, batch.targets, batch.mask, batch.segments]
        padding = -arrays[0].shape[1] % WIDTH
        (mean, count), gradients = self._step(parameters, *(mx.pad(each, [(0, 0), (0, padding)]) for each in arrays))
        model.update(parameters)  # compiling left symbolic arrays in their place
        mx.eval(mean, count, gradients)
        return mean.item(), int(count.item()), gradients


def answer_loss(model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy of the targets, and their number; a `Loss` that can be compiled."""
    each = cross_entropy(model.logits(model.hidden(batch.inputs, segments=batch.segments)), batch.targets)
    count = batch.mask.sum()
    return (each * batch.mask).sum() / count, count


def rounded_loss(model: LanguageModel) -> Loss:
    """`answer_loss` of the weights as they are in the package; its gradient is that of the unquantised ones."""
    modules = model.named_modules()
    quantized = {f"{path}.weight" for path, module in modules if model.quantizable(path, module)}

    def rounded(path: str, weight: mx.array) -> mx.array:
        if path not in quantized:
            return weight
        packed = mx.quantize(weight, group_size=32)
        return weight + mx.stop_gradient(mx.dequantize(*packed, group_size=32) - weight)

    def loss(model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
        model.update(tree_map_with_path(rounded, model.trainable_parameters()))
        return answer_loss(model, batch)

    return loss
