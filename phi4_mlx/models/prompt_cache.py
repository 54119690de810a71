"""The prompt cache of one sequence: the caches of all layers, the ids and media in them, their RoPE table and adapter.

`model.make_cache()` returns one, and the caller passes it to `model(ids, cache)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx

from phi4_mlx.models.cache import CacheOptions, LayerCache
from phi4_mlx.models.cached_tokens import CachedTokens, Conditions, check_rerun, conditions_of
from phi4_mlx.models.layer_caches import LayerCaches
from phi4_mlx.models.rope import Regime, regime_of
from phi4_mlx.models.snapshot import Snapshots
from phi4_mlx.tokens.prefix import shared_length
from phi4_mlx.tokens.prompt import Mode, Place, Prompt, absent, cut, keys_of, places_of


class PromptCache(LayerCaches):
    """The caches of all layers, with the ids and media of the tokens in them, and what they were computed under.

    The ids make a crossing of the RoPE boundary exact: `admit` then empties the cache and returns the whole sequence,
    to be run again under the other table. A change of the adapter, as the first picture of a conversation makes, is
    such a crossing too.

    Args:
        layers: one `LayerCache` a layer, all at the same offset.
        boundary: the longest sequence under the short RoPE table; None for a single regime.
        options: the options that the layers were made with.

    Attributes:
        options: as given.
        mode_adapters: the adapters that the model has for media.
        rerun_tokens: tokens that crossings made the model run again, so far.
    """

    def __init__(self, layers: Iterable[LayerCache], boundary: int | None, options: CacheOptions | None = None):
        super().__init__(layers)
        self.options = options or CacheOptions()
        self._boundary = boundary
        self._cached = CachedTokens()
        self._conditions = Conditions(self._regime_with(0))
        self._own_adapter: str | None = None
        self.mode_adapters: frozenset[str] = frozenset()
        self.rerun_tokens = 0

    @property
    def conditions(self) -> Conditions:
        """The conditions that everything cached was computed under."""
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        self._conditions = conditions

    @property
    def regime(self) -> Regime:
        """The RoPE table of everything cached."""
        return self._conditions.regime

    @property
    def adapter(self) -> str | None:
        """The adapter of everything cached: a user's, or that of its media; None for the base alone.

        Assign a user's before the first token.
        """
        return self._conditions.adapter

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        self._own_adapter = name
        if not self.offset:
            self._conditions = replace(self._conditions, adapter=name)

    @property
    def adapters(self) -> list[str | None]:
        """`adapter`, for all rows."""
        return [self._conditions.adapter]

    @property
    def tokens(self) -> CachedTokens:
        """The ids and media cached, no more than the layers have, and the media admitted after them."""
        self._follow_layers()
        return self._cached

    @property
    def ids(self) -> mx.array:
        """The ids of the cached tokens, [B, S]."""
        return self.tokens.ids

    @property
    def places(self) -> tuple[Place, ...]:
        """The media among the cached tokens."""
        return self.tokens.places

    @property
    def keys(self) -> list[int]:
        """One number a cached token that tells it from all others; see `phi4_mlx.tokens.prompt.keys_of`. B is 1."""
        return self.tokens.keys

    @property
    def mode(self) -> Mode:
        """The mode of the media admitted."""
        return self.tokens.mode

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
            RequestError: there are a user's adapter and a medium; or, at a crossing, the cache does not know its ids,
                because this model did not fill it, or lacks its media, because it comes from a file.
        """
        tokens = self.tokens
        tokens.expect(places)
        needed = self._needed(self._regime_with(ids.shape[1]), tokens.all_places)
        if self.offset > 0 and not self._conditions.hold_for(needed):
            check_rerun(tokens, self.offset, needed)
            ids, places = mx.concatenate([tokens.ids, ids], axis=1), tokens.all_places
            self.rerun_tokens += self.trim(self.offset)
            tokens.expect(places)
        self._conditions = needed
        return ids

    def expect(self, prompt: Sequence[int]) -> None:
        """Takes the media of a whole prompt, of which the first tokens are cached; `hidden` needs those that follow."""
        self.tokens.name(places_of(prompt))
        self._conditions = self._needed(self.regime, places_of(prompt))

    def record(self, ids: mx.array) -> None:
        """Appends the ids [B, T] that the model is about to run."""
        self.tokens.append(ids)

    def reuse(self, ids: Sequence[int]) -> list[int]:
        """Keeps what can be kept of the cached tokens that a new prompt shares, and drops the rest.

        Args:
            ids: the whole new prompt; B must be 1.

        Returns:
            The ids still to prefill, of a `Prompt` with media: at least the last one, for logits to continue from.
        """
        rest = ids[self.keep_shared(ids[:-1]) :]
        return rest if isinstance(rest, Prompt) else list(rest)

    def keep_shared(self, ids: Sequence[int]) -> int:
        """Keeps the longest reusable prefix that the cached tokens share with `ids`; returns its length."""
        kept = self.shared_with(ids)
        self.truncate(kept)
        self._cached.name(cut(places_of(ids), 0, kept))  # in place of absent ones
        return kept

    def shared_with(self, ids: Sequence[int]) -> int:
        """The length of the longest reusable prefix that the cached tokens share with `ids`."""
        places = places_of(ids)
        serves = self.serves(places, self.regime)
        return self.reusable(shared_length(self.keys, keys_of(ids, places)) if serves else 0)

    def forget_media(self) -> None:
        """Keeps the identity of media alone, in place of their pixels and features."""
        self._cached.name([replace(place, medium=absent(place.medium)) for place in self.places])

    def serves(self, places: Sequence[Place], regime: Regime) -> bool:
        """True if a sequence with these media and this RoPE table can go on from tokens cached here."""
        return self._conditions.hold_for(self._needed(regime, places))

    def fork(self, length: int) -> PromptCache:
        """Another cache of the first `length` tokens, which must be `reusable`, over the same arrays; B must be 1."""
        start = length if self.is_trimmable() else self.offset
        twin = self.branch(start)
        twin._cached, twin.snapshots = self.tokens.first(start), Snapshots(self.snapshots)
        twin._conditions, twin._own_adapter = self._conditions, self._own_adapter
        twin.mode_adapters = self.mode_adapters
        twin.truncate(length)
        return twin

    def branch(self, length: int) -> PromptCache:
        """An empty record over the layers' arrays of the first `length` tokens, which `fork` completes."""
        return PromptCache([layer.fork(length) for layer in self], self._boundary, self.options)

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
        self._cached, self.snapshots, self._own_adapter = CachedTokens(), Snapshots(), adapter
        self._cached.append(mx.array([list(ids)], mx.int32))
        self._cached.name(places_of(ids))
        self._conditions = self._needed(regime, places_of(ids))

    def _regime_with(self, num_tokens: int) -> Regime:
        return self.options.regime or regime_of(self.offset + num_tokens, self._boundary)

    def _needed(self, regime: Regime, places: Sequence[Place]) -> Conditions:
        return conditions_of(places, regime, self._own_adapter, self.mode_adapters)

    def _follow_layers(self) -> None:
        if self._cached.count > self.offset:
            self._cached.truncate(self.offset)
            super()._follow_layers()


def prefix_of(cache: PromptCache, ids: Sequence[int], length: int) -> PromptCache:
    """A fork of a cache, for a whole prompt that begins with its first `length` tokens, and with the prompt's media.

    Where snapshots are needed, the first is taken there, so that a longer cache of the conversation can replace it.
    """
    fork = cache.fork(length)
    fork.expect(ids)
    fork.mark()
    return fork
