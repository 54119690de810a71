"""Peak memory and time of the training loss at V = 200,064, beside mlx-lm.

    python tests/bench/loss.py [--runs 1]

First the loss with its gradient: 1,024 tokens, the head frozen as in LoRA. Then a training step of 32 layers at a small
width: 4 rows of 512 tokens, both with gradient checkpointing. Peaks do not count the model itself. A run takes minutes
on a CPU; with several, the time ratio is the median of pairs. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from harness import alternate, last_line, measure, median_ratio, option_parser
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

from phi4_mlx.adapters.layers import add_adapter
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.lora.training.loss import next_token_loss
from phi4_mlx.models.text import Model

VOCABULARY = 200_064
CONFIG = {
    "model_type": "phi3", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip

Loss = Callable[[mx.array], tuple[mx.array, Any]]  # ids [B, T + 1] -> (loss, arrays to evaluate with it)


class Run(NamedTuple):
    """One measured loss."""

    loss: float
    peak_bytes: int
    seconds: float


def tiny_model(layers: int) -> Model:
    """A model with Phi-4-mini's vocabulary and ratio of heads at a small width, and a LoRA adapter."""
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict({**CONFIG, "num_hidden_layers": layers}))
    add_adapter(model, rank=8)
    model.train()
    mx.eval(model.parameters())
    return model


def run(loss: Loss, ids: mx.array) -> Run:
    """Measures one loss, and drops its gradient."""
    done = measure(loss, ids)
    return Run(done.result[0].item(), done.above_bytes, done.seconds)


def compare(name: str, losses: tuple[Loss, Loss], ids: mx.array, runs: int) -> dict[str, float]:
    """Ratios of ours to mlx-lm's."""
    for loss in losses:
        run(loss, ids[:, :9])  # warm up
    ours, theirs = alternate(partial(run, losses[0], ids), partial(run, losses[1], ids), runs)
    first, other = ours[0], theirs[0]
    seconds = median_ratio([each.seconds for each in ours], [each.seconds for each in theirs])
    megabytes = [each.peak_bytes / 1e6 for each in (first, other)]
    print(f"{name}: {megabytes[0]:,.0f} MB beside {megabytes[1]:,.0f} MB, time ratio {seconds:.2f}", flush=True)
    return {
        f"{name}_memory_ratio": round(first.peak_bytes / other.peak_bytes, 4),
        f"{name}_time_ratio": round(seconds, 3),
        f"{name}_loss_difference": abs(first.loss - other.loss),
    }


def losses(model: Model) -> tuple[Loss, Loss]:
    """(ours, mlx-lm's): the loss and its gradient, every token a target."""

    def ours(ids: mx.array) -> tuple[mx.array, Any]:
        mask = mx.ones((ids.shape[0], ids.shape[1] - 1), mx.bool_)
        (loss, _), grads = nn.value_and_grad(model, next_token_loss)(model, ids[:, :-1], ids[:, 1:], mask)
        return loss, grads

    def theirs(ids: mx.array) -> tuple[mx.array, Any]:
        lengths = mx.array([[0, ids.shape[1]]] * ids.shape[0])
        (loss, _), grads = nn.value_and_grad(model, default_loss)(model, ids, lengths)
        return loss, grads

    return ours, theirs


def steps(model: Model) -> tuple[Loss, Loss]:
    """(ours, mlx-lm's): a training step, with gradient checkpointing and AdamW."""
    our_loss, their_loss = losses(model)
    optimizer = optim.AdamW(learning_rate=0.0)
    optimizer.init(model.trainable_parameters())

    def ours(ids: mx.array) -> tuple[mx.array, Any]:
        model.recompute = True
        loss, grads = our_loss(ids)
        optimizer.update(model, grads)
        model.recompute = False
        return loss, model.trainable_parameters()

    def theirs(ids: mx.array) -> tuple[mx.array, Any]:
        layer = type(model.layers[0])
        call = layer.__call__
        grad_checkpoint(model.layers[0])
        loss, grads = their_loss(ids)
        optimizer.update(model, grads)
        layer.__call__ = call
        return loss, model.trainable_parameters()

    return ours, theirs


def main() -> None:
    """Prints both comparisons, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=1)
    runs = parser.parse_args().runs
    result = compare("loss", losses(tiny_model(1)), mx.random.randint(1, VOCABULARY, (1, 1025)), runs)
    result |= compare("step", steps(tiny_model(32)), mx.random.randint(1, VOCABULARY, (4, 513)), runs)
    last_line("loss", **result, ok=result["loss_loss_difference"] < 1e-3)


if __name__ == "__main__":
    main()
