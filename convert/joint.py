"""KL divergence of a model with all its chosen matrices, run block by block beside the unquantised one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from phi4_mlx.models.causal_lm import Carried

from .blocks import BlockModel, embedded
from .divergence import Reference

Rows = Iterator[tuple[int, int, mx.array]]
"""Blocks of rows of a matrix, as (first, last, rows)."""


def joint_divergence(
    blocks: BlockModel,
    ids: np.ndarray,
    wanted: np.ndarray,
    exact: Callable[[str], Rows],
    rounded: Mapping[str, Callable[[], Rows]],
) -> float:
    """Mean KL divergence of the quantised model from the unquantised one, in nats per token.

    Args:
        blocks: the unquantised model.
        ids: tokens, [B, T].
        wanted: positions in the flattened ids of the tokens that count.
        exact: the rows of the embedding or of the head, by its path.
        rounded: path of each quantised matrix -> its rows, dequantised.
    """
    embedding, head, model = blocks.embedding, blocks.head, blocks.model

    def started(rows: Rows) -> Carried:
        return model.into_blocks(embedded(ids, embedding.width, rows))

    def hidden(carried: Carried) -> mx.array:
        found = model.out_of_blocks(carried)
        return found.reshape(-1, found.shape[-1])[mx.array(wanted)]

    def changed(path: str) -> Rows:
        return rounded[path]() if path in rounded else exact(path)

    plain, other = started(exact(embedding.path)), started(changed(embedding.path))
    for number, path in enumerate(blocks.blocks):
        with blocks.block(number) as block:
            plain = model.through_block(number, plain)
            mx.eval(plain)
            modules = dict(block.named_modules())
            for name, module in modules.items():
                if f"{path}.{name}" in rounded:
                    module.weight = mx.concatenate([rows for _, _, rows in rounded[f"{path}.{name}"]()])
                    mx.eval(module.weight)
            other = model.through_block(number, other)
            mx.eval(other)
    reference = Reference(hidden(plain), lambda: (rows for _, _, rows in exact(head.path)))
    return reference.divergence(hidden(other), lambda: (rows for _, _, rows in changed(head.path)))
