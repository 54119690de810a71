"""Times computed from bytes and links: decode steps, prefill, and the requests that a machine answers."""

from __future__ import annotations

from dataclasses import dataclass

from phi4_mlx.commands.sizing.machines import PREFILL_SHARE, Link, Mac
from phi4_mlx.commands.sizing.split import Split
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE, cache_bytes

PROMPT_TOKENS = 1024
ANSWER_TOKENS = 256
MOST_ROWS = 32  # of the server, by default


def step_s(split: Split, mac: Mac, link: Link | None, length: int, rows: int = 1) -> float:
    """Seconds of a decode step: the weights and the cached keys and values are read, and the ranks exchange.

    Args:
        split: the model over its ranks.
        mac: each of them.
        link: between them; None for one machine.
        length: cached tokens of each sequence.
        rows: sequences.
    """
    reads = [
        (nbytes + rows * (cost.reads * cost.token_bytes * length + cost.fixed_bytes)) / mac.bytes_per_s
        for nbytes, cost in zip(split.weights_bytes, split.costs, strict=True)
    ]
    busy = sum(reads) if split.parallel == "pipeline" else max(reads)
    return busy + exchange_s(split, link, rows, rows)


def exchange_s(split: Split, link: Link | None, tokens: int, rows: int = 1) -> float:
    """Seconds of the exchanges of a pass; none on one machine.

    A sum over a ring of N ranks takes 2 (N - 1) messages, one after another, each of a part of N; over JACCL every rank
    sends to all others at once, each by a cable of its own.

    Args:
        split: the model over its ranks.
        link: between them; None for one machine.
        tokens: as for `Split.exchanges`.
        rows: as for `Split.exchanges`.

    Source: mlx/distributed/ring/ring.cpp and mlx/distributed/jaccl/lib/jaccl/mesh_impl.h of github.com/ml-explore/mlx.
    """
    if link is None:
        return 0.0
    crossing, trips, share = split.exchanges(tokens, rows), 1, 1.0
    if split.parallel == "tensor" and link.backend == "ring":
        trips = split.size - 1  # of two messages each
        share = 2 * trips / split.size
    return crossing.count * trips * link.latency_s + share * crossing.nbytes / link.bytes_per_s


def prefill_per_s(split: Split, mac: Mac, link: Link | None, matrix_weights: int) -> float:
    """Prompt tokens a second, in chunks: two operations for each weight of a matrix, and the ranks exchange."""
    chunk = PREFILL_STEP_SIZE
    busy = 2 * matrix_weights * chunk / (mac.flops * PREFILL_SHARE)
    if split.parallel == "tensor":
        busy /= split.size
    return chunk / (busy + exchange_s(split, link, chunk))


@dataclass(frozen=True)
class Service:
    """What one machine gives to many users.

    Attributes:
        rows: answers at a time.
        user_bytes: cached for each.
        requests_per_s: with a prompt of `PROMPT_TOKENS` and an answer of `ANSWER_TOKENS`.
    """

    rows: int
    user_bytes: int
    requests_per_s: float


def service_of(alone: Split, mac: Mac, matrix_weights: int) -> Service | None:
    """A server on one machine; None if the model does not fit."""
    (weights,), (cost,) = alone.weights_bytes, alone.costs
    length = PROMPT_TOKENS + ANSWER_TOKENS
    user_bytes = cache_bytes(cost, length)
    room = (mac.usable_bytes - weights - PREFILL_STEP_SIZE * cost.activation_bytes) // 2  # rows are copied as they move
    rows = min(MOST_ROWS, room // user_bytes)
    if rows < 1:
        return None
    prompt_s = PROMPT_TOKENS / prefill_per_s(alone, mac, None, matrix_weights)
    compute_s = rows * 2 * matrix_weights / (mac.flops * PREFILL_SHARE)
    token_s = max(step_s(alone, mac, None, length, rows), compute_s) / rows
    return Service(rows, user_bytes, 1 / (prompt_s + ANSWER_TOKENS * token_s))
