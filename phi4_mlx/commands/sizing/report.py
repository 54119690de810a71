"""The lines that `plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from phi4_mlx.commands.sizing.estimate import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    prefill_per_s,
    service_of,
    step_s,
)
from phi4_mlx.commands.sizing.machines import DECODE_SHARE, LINKS, MACS, PREFILL_SHARE, Link
from phi4_mlx.commands.sizing.split import Split
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE
from phi4_mlx.models.share import Parallel
from phi4_mlx.terminal.amount import amount, size

CONTEXT = 2048  # tokens cached in a decode step of the tables

ROUTER = (
    "A router in front of several such servers must know: which of them has a conversation (the prefix cache is each "
    "server's own, so the same user or the same beginning goes to the same server while it is healthy);",
    "their health (GET /health; no request goes to one that does not answer in time, and one that failed before its "
    "first token may be sent to another);",
    "their model names (GET /v1/models; all serve the same model and adapters under the same names);",
    "and how many answers each is drawing (a full server answers 429 or 503; the request goes to the next).",
)


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
    yield f"this machine allows {size(limit_bytes)} a rank: a context of {amount(split.most_tokens(limit_bytes), 'token')}"


def macs(splits: Sequence[Split], alone: Split, matrix_weights: int) -> Iterator[str]:
    """Named Macs and links: one machine, then so many of them by each way."""
    (first, *_) = splits or [alone]
    yield f"Computed, not measured: decode at {DECODE_SHARE} of the memory bandwidth and {CONTEXT:,} cached tokens,"
    yield f"prefill at {PREFILL_SHARE} of the GPU's float32 rate; the sources stand in commands/sizing/machines.py."
    ways_over: list[tuple[str, Split, Link | None]] = [("one", alone, None)]
    for split in splits:
        ways_over += [(f"{split.size}, {split.parallel}, {link.name}", split, link) for link in LINKS]
    for title, cell in (
        ("tokens/s of one answer", lambda split, mac, link: f"{1 / step_s(split, mac, link, CONTEXT):,.0f}"),
        ("prompt tokens/s", lambda split, mac, link: f"{prefill_per_s(split, mac, link, matrix_weights):,.0f}"),
    ):
        yield ""
        names = [_short(mac.name) for mac in MACS]
        rows = []
        for name, split, link in ways_over:
            fits = [split.most_tokens(mac.usable_bytes) > 0 for mac in MACS]
            rows.append([name, *(cell(split, mac, link) if fit else "-" for mac, fit in zip(MACS, fits, strict=True))])
        yield from table([title, *names], rows)
    yield ""
    yield from table(
        ["longest context", *(_short(mac.name) for mac in MACS)],
        [
            [name, *(f"{split.most_tokens(mac.usable_bytes):,}" for mac in MACS)]
            for name, split in (("one", alone), *((f"{each.size}, {each.parallel}", each) for each in splits))
        ],
    )


def fleet(alone: Split, matrix_weights: int) -> Iterator[str]:
    """Requests a second of one machine with a server, and what a router in front of several must know."""
    yield f"Computed: requests of {PROMPT_TOKENS:,} prompt tokens, none of them cached, and answers of {ANSWER_TOKENS}."
    rows = []
    for mac in MACS:
        service = service_of(alone, mac, matrix_weights)
        if service is None:
            rows.append([mac.name, "-", "-", "-"])
        else:
            rows.append([mac.name, str(service.rows), size(service.user_bytes), f"{service.requests_per_s:.2f}"])
    yield from table(["one machine, its own server", "answers at a time", "cache a user", "requests/s"], rows)
    yield from ROUTER


def _short(name: str) -> str:
    return name.replace("MacBook ", "").replace("Mac ", "")
