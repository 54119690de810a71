"""Second moments of the inputs of linear layers, gathered while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class Moments:
    """Sums over tokens.

    Attributes:
        inputs: sum of x x^T over the inputs x, fp32 [in, in].
        tokens: how many tokens there were.
    """

    def __init__(self, width: int):
        self.inputs = mx.zeros((width, width), mx.float32)
        self.tokens = 0

    def add(self, inputs: mx.array) -> None:
        """Adds tokens: their inputs [N, in]."""
        inputs = inputs.astype(mx.float32)
        self.inputs = self.inputs + inputs.T @ inputs
        self.tokens += len(inputs)
        mx.eval(self.inputs)

    def take(self) -> mx.array:
        """Mean of x x^T, fp32 [in, in]; the sum is dropped, so that large matrices are in memory once."""
        inputs, self.inputs = self.inputs, mx.zeros((1, 1))
        return inputs / max(1, self.tokens)


class _Recorder(nn.Module):
    """A layer that adds the wanted tokens to its moments."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.moments = layer, Moments(width)
        self.wanted: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        self.moments.add(rows if self.wanted is None else rows[self.wanted])
        y: mx.array = self.layer(x)
        return y


class Recording:
    """The moments of some layers; `wanted` says which tokens of the next batch count."""

    def __init__(self, recorders: Mapping[str, _Recorder]):
        self._recorders = recorders

    def want(self, tokens: mx.array) -> None:
        """Takes the next inputs from these positions of the flattened batch, int [N]."""
        for recorder in self._recorders.values():
            recorder.wanted = tokens

    @property
    def moments(self) -> dict[str, Moments]:
        """By the path of the layer."""
        return {path: recorder.moments for path, recorder in self._recorders.items()}


@contextmanager
def recording(block: nn.Module, layers: Mapping[str, nn.Linear]) -> Iterator[Recording]:
    """Gathers the moments of a block's linear layers while the context lasts.

    Args:
        block: the module that contains them.
        layers: path in the block -> layer.
    """
    recorders = {path: _Recorder(layer, layer.weight.shape[1]) for path, layer in layers.items()}
    block.update_modules(tree_unflatten(list(recorders.items())))
    try:
        yield Recording(recorders)
    finally:
        block.update_modules(tree_unflatten(list(layers.items())))
