"""Context overflow: the oldest turns of a conversation that is too long fall out.

A turn is a user message, the system messages right before it, and everything up to the next turn. The system messages
at the beginning belong to no turn and stay, as does the last turn. Turns fall out in strides: what is kept begins with
the first turn after a multiple of the stride, counted in the tokens of all turns, or with a turn as long as a stride.
So the prompts of a growing conversation mostly begin alike, and a prompt cache serves them. The rule depends on the
messages and the limits alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, TypeVar

Overflow = Literal["stop", "oldest"]
Message = Mapping[str, Any]
Turn = TypeVar("Turn")
Ids = TypeVar("Ids", bound=list[int])


def answer_room(context: int, max_tokens: int | None) -> int:
    """Tokens that a prompt leaves free for its answer.

    Args:
        context: the most tokens of a prompt and its answer.
        max_tokens: the longest answer in tokens; None for no limit.

    Returns:
        `max_tokens`, at most half of the context; a quarter of the context if there is no limit.
    """
    return context // 4 if max_tokens is None else min(max_tokens, context // 2)


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Splits a conversation into its turns.

    Args:
        messages: each with a "role".

    Returns:
        (the system messages at the beginning, the turns). Messages before the first question are a turn too.
    """
    head = list(takewhile(lambda message: message["role"] == "system", messages))
    turns: list[list[Message]] = []
    waiting: list[Message] = []  # system messages, which belong to a question that follows them
    for message in messages[len(head) :]:
        waiting.append(message)
        if message["role"] == "system":
            continue
        if message["role"] == "user" or not turns:
            turns.append(waiting)
        else:
            turns[-1] += waiting
        waiting = []
    if waiting:
        turns[-1] += waiting
    return head, turns


def keep_latest(
    turns: Sequence[Turn],
    render: Callable[[Sequence[Turn]], Ids],
    length: Callable[[Turn], int],
    context: int,
    max_tokens: int | None,
    after: int = 0,
) -> tuple[Ids, int]:
    """Renders a conversation without the oldest turns that the context has no room for.

    Args:
        turns: in their order; the last one is always kept.
        render: the prompt [T] of the last turns, with everything that stays.
        length: tokens of a turn in a prompt; called only if the conversation is too long.
        context: the most tokens of a prompt and its answer.
        max_tokens: the longest answer in tokens, for `answer_room`.
        after: tokens that follow the prompt before the answer.

    Returns:
        (prompt [T], number of turns left out). The last turn may still be too long.
    """
    room = context - answer_room(context, max_tokens)
    ids, dropped = render(turns), 0
    excess = len(ids) + after - room
    if excess <= 0 or len(turns) < 2:
        return ids, 0
    lengths = [length(turn) for turn in turns]
    stride = _stride(context, max(room - (len(ids) - sum(lengths)), 0))
    while excess > 0 and dropped < len(turns) - 1:  # once, where the lengths add up
        dropped = _first_kept(lengths, sum(lengths[:dropped]) + excess, stride)
        ids = render(turns[dropped:])
        excess = len(ids) + after - room
    return ids, dropped


def _stride(context: int, room: int) -> int:
    """The largest power of two, in tokens, up to a quarter of the context and half of the room for turns."""
    # A power of two, so that a slightly different room keeps the stride, or at least its multiples.
    return 1 << max(min(context // 4, room // 2).bit_length() - 1, 0)


def _first_kept(lengths: Sequence[int], excess: int, stride: int) -> int:
    """The first turn where a stride allows a start and `excess` tokens come before; the last turn if there is none."""
    while stride:
        before = lengths[0]
        for number in range(1, len(lengths) - 1):
            passed = before // stride > (before - lengths[number - 1]) // stride
            if before >= excess and (passed or lengths[number] >= stride):
                return number
            before += lengths[number]
        stride //= 2  # a last turn of over half the room may leave too little for a whole stride
    return len(lengths) - 1
