"""A decode step with little work for the host: what stands between two attentions is one compiled call.

Operation by operation, Python takes longer to build the graph of a step than a fast chip takes to run it. But for the
cache, that graph is the same from token to token: `mx.compile` traces it once, with the weights as inputs, so that what
is written into them in place is seen. Every step makes sure that weights and modules are still those that were traced,
and one with new ones runs plainly: a gradient's are new each time. Gradients through several single-token steps at once
need `model.train()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from phi4_mlx.models.rope import Regime, Rope

Call = Callable[..., Any]

ALL = ("",)  # what the names of a module's weights begin with
BEFORE, AFTER = ("input_layernorm.", "self_attn.qkv_proj."), ("self_attn.o_proj.", "post_attention_layernorm.", "mlp.")


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

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of it, for a copy of its model, has traced nothing."""
        return CompiledSteps, (self._rope,)

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
        def heads(layer: Any, x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return x, *layer.heads(x, self._rope.at(offset, regime, x.dtype))

        def first(embedding: Any, layer: Any, ids: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return heads(layer, embedding(ids), offset)

        def between(layer: Any, following: Any, x: mx.array, seen: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return heads(following, layer.rest(x, seen), offset)

        def last(layer: Any, norm: Any, x: mx.array, seen: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return (norm(layer.rest(x, seen)),)

        embedding, *layers, norm = self._parts
        self._calls[regime] = [
            _compiled(first, (embedding, ALL), (layers[0], BEFORE)),
            *(_compiled(between, (layer, AFTER), (following, BEFORE)) for layer, following in pairwise(layers)),
            _compiled(last, (layers[-1], AFTER), (norm, ALL)),
        ]
        return self._calls[regime]


def _compiled(function: Call, *modules: tuple[nn.Module, tuple[str, ...]]) -> Call:
    """`mx.compile` of a function of modules and arrays, as one of arrays.

    Args:
        function: what is compiled.
        modules: each with what the names of its weights begin with that the function uses.
    """
    twins = [_twin(module) for module, _ in modules]
    held = [
        [(name, weight) for name, weight in tree_flatten(module.parameters()) if name.startswith(used)]
        for module, used in modules
    ]
    given = [[weight for _, weight in each] for each in held]

    def traced(weights: list[list[mx.array]], *arrays: mx.array) -> Any:
        for twin, own, new in zip(twins, held, weights, strict=True):
            twin.update(tree_unflatten([(name, weight) for (name, _), weight in zip(own, new, strict=True)]))
        return function(*twins, *arrays)

    call = mx.compile(traced)
    return lambda *arrays: call(given, *arrays)


def _twin(module: nn.Module) -> nn.Module:
    """The module again, over the same arrays, for a trace to put its own in."""
    twin = copy.copy(module)
    for name, part in module.items():
        if isinstance(part, nn.Module):
            twin[name] = _twin(part)
    return twin
