"""A model whose weights stay on the disk, except those of one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import empty_model
from phi4_mlx.config.fields import Config
from phi4_mlx.models.causal_lm import Carried, CausalLM

from .batches import Batch
from .quantize import EMBEDDING_AND_HEAD
from .weights import Parameter

Rows = Iterator[tuple[int, int, mx.array]]
"""Blocks of rows of a matrix, as (first, last, rows)."""


class BlockModel:
    """A dense model in float32 that is run block by block.

    Attributes:
        model: has the weights outside of its blocks in memory, except the embedding and the head.
        blocks: path of each block, from the first.
        embedding: the parameter of the embedding.
        head: that of the head, which may be the same.
    """

    def __init__(self, config: Config, parameters: Sequence[Parameter]):
        model = empty_model(config, {}).eval()
        assert isinstance(model, CausalLM)
        self.model = model
        paths = {id(module): path for path, module in self.model.named_modules()}
        self.blocks = [paths[id(block)] for block in self.model.layers]
        by_path = {each.path: each for each in parameters if each.path in EMBEDDING_AND_HEAD}
        self.embedding, self.head = by_path[EMBEDDING_AND_HEAD[0]], by_path[paths[id(self.model.head)]]
        self._of_block = {
            path: [each for each in parameters if each.name.startswith(f"{path}.")] for path in self.blocks
        }
        inside = {each.name for some in self._of_block.values() for each in some}
        others = [each for each in parameters if each.name not in inside and not each.on_demand]
        self._load([each for each in others if each.path not in EMBEDDING_AND_HEAD])

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """A block with its weights in memory while the context lasts."""
        block = self.model.layers[number]
        unread = tree_flatten(block.parameters())
        self._load(self._of_block[self.blocks[number]])
        try:
            yield block
        finally:
            block.load_weights(unread)
            mx.clear_cache()

    def start(self, batch: Batch, embedding: Rows) -> Carried:
        """The input of the first block; `embedding` has the rows of the embedding, which may be quantised ones."""
        return self.model.into_blocks(_embedded(batch.ids, self.embedding.width, embedding))

    def finish(self, batch: Batch, carried: Sequence[mx.array]) -> mx.array:
        """Inputs of the head at the wanted tokens, [N, D], from the output of the last block."""
        found = self.model.out_of_blocks(tuple(carried))
        return found.reshape(-1, found.shape[-1])[mx.array(batch.wanted)]

    @property
    def step_bytes(self) -> list[int]:
        """Bytes in the checkpoint of the embedding, of each block, and of the head."""
        blocks = (sum(each.input_bytes for each in self._of_block[path]) for path in self.blocks)
        return [self.embedding.input_bytes, *blocks, self.head.input_bytes]

    def _load(self, parameters: Sequence[Parameter]) -> None:
        weights = [(each.name, each.finite(0, each.rows).astype(mx.float32)) for each in parameters]
        self.model.load_weights(weights, strict=False)
        mx.eval([array for _, array in weights])


def _embedded(ids: npt.NDArray[np.int64], width: int, blocks: Rows) -> mx.array:
    """The embeddings of ids [B, T], fp32 [B, T, D]."""
    flat = ids.reshape(-1)
    found = np.zeros((len(flat), width), np.float32)
    for first, last, rows in blocks:
        here = np.flatnonzero((flat >= first) & (flat < last))
        if len(here):
            found[here] = np.array(rows.astype(mx.float32)[mx.array(flat[here] - first)])
    return mx.array(found.reshape(*ids.shape, width))
