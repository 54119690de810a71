"""Prompt lengths, and the RoPE table that each is answered under."""

from __future__ import annotations

from collections.abc import Sequence

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import check_context, plan_context
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.terminal.amount import amount

SHORTEST = 512


def table(length: int, room: int, boundary: int | None) -> str:
    """The RoPE table of a prompt of `length` tokens with an answer of at most `room`, as groups of results name it."""
    if boundary is None:
        return "one table"
    return "short table" if length + room <= boundary else "long table" if length > boundary else "both tables"


def default_lengths(model: LanguageModel, room: int) -> tuple[list[int], str]:
    """Lengths that double from `SHORTEST`, and one on each side of the RoPE boundary.

    Args:
        model: sets context and boundary.
        room: tokens of an answer, which must fit too.

    Returns:
        (the lengths, a note on those that are left out or "").

    Raises:
        RequestError: the context or this machine's memory has no room for any.
    """
    boundary, plan = model.boundary, plan_context(model)
    lengths = [SHORTEST << n for n in range(40) if (SHORTEST << n) < plan.longest]
    if boundary is not None:
        lengths = [length for length in lengths if not boundary - room < length <= boundary]
        lengths += [boundary - room, boundary + room]
    lengths = sorted({*lengths, plan.longest - room})
    possible = [length for length in lengths if 0 < length <= plan.longest - room]
    fitting = [length for length in possible if length + room <= plan.most_tokens]
    if not fitting:
        raise _no_room(room, plan.most_tokens)
    notes = []
    if cut := [f"{length:,}" for length in possible if length not in fitting]:
        notes.append(f"not asked, for lack of memory: {', '.join(cut)} tokens")
    if boundary is not None and boundary <= room:
        notes.append(
            f"not asked under the short RoPE table: {boundary:,} tokens hold no prompt beside an answer of {room:,}"
        )
    return fitting, "; ".join(notes)


def check_lengths(model: LanguageModel, lengths: Sequence[int], room: int) -> list[int]:
    """Checks lengths that were asked for.

    Args:
        model: as above.
        lengths: in tokens.
        room: as above.

    Returns:
        The lengths in order, each once.

    Raises:
        RequestError: one is not positive, or does not fit the context or this machine's memory.
    """
    plan = plan_context(model)
    most = plan.longest - room
    if most < 1:
        raise _no_room(room, plan.longest)
    for length in lengths:
        if not 0 < length <= most:
            raise RequestError(
                f"--lengths {length:,}: the context holds {amount(plan.longest, 'token')}, of which an answer may take "
                f"{room:,}; choose lengths from 1 to {most:,}"
            )
        check_context(plan, length + room)
    return sorted(set(lengths))


def _no_room(room: int, most: int) -> RequestError:
    return RequestError(
        f"an answer may take {amount(room, 'token')}, and prompt and answer together {amount(most, 'token')}: lower "
        "--max-tokens"
    )
