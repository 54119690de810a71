"""The ids and media of the tokens in a prompt cache, and what they were computed under."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from phi4_mlx.errors import RequestError
from phi4_mlx.models.queued import queue
from phi4_mlx.models.rope import Regime
from phi4_mlx.tokens.prompt import AbsentMedium, Mode, Place, cut, joined, keys_of, moved

MAX_PIECES = 256  # ids appended before they are joined


@dataclass(frozen=True)
class Conditions:
    """All that keys and values depend on beside the tokens.

    Attributes:
        regime: the RoPE table.
        adapter: the adapter's name; None for the base alone.
        projection: of sound, "speech" or "vision"; None without sound.
    """

    regime: Regime
    adapter: str | None = None
    projection: str | None = None

    def hold_for(self, needed: Conditions) -> bool:
        """True if tokens computed under these can go on under those."""
        same = (self.regime, self.adapter) == (needed.regime, needed.adapter)
        return same and (None in (self.projection, needed.projection) or self.projection == needed.projection)


def conditions_of(
    places: Sequence[Place], regime: Regime, own: str | None, mode_adapters: frozenset[str]
) -> Conditions:
    """The conditions of a sequence.

    Args:
        places: of its media; none for text alone.
        regime: the RoPE table of its length.
        own: the user's adapter.
        mode_adapters: the adapters that the model has for media.

    Raises:
        RequestError: there are a user's adapter and a medium.
    """
    if not places:
        return Conditions(regime, own)
    if own is not None:
        raise RequestError(
            f"adapter {own!r:.80} cannot be used with {places[0].medium.kind} input, which has an adapter of its own; "
            "leave one of them out"
        )
    mode, has_sound = mode_of(places), any(place.medium.kind == "audio" for place in places)
    adapter = mode.adapter if mode.adapter in mode_adapters else None
    return Conditions(regime, adapter, mode.projection if has_sound else None)


def mode_of(places: Iterable[Place]) -> Mode:
    """The mode of a sequence with these media."""
    return Mode.of(place.medium for place in places)


class CachedTokens:
    """Ids [B, S], appended in pieces and joined when read, and the places of media among them."""

    def __init__(self) -> None:
        self._pieces: list[mx.array] = []  # [B, t] each
        self._places: tuple[Place, ...] = ()  # also those of tokens that are still to be appended
        self.count = 0

    def append(self, ids: mx.array) -> None:
        """Appends ids [B, t]."""
        if len(self._pieces) >= MAX_PIECES:
            queue(self.ids)
        self._pieces.append(ids)
        self.count += ids.shape[1]

    def expect(self, places: Iterable[Place]) -> None:
        """Notes the media of the tokens that follow, by position among them."""
        new = moved(places, self.count)
        self._places = joined([*self.places, *new]) if new else self.places

    def truncate(self, length: int) -> None:
        """Drops what is past `length` tokens."""
        if length < self.count:
            self._pieces, self.count = [self.ids[:, :length]], length
            queue(self._pieces)  # else a chain of slices grows from trim to trim
        self._places = self.places

    def first(self, length: int) -> CachedTokens:
        """The first tokens, of one sequence."""
        first = CachedTokens()
        first.append(self.ids[:, :length])
        first._places = tuple(cut(self.places, 0, length))
        return first

    def name(self, places: Iterable[Place]) -> None:
        """Takes the media of all tokens, those here and those that follow, by position."""
        self._places = joined(places)

    @property
    def ids(self) -> mx.array:
        """All ids, [B, S]."""
        if not self._pieces:
            return mx.zeros((1, 0), mx.int32)
        if len(self._pieces) > 1:
            self._pieces = [mx.concatenate(self._pieces, axis=1)]
        return self._pieces[0]

    @property
    def places(self) -> tuple[Place, ...]:
        """The media of the tokens here."""
        if self._places and self._places[-1].end > self.count:
            return tuple(cut(self._places, 0, self.count))
        return self._places

    @property
    def all_places(self) -> tuple[Place, ...]:
        """The media of the tokens here, and of those expected."""
        return self._places

    @property
    def mode(self) -> Mode:
        """The mode of all these media."""
        return mode_of(self._places)

    @property
    def unfinished(self) -> Place | None:
        """The part of a medium that is still missing, if the tokens end within one."""
        last = self.places[-1] if self.places else None
        if last is None or last.end < self.count or last.skipped + last.count == last.medium.tokens:
            return None
        return Place(0, last.medium, last.skipped + last.count)

    def next_places(self, num_tokens: int) -> list[Place]:
        """The media of the next tokens, by position among them."""
        if not self._places or self._places[-1].end <= self.count:
            return []
        return moved(cut(self._places, self.count, self.count + num_tokens), -self.count)

    @property
    def keys(self) -> list[int]:
        """One number a token of the first row; see `phi4_mlx.tokens.prompt.keys_of`."""
        ids: list[int] = self.ids[0].tolist()
        return keys_of(ids, self.places)


def check_rerun(tokens: CachedTokens, length: int, needed: Conditions) -> None:
    """Checks that cached tokens can be run again.

    Args:
        tokens: those that the cache knows.
        length: tokens that the layers have.
        needed: the conditions to run them under.

    Raises:
        RequestError: an id is not known, or a medium is absent.
    """
    under = f"under the {needed.regime} RoPE table{f' with adapter {needed.adapter}' if needed.adapter else ''}"
    if tokens.count < length:
        raise RequestError(
            f"{length} cached tokens must be run again {under}, and the cache does not know their ids; make it with "
            "model.make_cache()"
        )
    for place in tokens.places:
        if isinstance(place.medium, AbsentMedium):
            raise RequestError(
                f"{length} cached tokens must be run again {under}, and the prompt cache file has no media, only their "
                f"keys and values; give the {place.medium.kind} of {place.medium.tokens} tokens again with the prompt"
            )
