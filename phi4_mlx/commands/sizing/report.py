"""The lines that `plan` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from phi4_mlx.commands.sizing.estimate import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    prefill_per_s,
    service_of,
    step_s,
)
from phi4_mlx.commands.sizing.machines import DECODE_SHARE, LINKS, MACS, PREFILL_SHARE, Link, Mac
from phi4_mlx.commands.sizing.split import Split
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE
from phi4_mlx.models.share import Parallel
from phi4_mlx.terminal.amount import amount, size

CONTEXT = 2048  # tokens cached in a decode step of the tables

def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; the first column is flush left, the others right."""
    body = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    for row in body:
        first, *rest = (
            f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def ways(splits: Mapping[Parallel, Split | str], chosen: Iterable[tuple[str, Parallel, str]]) -> Iterator[str]:
    """The ways in which a model can be split, and the one to take.

    Args:
        splits: way -> the split, or why there is none.
        chosen: backend, way and reason.
    """
    for parallel, split in splits.items():
        yield f"{parallel}: {split}" if isinstance(split, str) else f"{parallel}: possible"
    for backend, parallel, reason in chosen:
        yield f"over {backend}: --parallel {parallel}, as {reason}"


def ranks(split: Split, limit_bytes: int) -> Iterator[str]:
    """The bytes of each rank, and the exchanges."""
    whole_bytes = sum(split.weights_bytes)
    yield from table(
        ["rank", "weights", "of the whole", "cache a token", "activations a prompt token"],
        (
            [
                str(rank), size(nbytes), f"{nbytes / whole_bytes:.2f}", size(cost.token_bytes),
                size(cost.activation_bytes),
            ]
            for rank, (nbytes, cost) in enumerate(zip(split.weights_bytes, split.costs, strict=True))
        ),
    )  # fmt: skip
    for what, tokens in (("a decode step", 1), (f"a prefill chunk of {PREFILL_STEP_SIZE:,} tokens", PREFILL_STEP_SIZE)):
        crossing = split.exchanges(tokens)
        yield f"{what}: {crossing.words}, {size(crossing.nbytes)}"
    longest = amount(split.most_tokens(limit_bytes), "token")
    yield f"this machine allows {size(limit_bytes)} a rank: a context of {longest}"


def macs(splits: Sequence[Split], alone: Split, matrix_weights: int) -> Iterator[str]:
    """Named Macs and links: one machine, then several of them by each way."""
    yield f"Computed, not measured: decode at {DECODE_SHARE} of the memory bandwidth, with {CONTEXT:,} cached tokens;"
    yield f"prefill at {PREFILL_SHARE} of the GPU's float32 rate. Sources: phi4_mlx/commands/sizing/machines.py."
    yield "A dash: the memory or the ports do not allow it. Links, with the time of an exchange and bytes a second:"
    for link in LINKS:
        yield f"  {link.name}: {1000 * link.latency_s:g} ms, {size(link.bytes_per_s)}/s"
    rows: list[tuple[str, Split, Link | None]] = [("1", alone, None)]
    rows += [(f"{split.size}, {split.parallel}, {link.name}", split, link) for split in splits for link in LINKS]

    def cells(split: Split, link: Link | None, cell: Callable[[Split, Mac, Link | None], float]) -> Iterator[str]:
        for mac in MACS:
            possible = split.most_tokens(mac.usable_bytes) and (link is None or link.thunderbolt <= mac.thunderbolt)
            yield f"{cell(split, mac, link):,.0f}" if possible else "-"

    def prefill(split: Split, mac: Mac, link: Link | None) -> float:
        return prefill_per_s(split, mac, link, matrix_weights)

    def longest(split: Split, mac: Mac, link: Link | None) -> float:
        return split.most_tokens(mac.usable_bytes)

    names = [mac.name.removeprefix("MacBook ").removeprefix("Mac ") for mac in MACS]
    short: list[tuple[str, Split, Link | None]]
    short = [("1", alone, None), *((f"{split.size}, {split.parallel}", split, None) for split in splits)]
    for title, chosen, cell in (
        ("tokens/s of one answer", rows, lambda split, mac, link: 1 / step_s(split, mac, link, CONTEXT)),
        ("prompt tokens/s", rows, prefill),
        ("longest context", short, longest),
    ):
        yield ""
        yield from table([title, *names], [[name, *cells(split, link, cell)] for name, split, link in chosen])


def fleet(alone: Split, matrix_weights: int) -> Iterator[str]:
    """Requests a second of one machine with a server of its own."""
    yield f"Computed: requests of {PROMPT_TOKENS:,} prompt tokens, none of them cached, and answers of {ANSWER_TOKENS}."
    rows = []
    for mac in MACS:
        service = service_of(alone, mac, matrix_weights)
        if service is None:
            rows.append([mac.name, "-", "-", "-"])
        else:
            rows.append([mac.name, str(service.rows), size(service.user_bytes), f"{service.requests_per_s:.2f}"])
    yield from table(["one server", "answers at a time", "cache a user", "requests/s"], rows)
