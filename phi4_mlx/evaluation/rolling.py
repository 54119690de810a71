"""Windows of texts that are longer than the context of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """One pass over a part of a text.

    Attributes:
        ids: the tokens to run, [T].
        targets: the tokens that the last positions predict, at most T.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first(self) -> int:
        """The position that predicts the first target."""
        return len(self.ids) - len(self.targets)


def windows(context: Sequence[int], continuation: Sequence[int], longest: int) -> list[Window]:
    """The passes that predict each token of a continuation once, in the manner of lm-eval.

    Where the whole is too long, the context is cut from the left. A continuation that is too long itself is predicted
    in stretches of `longest` tokens; the last stretch is shorter, and sees a full context.

    Args:
        context: ids before the continuation, at least one.
        continuation: ids to predict.
        longest: the most tokens of a pass.

    Returns:
        The windows in order; none for an empty continuation.

    Source: `get_rolling_token_windows` in lm-eval.
    """
    whole = (*context, *continuation)
    found = []
    for start in range(len(context), len(whole), longest):
        end = min(start + longest, len(whole))
        found.append(Window(whole[max(0, end - 1 - longest) : end - 1], whole[start:end]))
    return found
