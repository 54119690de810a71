"""The adapters of a model by name, mixed by row in one forward pass.

The base's blocks are not touched: a `Selection` has copies of them, over the same arrays, with the adapters in use on
their linear layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import is_

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.adapters.folder import Adapter, place
from phi4_mlx.adapters.layers import adapter_layers, check_fit, linear_layers
from phi4_mlx.adapters.mixed import Product, Rows, mixed_layer
from phi4_mlx.errors import CheckpointError, RequestError

MOST_MIXTURES = 4  # sets of several adapters that stay ready


@dataclass(eq=False)
class Selection:
    """The adapters of one forward pass.

    Attributes:
        layers: the blocks, with the adapters in use on their linear layers.
        rows: the masks of the pass.
    """

    layers: list[nn.Module]
    rows: Rows
    _copied: list[nn.Module]  # modules of the base, and their contents when they were copied
    _contents: list[object]

    @property
    def is_current(self) -> bool:
        """True unless modules or arrays of the base have been replaced since."""
        return all(map(is_, _contents(self._copied), self._contents))

    def start(self) -> None:
        """Makes the layers read the masks of this pass, and no longer the inputs of a trace."""
        self.rows.masks = self.rows.given


@dataclass(eq=False)
class _Entry:
    """A named adapter: its source, then what was read from it."""

    source: Adapter | Callable[[], Adapter] | None  # None once it has been read
    trained: bool
    nbytes: int
    products: dict[str, Product] = field(default_factory=dict)  # by path


class NamedAdapters:
    """The adapters of one model, by name; each is read at its first use.

    Args:
        layers: the blocks of the model.
        dequantized: True to keep the matrices of quantised adapters dense.

    Attributes:
        on: False makes every row compute as the base does.
        replaced: True if weights of the base that they were made for are replaced by fine-tuned ones.
    """

    def __init__(self, layers: list[nn.Module], *, dequantized: bool = False) -> None:
        self._layers, self._dequantized = layers, dequantized
        self._entries: dict[str, _Entry] = {}
        self._ready: dict[tuple[str, ...], Selection] = {}  # the most recently used last
        self.on, self.replaced = True, False

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were added."""
        return [*self._entries]

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes of each, also of those not read yet."""
        return {name: entry.nbytes for name, entry in self._entries.items()}

    def add(
        self, name: str, source: Adapter | Callable[[], Adapter], *, trained: bool = False, nbytes: int = 0
    ) -> None:
        """Adds an adapter, in place of one of the same name; caches filled under that one are of no more use.

        Args:
            name: its name.
            source: the adapter, or a function that reads it, called at its first use.
            trained: refuse an adapter whose lora_b is zero everywhere, as it stays where names in a file do not match.
            nbytes: of the adapter that the function reads.
        """
        self.remove(name)
        nbytes = source.nbytes if isinstance(source, Adapter) else nbytes
        self._entries[name] = _Entry(source, trained, nbytes)

    def remove(self, name: str) -> None:
        """Removes an adapter, if there is one of that name."""
        self._entries.pop(name, None)
        self._ready = {names: found for names, found in self._ready.items() if name not in names}

    def share(self, other: NamedAdapters) -> None:
        """Adds the adapters of a model over the same weights, which are read once for both."""
        self._entries |= other._entries

    def load(self, name: str) -> None:
        """Reads an adapter now.

        Raises:
            RequestError, CheckpointError: as `select`.
        """
        self._selection((name,))

    def arrays(self, name: str) -> dict[str, mx.array]:
        """The arrays of an adapter by layer path and name, read at the first call."""
        found: dict[str, mx.array] = {}
        for path, product in self._read(name).items():
            found |= {f"{path}.{part}": array for part, array in product.arrays.items()}
            if product.excess is not None:
                found[f"{path}.excess"] = product.excess
        return found

    def select(self, rows: Sequence[str | None]) -> Selection | None:
        """Prepares a forward pass.

        Args:
            rows: the adapter of each row, None for the base alone; a single one is for all rows.

        Returns:
            The adapters in use; None where no row has one.

        Raises:
            RequestError: a name is unknown, or the whole model has an adapter already.
            CheckpointError: an adapter cannot be read or does not fit the model.
        """
        if not self.on or not any(row is not None for row in rows):
            return None
        for row in rows:
            if row is not None:
                self._entry(row)
        names = tuple(name for name in self._entries if name in rows)
        found = self._selection(names)
        found.rows.set([-1 if row is None else names.index(row) for row in rows])
        return found

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise RequestError(f"adapter {name!r:.80} is unknown; this model has {known}")
        return self._entries[name]

    def _selection(self, names: tuple[str, ...]) -> Selection:
        found = self._ready.pop(names, None)
        if found is None or not found.is_current:
            found = self._mix(names)
        self._ready[names] = found
        for key in [key for key in self._ready if len(key) > 1][:-MOST_MIXTURES]:
            del self._ready[key]
        return found

    def _mix(self, names: Sequence[str]) -> Selection:
        """The blocks under these adapters."""
        blocks = _Blocks(self._layers)
        if self.replaced or adapter_layers(blocks):
            raise RequestError(
                f"adapter {names[0]!r:.80} cannot be used together with the one that the model was loaded with; load "
                "the model without it"
            )
        read = [self._read(name) for name in names]
        rows, linears = Rows(), linear_layers(blocks)
        mixed: dict[int, dict[str, nn.Module]] = {}
        for path in sorted({path for products in read for path in products}, key=place):
            layer, key = place(path)
            parts = [(number, products[path]) for number, products in enumerate(read) if path in products]
            mixed.setdefault(layer, {})[key] = mixed_layer(linears[path], parts, rows)
        if len(names) > 1 and any(product.scheme for products in read for product in products.values()):
            # joined matrices have replaced the adapters' own, which selections of one still hold
            self._ready = {key: found for key, found in self._ready.items() if len(key) > 1}
        copied: list[nn.Module] = []
        layers = [_with(layer, mixed.get(number, {}), copied) for number, layer in enumerate(self._layers)]
        return Selection(layers, rows, copied, [*_contents(copied)])

    def _read(self, name: str) -> dict[str, Product]:
        """The products of an adapter, read at the first call."""
        entry = self._entry(name)
        if entry.source is not None:
            adapter = entry.source if isinstance(entry.source, Adapter) else entry.source()
            blocks = _Blocks(self._layers)
            if not adapter.mixes:
                raise RequestError(
                    f"{adapter.source}: adapter {name!r:.80} has whole weights, or matrices outside the blocks, which "
                    "rows cannot share; load the model with it as its only adapter"
                )
            check_fit(blocks, adapter)
            linears = linear_layers(blocks)
            dtype = self._layers[0].input_layernorm.weight.dtype
            products = {
                path: Product.of(linears[path], adapter, path, dtype, dequantized=self._dequantized)
                for path in adapter.paths
            }
            if entry.trained and all(product.is_zero for product in products.values()):
                raise CheckpointError(
                    f"{adapter.source}: lora_b is zero in all {len(products)} layers of adapter {name!r}, so it "
                    "changes nothing; its tensors were lost, get the checkpoint again"
                )
            entry.products, entry.source = products, None
        return entry.products


class _Blocks(nn.Module):
    """The blocks at the paths that they have in the model."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = layers

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.layers)


def _with(module: nn.Module, replacements: Mapping[str, nn.Module], copied: list[nn.Module]) -> nn.Module:
    """A copy of a module with other modules at some paths; the module itself if there are none."""
    if not replacements:
        return module
    twin = copy.copy(module)
    copied.append(module)
    inner: dict[str, dict[str, nn.Module]] = {}
    for path, replacement in replacements.items():
        head, _, rest = path.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = replacement
        else:
            twin[head] = replacement
    for head, deeper in inner.items():
        twin[head] = _with(module[head], deeper, copied)
    return twin


def _contents(modules: Sequence[nn.Module]) -> chain[object]:
    return chain.from_iterable(map(dict.values, modules))
