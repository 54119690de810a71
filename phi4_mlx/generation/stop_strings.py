"""Stop strings found in text that arrives in pieces; the work per character does not depend on what came before.

Source: the matching automaton of Knuth, Morris and Pratt, 1977.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first; of two that end together, the longer one.

    Args:
        stops: strings that are not empty.

    Attributes:
        begun: characters at the end of the text so far that may begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(each, _shorter_beginnings(each)) for each in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that the text ends with
        self.begun = 0

    def read(self, text: str) -> tuple[int, str] | None:
        """Reads the next piece of text.

        Args:
            text: the piece.

        Returns:
            (characters of the piece up to the end of a stop string, that stop string); None if none is complete.
        """
        ends = [end for at, (stop, shorter) in enumerate(self._stops) if (end := self._read(at, stop, shorter, text))]
        self.begun = max(self._matched, default=0)
        return min(ends, key=lambda end: (end[0], -len(end[1]))) if ends else None

    def _read(self, at: int, stop: str, shorter: list[int], text: str) -> tuple[int, str] | None:
        matched = self._matched[at]
        for read, char in enumerate(text, 1):
            while matched and stop[matched] != char:
                matched = shorter[matched - 1]
            if stop[matched] == char:
                matched += 1
                if matched == len(stop):
                    return read, stop
        self._matched[at] = matched
        return None


def _shorter_beginnings(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of the longest shorter beginning that it ends with."""
    lengths = [0]
    for char in stop[1:]:
        length = lengths[-1]
        while length and stop[length] != char:
            length = lengths[length - 1]
        lengths.append(length + (stop[length] == char))
    return lengths
