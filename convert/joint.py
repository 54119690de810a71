"""KL divergence of a model with all its chosen matrices, run block by block beside the unquantised one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from .batches import Batch
from .blocks import BlockModel, Rows
from .divergence import Reference


def joint_divergence(
    blocks: BlockModel,
    batch: Batch,
    exact: Callable[[str], Rows],
    rounded: Mapping[str, Callable[[], Rows]],
) -> float:
    """Mean KL divergence of the quantised model from the unquantised one, in nats per token.

    Args:
        blocks: the unquantised model.
        batch: the tokens.
        exact: the rows of the embedding or of the head, by its path.
        rounded: path of each quantised matrix -> its rows, dequantised.
    """
    embedding, head, model = blocks.embedding, blocks.head, blocks.model

    def changed(path: str) -> Rows:
        return rounded[path]() if path in rounded else exact(path)

    plain, other = (blocks.start(batch, rows(embedding.path)) for rows in (exact, changed))
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
    reference = Reference(blocks.finish(batch, plain), lambda: (rows for _, _, rows in exact(head.path)))
    hidden = blocks.finish(batch, other)
    return reference.divergence(hidden, lambda: (rows for _, _, rows in changed(head.path)))
