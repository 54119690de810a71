"""A decode step with little work for the host: what stands between two attentions is one compiled call.

Operation by operation, Python takes longer to build the graph of a step than a fast chip takes to run it. But for the
cache, that graph is the same from token to token: `mx.compile` traces it once, with the weights as constants. So every
step makes sure that the weights and modules are still those that were traced, and a step with new ones runs plainly:
a gradient's are new each time. Gradients through several single-token steps at once need `model.train()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from operator import is_
from typing import Any

import mlx.core as mx

from phi4_mlx.models.rope import Regime, Rope

Call = Callable[..., Any]


class CompiledSteps:
    """A decoder's steps of one token, from the embedding to the last norm; equal to running its blocks one by one."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._parts: list[Any] = []  # what is traced: the embedding, the blocks, the norm
        self._watched: list[dict[str, Any]] = []
        self._seen: list[Any] = []
        self._calls: dict[Regime, list[Call]] = {}

    def ready(self, parts: Sequence[Any]) -> bool:
        """Whether these modules hold what they held the last time that this was asked."""
        same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts))
        if same and all(map(is_, self._contents(), self._seen)):
            return True
        self._watch(parts)
        return False

    def __call__(self, ids: mx.array, offset: int | mx.array, regime: Regime, mask: Any, caches: Any) -> mx.array:
        """Hidden states [B, 1, D] after the last norm, of the parts that are ready.

        Args:
            ids: [B, 1].
            offset: the position of the token; [B] where the rows differ.
            regime: the RoPE table.
            mask: what the attention takes.
            caches: one a block.
        """
        calls = self._calls.get(regime) or self._trace(regime)
        offset = mx.array(offset)
        x, *heads = calls[0](ids, offset)
        for layer, cache, call in zip(self._parts[1:-1], caches, calls[1:], strict=True):
            x, *heads = call(x, layer.self_attn.attend(*heads, mask, cache), offset)
        return x

    def _watch(self, parts: Sequence[Any]) -> None:
        """Notes what the parts hold now."""
        self._parts, self._calls = [*parts], {}
        modules = [module for part in parts for _, module in part.named_modules()]
        # A module is a dict of its arrays and modules; an adapter's scale is a plain attribute.
        plain = ("mlx.", "phi4_mlx.models.")
        self._watched = [*modules, *(vars(each) for each in modules if not type(each).__module__.startswith(plain))]
        self._seen = [*self._contents()]

    def _contents(self) -> Iterable[Any]:
        """All that is watched, and a mark that nothing comes after it."""
        return chain(chain.from_iterable(map(dict.values, self._watched)), (self,))

    def _trace(self, regime: Regime) -> list[Call]:
        embedding, *layers, norm = self._parts
        self._calls[regime] = [
            mx.compile(lambda ids, offset: self._heads(layers[0], embedding(ids), offset, regime)),
            *(self._between(*pair, regime) for pair in pairwise(layers)),
            mx.compile(lambda x, attended, offset: (norm(layers[-1].rest(x, attended)),)),
        ]
        return self._calls[regime]

    def _between(self, layer: Any, following: Any, regime: Regime) -> Call:
        return mx.compile(lambda x, attended, offset: self._heads(following, layer.rest(x, attended), offset, regime))

    def _heads(self, layer: Any, x: mx.array, offset: mx.array, regime: Regime) -> tuple[mx.array, ...]:
        return x, *layer.heads(x, self._rope.at(offset, regime, x.dtype))
