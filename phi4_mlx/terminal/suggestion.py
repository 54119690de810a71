"""The right name for a mistyped one. Only the standard library is imported, and only when a name is wrong."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from itertools import takewhile

DASHES = "-–—−"
_MOST = 3  # names in a suggestion
_LONGEST_PATH = 1000
_SIMILAR = 0.7  # difflib's ratio: 2 x letters in common / letters of both


def suggestion(given: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean --prompt?", or "" if no name is near.

    Args:
        given: the unknown name.
        names: the known names.
    """
    return _question(nearest(given, names))


def path_suggestion(given: str, fits: Callable[[str], bool], names: Iterable[str] = ()) -> str:
    """As `suggestion`, for a path that does not exist; any folder of it may be the mistyped one.

    Args:
        given: the path.
        fits: called with a path that exists; True if it may be the one that was meant.
        names: the known names that are not paths.
    """
    near = [*nearest(given, names), *_near_paths(given.rstrip("/"), fits)]
    return _question(list(dict.fromkeys(near))[:_MOST])


def nearest(given: str, names: Iterable[str]) -> list[str]:
    """The names nearest to a mistyped one: those that differ in dashes or case, else in one letter, else in more.

    Args:
        given: the mistyped name.
        names: the known names.

    Returns:
        At most three names, or none. One letter may be missing, doubled, wrong or swapped with the next.
    """
    from difflib import get_close_matches

    word, plain = _plain(given), {name: _plain(name) for name in names}
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name == word,
        lambda name: is_slip(word, name),
        lambda name: len(word) > 2 and word in name,
        lambda name: len(name) > 3 and word.startswith(name),
    )
    for rule in rules:
        if found := [name for name in plain if rule(plain[name])]:
            return sorted(found, key=len)[:_MOST]
    close = get_close_matches(word, plain.values(), 1, _SIMILAR)
    return [name for name in plain if plain[name] in close][:1]


def is_slip(given: str, name: str) -> bool:
    """True if two names differ in dashes or case only, or in one letter or the order of two, and share another."""
    word, name = _plain(given), _plain(name)
    one, other = _differing(*_differing(word, name))
    swapped = len(one) == 2 and one == other[::-1]
    return word == name or swapped or (max(len(one), len(other)) == 1 and len(one) < len(word))


def _differing(one: str, other: str) -> tuple[str, str]:
    """Both strings without their common prefix, reversed."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[shared:][::-1], other[shared:][::-1]


def _plain(name: str) -> str:
    """The name in lower case, without dashes before it; editors turn two of them into a long one."""
    return name.strip().replace("_", "-").lstrip(DASHES).lower()


def _question(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _near_paths(given: str, fits: Callable[[str], bool]) -> list[str]:
    """The paths that exist and are nearest to one that does not."""
    parent, name = os.path.split(given)
    if not name or len(given) > _LONGEST_PATH:
        return []
    parents = [parent] if os.path.isdir(os.path.expanduser(parent) or ".") else _near_paths(parent, os.path.isdir)
    found = []
    for folder in parents:
        whole = os.path.expanduser(folder) or "."
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
            names = [each for each in os.listdir(whole) if fits(os.path.join(whole, each))]
            found += [os.path.join(folder, each) for each in ([name] if name in names else nearest(name, names))]
    return found
