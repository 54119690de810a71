"""A prompt: token ids, with the pictures and clips whose slots are among them.

A slot is a position whose embedding is a row of a medium. All slots of one kind have the same id, so ids alone do not
tell two pictures apart: `Prompt.keys` does.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, overload

if TYPE_CHECKING:
    from phi4_mlx.tokens.media.audio import Audio
    from phi4_mlx.tokens.media.image import Image

Kind = Literal["image", "audio"]

READS_ONLY_TEXT = "reads only text; Phi-4-multimodal-instruct and the embedded demo-multimodal read pictures and sound"


class Mode(str, Enum):
    """The kinds of media in a request, which decide its adapter for all of its tokens.

    Source: `InputMode` in the model's remote code, which has the numbers 0 to 3 in this order.
    """

    LANGUAGE = "language"
    VISION = "vision"
    SPEECH = "speech"
    VISION_SPEECH = "vision_speech"

    @classmethod
    def _missing_(cls, value: object) -> Mode | None:
        return [*cls][value] if isinstance(value, int) and 0 <= value < len(cls) else None

    @classmethod
    def of(cls, media: Iterable[Medium]) -> Mode:
        """The mode of a request with these media."""
        kinds = {medium.kind for medium in media}
        return cls(("image" in kinds) + 2 * ("audio" in kinds))

    @property
    def adapter(self) -> Literal["vision", "speech"] | None:
        """The adapter of the request; never two."""
        if self is Mode.LANGUAGE:
            return None
        return "speech" if self is Mode.SPEECH else "vision"

    @property
    def projection(self) -> Literal["vision", "speech"]:
        """The projection of sound, which was trained with the adapter of that name."""
        return self.adapter or "speech"


@dataclass(frozen=True)
class AbsentMedium:
    """A medium of which only the identity is known, such as one in a prompt cache file.

    Attributes:
        kind: "image" or "audio".
        tokens: its slots.
        digest: hexadecimal SHA-256 of its content.
    """

    kind: Kind
    tokens: int
    digest: str


def absent(medium: Medium) -> AbsentMedium:
    """The identity of a medium."""
    return AbsentMedium(medium.kind, medium.tokens, medium.digest)


Medium: TypeAlias = "Image | Audio | AbsentMedium"


@dataclass(frozen=True)
class MediaSettings:
    """The media that a model reads, from its config.

    Attributes:
        crop_size: width and height of a crop in pixels.
        max_crops: the most crops of a picture.
        image_token: the id of a picture's slots.
        audio_token: the id of a clip's slots.
    """

    crop_size: int
    max_crops: int
    image_token: int
    audio_token: int

    def token(self, kind: Kind) -> int:
        """The id of the slots of a kind."""
        return self.image_token if kind == "image" else self.audio_token


@dataclass(frozen=True)
class Place:
    """A run of slots of one medium.

    Attributes:
        start: the position of the first of them.
        medium: whose slots they are.
        skipped: slots of the medium that came before the first one here, where it was cut.
        count: slots in the run; 0 stands for all that are left of the medium.
    """

    start: int
    medium: Medium
    skipped: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.count or self.medium.tokens - self.skipped)

    @property
    def end(self) -> int:
        """The position after the last slot."""
        return self.start + self.count

    @property
    def keys(self) -> tuple[int, ...]:
        """One negative number a slot, which no other slot of any medium has, and no id."""
        whole = _slot_keys(self.medium.digest, self.skipped + self.count)
        return whole[self.skipped :]


def _slot_keys(digest: str, count: int) -> tuple[int, ...]:
    """63 bits for each of the first slots of a medium, of a hash that goes on; -1 and less."""
    stream = hashlib.shake_256(bytes.fromhex(digest)).digest(8 * count)
    return tuple(~(number >> 1) for number in struct.unpack(f"<{count}Q", stream))


def moved(places: Iterable[Place], by: int) -> list[Place]:
    """The same runs at other positions."""
    return [replace(place, start=place.start + by) for place in places]


def cut(places: Iterable[Place], start: int, end: int) -> list[Place]:
    """The parts of runs within positions start to end."""
    parts = []
    for place in places:
        first, last = max(place.start, start), min(place.end, end)
        if first < last:
            parts.append(Place(first, place.medium, place.skipped + first - place.start, last - first))
    return parts


def joined(places: Iterable[Place]) -> tuple[Place, ...]:
    """The same runs, in which the parts of a medium that follow one another are one."""
    runs: list[Place] = []
    for place in places:
        last = runs[-1] if runs else None
        goes_on = last is not None and last.end == place.start and last.skipped + last.count == place.skipped
        if last is not None and goes_on and last.medium.digest == place.medium.digest:
            runs[-1] = replace(last, count=last.count + place.count)
        else:
            runs.append(place)
    return tuple(runs)


def keys_of(ids: Sequence[int], places: Iterable[Place]) -> list[int]:
    """One number a position that tells it from all others: the id of a text token, or the key of a slot.

    Args:
        ids: [T].
        places: the runs of slots in them.
    """
    keys = list(ids)
    for place in places:
        keys[place.start : place.end] = place.keys
    return keys


_END_ONLY = "a prompt with media changes at its end only; take slices and add them"


def _without_media(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of lists that raises ValueError where a prompt has media."""

    @wraps(method)
    def checked(self: Prompt, *arguments: Any, **options: Any) -> Any:
        if self.places:
            raise ValueError(_END_ONLY)
        return method(self, *arguments, **options)

    return checked


class Prompt(list[int]):
    """Token ids that know their media; a list like any other, to which ids may be appended.

    Slices, `prompt + ids`, and ids appended or removed at the end keep the places of media right; `ids + prompt` is a
    plain list, which has lost them. Other changes of a prompt with media raise ValueError. Two prompts are equal if
    their ids and media are.

    Args:
        ids: [T].
        places: runs of slots in them, in order.
    """

    _places: tuple[Place, ...] = ()

    def __init__(self, ids: Iterable[int] = (), places: Iterable[Place] = ()):
        super().__init__(ids)
        self._places = joined(places)

    @property
    def places(self) -> tuple[Place, ...]:
        """The runs of slots."""
        return self._places

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media, in order."""
        return tuple(place.medium for place in self._places)

    @property
    def mode(self) -> Mode:
        """The mode of these media."""
        return Mode.of(self.media)

    @property
    def keys(self) -> list[int]:
        """One number a position [T]; see `keys_of`."""
        return keys_of(self, self._places)

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Prompt: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | Prompt:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        start, end, step = index.indices(len(self))
        places = moved(cut(self._places, start, end), -start) if step == 1 else ()
        return Prompt(super().__getitem__(index), places)

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        if self._places:
            start, end, step = (index if isinstance(index, slice) else slice(index, None)).indices(len(self))
            if step != 1 or end < len(self) or (not isinstance(index, slice) and start != len(self) - 1):
                raise ValueError(_END_ONLY)
        super().__delitem__(index)
        self._places = tuple(cut(self._places, 0, len(self)))

    # Media would not follow these changes.
    __setitem__ = _without_media(list.__setitem__)
    __imul__ = _without_media(list.__imul__)
    insert = _without_media(list.insert)
    remove = _without_media(list.remove)
    reverse = _without_media(list.reverse)
    sort = _without_media(list.sort)

    def pop(self, index: SupportsIndex = -1) -> int:
        """Removes an id and returns it; from a prompt with media, the last one."""
        token = self[index]
        del self[index]
        return token

    def clear(self) -> None:
        """Removes everything."""
        del self[:]

    def copy(self) -> Prompt:
        """Another prompt with the same ids and media."""
        return Prompt(self, self._places)

    def extend(self, ids: Iterable[int]) -> None:
        """Appends ids, or a prompt with its media."""
        length, places = len(self), places_of(ids)
        super().extend(ids)
        if places:
            self._places = joined([*self._places, *moved(places, length)])

    def __iadd__(self, ids: Iterable[int]) -> Prompt:  # type: ignore[override]  # a list's returns Self
        self.extend(ids)
        return self

    def __add__(self, ids: Iterable[int]) -> Prompt:  # type: ignore[override]  # a list's takes lists of other types
        whole = self.copy()
        whole.extend(ids)
        return whole

    def __eq__(self, other: object) -> bool:
        same = list.__eq__(self, other)
        if same is not True or not isinstance(other, Prompt) or not (self._places or other._places):
            return same
        return self.keys == other.keys

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as any list

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, ([*self], self._places)


def places_of(ids: Any) -> tuple[Place, ...]:
    """The runs of slots of a prompt; none of ids in a plain list or an array."""
    return ids.places if isinstance(ids, Prompt) else ()


def slots(medium: Medium, token: int) -> Prompt:
    """The slots of a medium as a prompt of their own.

    Args:
        medium: a picture or a clip.
        token: the id of a slot of its kind.
    """
    return Prompt([token] * medium.tokens, [Place(0, medium)])
