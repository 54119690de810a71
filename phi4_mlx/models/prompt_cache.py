"""The prompt cache of one sequence: the caches of all layers, the ids and media in them, their RoPE table and adapter.

`model.make_cache()` returns one, and the caller passes it to `model(ids, cache)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.models.cache import CacheOptions, LayerCache, Mask
from phi4_mlx.models.rope import Regime, regime_of
from phi4_mlx.models.snapshot import Snapshot, Snapshots
from phi4_mlx.tokens.prompt import Mode, Place, Prompt, cut, joined, keys_of, moved, places_of

MAX_PIECES = 256  # ids appended before they are joined


class _TokenIds:
    """The ids of the cached tokens, [B, S], appended in pieces and joined when read."""

    def __init__(self) -> None:
        self._pieces: list[mx.array] = []  # [B, t] each
        self.count = 0

    def append(self, ids: mx.array) -> None:
        if len(self._pieces) >= MAX_PIECES:
            mx.async_eval(self.joined())
        self._pieces.append(ids)
        self.count += ids.shape[1]

    def joined(self) -> mx.array:
        if not self._pieces:
            return mx.zeros((1, 0), mx.int32)
        if len(self._pieces) > 1:
            self._pieces = [mx.concatenate(self._pieces, axis=1)]
        return self._pieces[0]

    def truncate(self, length: int) -> None:
        if length < self.count:
            self._pieces, self.count = [self.joined()[:, :length]], length
            mx.async_eval(self._pieces)  # else a chain of slices grows from trim to trim


class PromptCache(list[LayerCache]):  # a list, as mlx-lm's tools expect
    """The caches of all layers, with the ids and media of the tokens in them, and what they were computed under.

    The ids make a crossing of the RoPE boundary exact: `admit` then empties the cache and returns the whole sequence,
    to be run again under the other table. A change of the adapter, as the first picture of a conversation makes, is
    such a crossing too.

    Args:
        layers: one `LayerCache` a layer, all at the same offset.
        boundary: the longest sequence under the short RoPE table; None for a single regime.
        options: the options that the layers were made with.
        mode_adapters: the adapters of modes that the model has.

    Attributes:
        regime: the RoPE table of everything cached.
        options: as given.
        snapshots: those that `truncate` can return to; forks share them.
        rerun_tokens: tokens that crossings made the model run again, so far.
    """

    def __init__(
        self,
        layers: Iterable[LayerCache],
        boundary: int | None,
        options: CacheOptions | None = None,
        mode_adapters: Iterable[str] = (),
    ):
        super().__init__(layers)
        self.options = options or CacheOptions()
        self._boundary = boundary
        self._ids = _TokenIds()
        self._places: tuple[Place, ...] = ()  # of media, also of those admitted and not yet run
        self.snapshots = Snapshots()
        self.regime: Regime = self._regime_with(0)
        self.rerun_tokens = 0
        self._mode_adapters = frozenset(mode_adapters)
        self._own_adapter: str | None = None
        self._adapter: str | None = None
        self._projection: str | None = None  # of the sound cached

    @property
    def adapter(self) -> str | None:
        """The adapter of everything cached: that of its mode, or the user's; None for the base alone.

        Assign a user's before the first token.
        """
        return self._adapter

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        self._own_adapter = name
        if not self.offset:
            self._adapter = name

    @property
    def adapters(self) -> list[str | None]:
        """`adapter`, for all rows."""
        return [self._adapter]

    @property
    def places(self) -> tuple[Place, ...]:
        """The media cached, by position."""
        if self._places and self._places[-1].end > self.offset:
            return tuple(cut(self._places, 0, self.offset))
        return self._places

    @property
    def mode(self) -> Mode:
        """The mode of the media cached."""
        return Mode.of(place.medium for place in self.places)

    @property
    def keys(self) -> list[int]:
        """One number a cached token that tells it from all others; B must be 1. See `phi4_mlx.tokens.prompt.keys_of`."""
        ids: list[int] = self.ids[0].tolist()
        return keys_of(ids, self.places)

    @property
    def offset(self) -> int:
        """Tokens cached."""
        return self[0].offset

    positions = offset  # of the next token; in a batch, one a row

    @property
    def ids(self) -> mx.array:
        """The ids of the cached tokens, [B, S]."""
        self._follow_layers()
        return self._ids.joined()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not, and of snapshots."""
        return sum(layer.nbytes for layer in self) + sum(each.nbytes for each in self.snapshots)

    @property
    def rewindable(self) -> bool:
        """True if the tokens of a short pass can be taken back after it; speculation needs that."""
        return all(layer.rewindable for layer in self)

    @property
    def needs_snapshots(self) -> bool:
        """True if tokens are taken back by returning to a snapshot."""
        return not self.is_trimmable() and all(layer.snapshot() is not None for layer in self)

    def crosses(self, num_tokens: int) -> bool:
        """True if `num_tokens` more tokens would need the other RoPE table."""
        return self._regime_with(num_tokens) != self.regime

    def admit(self, ids: mx.array, places: Iterable[Place] = ()) -> mx.array:
        """Chooses RoPE table and adapter of a sequence that goes on with `ids`, before they are run, in chunks or not.

        Args:
            ids: all the new tokens, [B, T].
            places: the media among them, by position in `ids`.

        Returns:
            The ids to run: the new ones [B, T], or the whole sequence [B, S + T] after a crossing.

        Raises:
            RequestError: there is a user's adapter and a medium; or, at a crossing, the cache does not know its ids,
                because this model did not fill it.
        """
        self._follow_layers()
        known = joined([*self.places, *moved(places, self.offset)]) if self._places or places else ()
        regime = self._regime_with(ids.shape[1])
        adapter, projection = self._adapter_for(known)
        crosses = regime != self.regime or adapter != self._adapter or self._projection not in (None, projection)
        if self.offset > 0 and crosses:
            if self._ids.count < self.offset:
                reason = f"under the {regime} RoPE table" if regime != self.regime else f"with the adapter {adapter}"
                raise RequestError(
                    f"{self.offset} cached tokens must be run again {reason}, and the cache does not know their ids; "
                    "make it with model.make_cache()"
                )
            ids = mx.concatenate([self.ids, ids], axis=1)
            self.rerun_tokens += self.trim(self.offset)
        self.regime, self._adapter, self._projection, self._places = regime, adapter, projection, known
        return ids

    def _adapter_for(self, places: Sequence[Place]) -> tuple[str | None, str | None]:
        """The adapter of a sequence with these media, and the projection of its sound."""
        if not places:
            return self._own_adapter, None
        if self._own_adapter is not None:
            raise RequestError(
                f"adapter {self._own_adapter!r:.80} cannot be used for a prompt with {places[0].medium.kind} input, "
                "which has an adapter of its own; leave one of them out"
            )
        mode = Mode.of(place.medium for place in places)
        has_audio = any(place.medium.kind == "audio" for place in places)
        return (mode.adapter if mode.adapter in self._mode_adapters else None), (mode.projection if has_audio else None)

    def places_of_next(self, num_tokens: int) -> list[Place]:
        """The admitted media among the next tokens, by position from the next token on."""
        if not self._places or self._places[-1].end <= self.offset:
            return []
        return moved(cut(self._places, self.offset, self.offset + num_tokens), -self.offset)

    def record(self, ids: mx.array) -> None:
        """Appends the ids [B, T] that the model is about to run."""
        self._follow_layers()
        self._ids.append(ids)

    def make_mask(self, N: int) -> Mask:
        """The attention mask of the next N tokens where all layers have the same one; else each layer makes its own."""
        return self[0].make_mask(N)

    def is_trimmable(self) -> bool:
        """True if some tokens can be taken back while others stay."""
        return all(layer.is_trimmable() for layer in self)

    def trim(self, n: int) -> int:
        """Takes back the last n tokens; returns how many it took: n, all of them, or 0 where that is not possible."""
        n = max(0, min(self.offset, n))
        if n < self.offset and not all(layer.can_trim(n) for layer in self):
            return 0
        taken = [layer.trim(n) for layer in self]
        self._follow_layers()
        return taken[0]

    def mark(self) -> None:
        """Takes a snapshot to return to, where `needs_snapshots`."""
        if self.offset and self.needs_snapshots:
            self.snapshots.add([Snapshot(self.offset, [layer.snapshot() for layer in self])])

    def reusable(self, length: int) -> int:
        """The number of the first `length` tokens that can be kept without the rest.

        All of them where tokens can be taken back; else those up to the latest snapshot.
        """
        if length >= self.offset or self.is_trimmable():
            return min(length, self.offset)
        return self.snapshots.latest(length)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens, which must be `reusable`."""
        if length == self.offset:
            return
        if length == 0 or self.is_trimmable():
            self.trim(self.offset - length)
        else:
            for layer, snapshot in zip(self, self.snapshots.at(length).layers, strict=True):
                layer.restore(snapshot)
        self._follow_layers()

    def reuse(self, ids: Sequence[int]) -> list[int]:
        """Keeps what can be kept of the cached tokens that a new prompt shares, and drops the rest.

        Args:
            ids: the whole new prompt; B must be 1.

        Returns:
            The ids still to prefill: at least the last one, so that there are logits to continue from. A `Prompt` of a
            `Prompt`.
        """
        rest = ids[self.keep_shared(ids[:-1]) :]
        return rest if isinstance(rest, Prompt) else list(rest)

    def keep_shared(self, ids: Sequence[int]) -> int:
        """Keeps the longest reusable prefix that the cached tokens share with `ids`; returns its length."""
        places, shared = places_of(ids), 0
        if self._is_valid_for(places):
            for old, new in zip(self.keys, keys_of(ids, places), strict=False):
                if old != new:
                    break
                shared += 1
        kept = self.reusable(shared)
        self.truncate(kept)
        self._places = tuple(cut(places, 0, kept))  # the same media, of which a file knows the digests only
        return kept

    def _is_valid_for(self, places: Sequence[Place]) -> bool:
        """True if what is cached was computed as a prompt with these media needs it."""
        adapter, projection = self._adapter_for(places)
        return adapter == self._adapter and self._projection in (None, projection)

    def fork(self, length: int) -> PromptCache:
        """Another cache of the first `length` tokens, which must be `reusable`, over the same arrays; B must be 1."""
        start = length if self.is_trimmable() else self.offset
        twin = PromptCache([layer.fork(start) for layer in self], self._boundary, self.options, self._mode_adapters)
        twin._ids.append(self.ids[:, :start])
        twin._places, twin._own_adapter = tuple(cut(self._places, 0, start)), self._own_adapter
        twin._adapter, twin._projection = self._adapter, self._projection
        twin.snapshots, twin.regime = Snapshots(self.snapshots), self.regime
        twin.truncate(length)
        return twin

    def compact(self) -> None:
        """Copies the filled part out of larger buffers, which are then free."""
        for layer in self:
            layer.compact()
        mx.eval([layer.state for layer in self])

    def restore(
        self, ids: Sequence[int], states: Iterable[Sequence[mx.array]], regime: Regime, adapter: str | None = None
    ) -> None:
        """Replaces everything cached by states that were computed elsewhere.

        Args:
            ids: their token ids, [S]; a `Prompt` if there are media.
            states: the `state` of each layer.
            regime: the RoPE table they were computed under.
            adapter: the user's adapter they were computed under.
        """
        for layer, state in zip(self, states, strict=True):
            layer.state = state
        self._ids, self.snapshots, self.regime = _TokenIds(), Snapshots(), regime
        self._own_adapter, self._places = adapter, places_of(ids)
        self._adapter, self._projection = self._adapter_for(self._places)
        self.record(mx.array([list(ids)], mx.int32))

    def _regime_with(self, num_tokens: int) -> Regime:
        return self.options.regime or regime_of(self.offset + num_tokens, self._boundary)

    def _follow_layers(self) -> None:
        """Drops ids, media and snapshots past the layers' length; mlx-lm's tools trim layers one by one."""
        if self._ids.count > self.offset:
            self._ids.truncate(self.offset)
            self._places = self.places
            self.snapshots.drop_after(self.offset)
