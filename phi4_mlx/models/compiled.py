"""Compiled decode steps: everything between two attentions is one `mx.compile`d call.

Python takes longer to build the graph of a step than a fast chip takes to run it. Apart from the cache, that graph is
the same for every token and every block, so it is traced once. Weights are inputs of a trace, so that in-place changes
are seen, and so are adapters by name and the masks of their rows; the one adapter of a whole model is a constant, with
the layers under it. Every step first checks that weights and modules are still the traced ones; a step with new ones,
such as those of a gradient, runs uncompiled. Gradients through several single-token steps at once need `model.train()`.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from phi4_mlx.adapters.named import Selection
from phi4_mlx.models.safe import safe

Call = Callable[..., Any]

_MLX_LAYERS = {kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}

ALL = ("",)  # the prefix of every weight name


def compiled(function: Call, **options: Any) -> Call:
    """`mx.compile` of a function, unless compiled functions are off when it is called."""
    fast: Call = mx.compile(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if safe("compiled") else fast(*arguments)

    return call


class CompiledSteps:
    """The compiled functions of a model's single-token steps, traced again when its weights or modules are replaced."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._watched: list[dict[str, Any]] = []
        self._seen: list[Any] = []
        self._calls: dict[Hashable, list[Call]] = {}
        self._under: weakref.WeakKeyDictionary[Selection, CompiledSteps] = weakref.WeakKeyDictionary()

    def of(self, adapted: Selection | None) -> CompiledSteps:
        """The steps under adapters, kept as long as they are; these ones for None."""
        if adapted is None:
            return self
        return self._under.setdefault(adapted, CompiledSteps())

    def ready(self, parts: Sequence[Any]) -> bool:
        """True if these modules have the same contents as at the last call; else notes the new ones.

        False too if compiled functions are off.
        """
        if safe("compiled"):
            return False
        same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts))
        if same and all(map(is_, self._contents(), self._seen)):
            return True
        self._watch(parts)
        return False

    def calls(self, key: Hashable, trace: Callable[[], list[Call]]) -> list[Call]:
        """The result of `trace` for this key, kept until the contents change."""
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = trace()
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of the model start without traces."""
        return CompiledSteps, ()

    def _watch(self, parts: Sequence[Any]) -> None:
        """Notes the contents of the parts."""
        self._parts, self._calls = [*parts], {}
        modules = [module for part in parts for _, module in part.named_modules()]
        # A module is a dict of its arrays and modules; an epsilon or an adapter's scale is a plain attribute.
        all_have = {"_no_grad", "_training"}
        self._watched = [*modules, *(plain for each in modules if (plain := vars(each)).keys() - all_have)]
        self._seen = [*self._contents()]

    def _contents(self) -> Iterable[Any]:
        """All watched contents, then an end marker."""
        return chain(chain.from_iterable(map(dict.values, self._watched)), (self,))


class Traced:
    """`mx.compile` of a function of modules and arrays; modules that differ only in weights share a trace.

    Args:
        function: (*modules, *arrays) -> arrays.
        used: for each module, the prefixes of the weights that `function` uses.
        adapted: the adapters on the modules; the masks of their rows are inputs of the trace.
    """

    def __init__(self, function: Call, *used: tuple[str, ...], adapted: Selection | None = None) -> None:
        self._function, self._used = function, used
        self._rows = None if adapted is None else adapted.rows
        self._traces: list[tuple[list[nn.Module], Call]] = []  # each with its own modules

    def on(self, *modules: nn.Module) -> Call:
        """The compiled function with its modules bound: (*arrays) -> arrays."""
        held = [
            {name: weight for name, weight in sorted(_weights(module)) if name.startswith(used)}
            for module, used in zip(modules, self._used, strict=True)
        ]
        call = next((call for twins, call in self._traces if all(map(_interchangeable, twins, modules))), None)
        call = call or self._compile(modules, [[*each] for each in held])
        weights = [[*each.values()] for each in held]
        rows = self._rows
        return lambda *arrays: call(weights, [] if rows is None else rows.given, *arrays)

    def _compile(self, modules: Sequence[nn.Module], names: list[list[str]]) -> Call:
        twins = [_twin(module) for module in modules]

        def traced(weights: list[list[mx.array]], masks: list[mx.array], *arrays: mx.array) -> Any:
            if self._rows is not None:
                self._rows.masks = masks
            for twin, own, given in zip(twins, names, weights, strict=True):
                twin.update(tree_unflatten([*zip(own, given, strict=True)]))
            return self._function(*twins, *arrays)

        compiled: Call = mx.compile(_lasting(traced))

        def call(weights: list[list[mx.array]], masks: list[mx.array], *arrays: mx.array) -> Any:
            assert traced is not None  # lives as long as this call
            return compiled(weights, masks, *arrays)

        self._traces.append((twins, call))
        return call


_shells: list[Call] = []


def _lasting(function: Call) -> Call:
    """A function for `mx.compile` that is never freed, and does not keep `function` alive.

    MLX finds a trace by the address of its function. When a function is freed, only the thread that frees it forgets
    the trace: another thread would use it for the next function at that address.
    """
    found = weakref.ref(function)

    def shell(*arguments: Any) -> Any:
        inner = found()
        assert inner is not None
        return inner(*arguments)

    _shells.append(shell)
    return shell


def _is_open(part: Any) -> bool:
    """True for modules whose weights are inputs of a trace: those of `mlx.nn`, and ours that are `traceable`.

    Any other module is a constant: it may keep arrays that it has derived from weights, as adapters do.
    """
    return type(part) in _MLX_LAYERS or (isinstance(part, nn.Module) and getattr(part, "traceable", False))


def _weights(module: nn.Module, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """The arrays of a module by name, except those of modules that are constants of a trace."""
    for name, part in module.items() if _is_open(module) else ():
        if isinstance(part, mx.array):
            yield path + name, part
        elif _is_open(part):
            yield from _weights(part, f"{path}{name}.")


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the module over the same arrays, for a trace to put its inputs in."""
    if not _is_open(module):
        return module
    twin = copy.copy(module)
    for name, part in module.items():
        if isinstance(part, nn.Module):
            twin[name] = _twin(part)
    return twin


def _interchangeable(one: Any, other: Any) -> bool:
    """True if two modules, or parts of them, differ only in the weights that are inputs of a trace."""
    if type(one) is not type(other):
        return False
    if _is_open(one):
        parts, others = {**vars(one), **one}, {**vars(other), **other}
        return parts.keys() == others.keys() and all(
            _interchangeable(part, others[name]) for name, part in parts.items()
        )
    if isinstance(one, (bool, int, float, str, set)):
        return bool(one == other)
    return isinstance(one, mx.array) or one is other
