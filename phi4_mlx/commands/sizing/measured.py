"""A short run over the ranks of a launch, beside what `plan` predicts for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint_share import load_share
from phi4_mlx.commands.sizing.split import Split
from phi4_mlx.models.machine import median_seconds
from phi4_mlx.models.share import Share
from phi4_mlx.models.split_logits import array_of
from phi4_mlx.ranks.join import join
from phi4_mlx.terminal.amount import size

if TYPE_CHECKING:
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.ranks.launch import Launch

STEPS = 16
PROMPT = 32  # tokens before the first step

_LINEARS = (nn.Linear, nn.QuantizedLinear)
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Measured:
    """A short run, and what was predicted for it.

    Attributes:
        parallel: the way.
        predicted_bytes: weights of each rank, by `share_plan`.
        held_bytes: those that each rank holds.
        exchange_s: median of a sum over all ranks of one hidden state.
        matrices_s: median of one token's products with the matrices, for each rank.
        predicted_step_s: from these.
        step_s: median of a decode step.
    """

    parallel: str
    predicted_bytes: tuple[int, ...]
    held_bytes: tuple[int, ...]
    exchange_s: float
    matrices_s: tuple[float, ...]
    predicted_step_s: float
    step_s: float

    def lines(self) -> Iterator[str]:
        """The measurements, a line each."""
        for rank, (predicted, held) in enumerate(zip(self.predicted_bytes, self.held_bytes, strict=True)):
            yield f"rank {rank}: predicted {size(predicted)} of weights, holds {size(held)}"
        yield f"a sum of one hidden state over the ranks: {_ms(self.exchange_s)}"
        yield f"one token through the matrices of each rank: {', '.join(map(_ms, self.matrices_s))}"
        yield f"a decode step by {self.parallel}: predicted {_ms(self.predicted_step_s)}, measured {_ms(self.step_s)}"

    def to_json(self) -> dict[str, Any]:
        """The measurements as JSON."""
        return asdict(self)


def measure(launch: Launch, folder: Path, split: Split) -> Measured:
    """Loads a model's shares and runs some steps; ranks other than the first exit here.

    Args:
        launch: of this rank.
        folder: of the package.
        split: the prediction.

    Raises:
        Phi4Error: the ranks cannot meet, or the model cannot be loaded.
    """
    with join(launch, {"--model": folder.name, "--parallel": split.parallel}) as ranks:
        share = Share(split.parallel, launch.rank, launch.size)
        model = load_share(folder, share, ranks.group)
        arrays = [array for _, array in tree_flatten(model.parameters())]
        mx.eval(arrays)
        state = mx.zeros(split.width // model.dtype.size, model.dtype)
        exchange_s = median_seconds(lambda: mx.eval(mx.distributed.all_sum(state, group=ranks.group)), STEPS)
        products = _products(model)
        matrices_s = median_seconds(lambda: mx.eval([product() for product in products]), STEPS)
        step_s = _steps(model, share)
        own = [sum(int(array.nbytes) for array in arrays), matrices_s]
        if launch.rank:
            ranks.answer(own)
            while True:
                ranks.hear()  # until the end of the job
        held, matrices = zip(own, *ranks.answers(), strict=True)
    ranks.close()
    busy = sum(matrices) if split.parallel == "pipeline" else max(matrices)
    predicted = busy + split.exchanges(1).count * exchange_s
    return Measured(split.parallel, split.weights_bytes, held, exchange_s, matrices, predicted, step_s)


def _products(model: Any) -> list[Callable[[], mx.array]]:
    """One token's product with each matrix of the blocks, and with the head where this rank has one."""
    linears = [each for layer in model.layers for _, each in layer.named_modules() if isinstance(each, _LINEARS)]
    applied: list[tuple[nn.Module, Callable[[mx.array], mx.array]]] = [(each, each) for each in linears]
    embedding = getattr(model.model, "embed_tokens", None)
    if isinstance(embedding, _EMBEDDINGS):  # a head of its own is about as large
        applied.append((embedding, embedding.as_linear))
    return [partial(apply, mx.zeros((1, _width(module)), model.dtype)) for module, apply in applied]


def _width(module: Any) -> int:
    """The inputs of a matrix."""
    width: int = module.weight.shape[1]
    return width * 32 // module.bits if hasattr(module, "bits") else width


def _steps(model: LanguageModel, share: Share) -> float:
    """Median seconds of a decode step, which all ranks take together."""
    cache = model.make_cache()

    def run(ids: Sequence[int]) -> None:
        hidden = model.hidden(cache.admit(mx.array([ids])), cache, rows=1)
        if share.parallel == "pipeline" and share.rank:  # only rank 0 has the head
            mx.eval(hidden)
            return
        mx.eval(array_of(model.candidates(hidden)))

    run([1] * PROMPT)
    return median_seconds(lambda: run([1]), STEPS)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
