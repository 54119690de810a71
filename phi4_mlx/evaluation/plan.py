"""The order in which sequences are run, so that a beginning that several share is run once.

Sequences form a tree by their tokens. A node runs the tokens that all sequences below it share, in one row; what is
left of them runs in passes of several rows, and where many share more, in nodes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from phi4_mlx.tokens.prefix import shared_length

Ids = tuple[int, ...]

PASS_COST = 16  # tokens; a pass reads all weights, which takes a Mac about as long as computing so many 4-bit tokens


@dataclass(frozen=True)
class Node:
    """Sequences with a common beginning.

    Attributes:
        sequences: the ids of each, sorted, all different.
        start: tokens that the nodes above have run.
        stop: tokens at the start that all sequences share.
    """

    sequences: list[Ids]
    start: int

    @property
    def stop(self) -> int:
        """Tokens at the start that all sequences share."""
        return shared_length(self.sequences[0], self.sequences[-1])

    @property
    def saving(self) -> int:
        """Tokens that are run fewer times in a tree than in rows of their own."""
        return sum(shared_length(one, other) - self.start for one, other in pairwise(self.sequences))

    def split(self) -> tuple[list[Ids], list[Node]]:
        """The parts after the shared beginning: sequences that run as rows, and nodes, the largest one last."""
        start, rows, nodes = self.stop, [], []
        waiting = self._branches(start)
        while waiting:
            node = waiting.pop()
            ended, branches = node.sequences[0] if len(node.sequences[0]) == node.stop else None, node._branches(start)
            if node.saving <= PASS_COST:
                rows += node.sequences
            elif (node.stop - start) * (len(branches) - (ended is None)) <= PASS_COST:  # cheaper than a pass of its own
                rows += [] if ended is None else [ended]
                waiting += branches
            else:
                nodes.append(node)
        return rows, sorted(nodes, key=lambda node: len(node.sequences))

    def _branches(self, start: int) -> list[Node]:
        """The sequences by the token after those that all share; of each, `start` tokens have been run."""
        stop = self.stop
        longer = (ids for ids in self.sequences if len(ids) > stop)
        return [Node(list(group), start) for _, group in groupby(longer, lambda ids: ids[stop])]


def packs(rows: Sequence[Ids], start: int, most_rows: Callable[[int], int], most_tokens: int) -> Iterator[list[Ids]]:
    """Rows that run in one pass, padded to the longest.

    Args:
        rows: the ids of each.
        start: tokens of each that have been run.
        most_rows: the tokens of the longest row -> the most rows of a pass.
        most_tokens: the most tokens of a pass of several rows, with padding.
    """
    pack: list[Ids] = []
    for ids in sorted(rows, key=len):
        new, shortest = len(ids) - start, len(pack[0]) - start if pack else 0
        padding = sum(len(ids) - len(each) for each in pack)
        if pack and (
            len(pack) >= most_rows(len(ids))
            or new * (len(pack) + 1) > most_tokens
            or padding > max(PASS_COST, shortest)
        ):
            yield pack
            pack = []
        pack.append(ids)
    if pack:
        yield pack
