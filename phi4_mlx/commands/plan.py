"""`python -m phi4_mlx plan`: a model over several machines on paper, before one is bought or connected."""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.command import Parser, number, run, typed, word
from phi4_mlx.terminal.options import add_kv_bits_option, add_revision_option

if TYPE_CHECKING:
    from phi4_mlx.commands.sizing.measured import Measured
    from phi4_mlx.commands.sizing.shape import Shape
    from phi4_mlx.commands.sizing.split import Split
    from phi4_mlx.models.share import Parallel
    from phi4_mlx.ranks.launch import Launch

MOST_RANKS = 64
SSH_PORT = 22
ANSWER_S = 2.0  # for a host on a private link


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _plan, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("plan"),
        description="Print what a model over several machines takes: bytes, exchanges, times, and a fleet of servers. "
        "Reads no weights; started by mlx.launch, it loads the model's shares and measures a short run beside.",
    )
    parser.add_argument(
        "--model", type=word,
        help="a folder, a config.json alone, a Hugging Face id, or demo, demo-flash or demo-multimodal "
        "(default: mlx-community/Phi-4-mini-instruct-4bit)",
    )  # fmt: skip
    add_revision_option(parser)
    parser.add_argument(
        "--hosts", type=word, metavar="A,B,...", help="the machines, as for mlx.launch --hosts (default: none)"
    )
    parser.add_argument(
        "--ranks", type=number(int, 2, MOST_RANKS), metavar="N",
        help="the number of machines, in place of --hosts (default: that of mlx.launch)",
    )  # fmt: skip
    parser.add_argument("--parallel", choices=("tensor", "pipeline"), help="the only way to look at (default: both)")
    add_kv_bits_option(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def _plan(args: argparse.Namespace) -> None:
    from phi4_mlx.ranks.launch import launched

    launch = launched()
    ranks = _ranks(args, launch)

    from phi4_mlx.commands.sizing.shape import read_shape
    from phi4_mlx.commands.sizing.split import whole
    from phi4_mlx.models.machine import memory_limit

    path = _path(args)
    shape = read_shape(path)
    alone, splits = whole(shape, args.kv_bits), _splits(shape, args.parallel, ranks, args.kv_bits)
    chosen = _chosen(shape, splits, ranks, ["jaccl", "ring"] if launch is None else [launch.backend])
    measured = None
    if launch is not None:
        from phi4_mlx.commands.sizing.measured import measure

        split = splits[chosen[0][1]]
        assert not isinstance(split, str)
        if shape.from_config:
            raise RequestError(f"{path} has no weights, so nothing can be measured; start plan without mlx.launch")
        measured = measure(launch, path, split)
    name = args.model or _default()
    if args.json:
        possible = [each for each in splits.values() if not isinstance(each, str)]
        print(json.dumps(_json(name, alone, possible, chosen, memory_limit(), measured)))
        return
    print(f"{name}: weights {size(alone.weights_bytes[0])}, {amount(ranks, 'rank')}")
    for title, lines in _sections(shape, alone, splits, chosen, measured):
        print(f"\n{title}", *lines, sep="\n")


def _splits(
    shape: Shape, parallel: Parallel | None, ranks: int, kv_bits: int | None
) -> dict[Parallel, Split | str]:
    """The model split by each way, or by the one that is asked for, or why it cannot be; one way at least is possible.

    Raises:
        RequestError: none is.
    """
    from phi4_mlx.commands.sizing.split import split_of

    asked: tuple[Parallel, ...] = (parallel,) if parallel else ("tensor", "pipeline")
    splits: dict[Parallel, Split | str] = {}
    for way in asked:
        try:
            splits[way] = split_of(shape, way, ranks, kv_bits)
        except RequestError as error:
            splits[way] = str(error)
    if all(isinstance(each, str) for each in splits.values()):
        raise RequestError(str(splits[asked[-1]]))
    return splits


def _chosen(
    shape: Shape, splits: Mapping[Parallel, Split | str], ranks: int, backends: Sequence[str]
) -> list[tuple[str, Parallel, str]]:
    """(backend, way, reason) of each backend: the only way that is possible or asked for, or the better one."""
    from phi4_mlx.models.sharding import choose_parallel

    possible = [way for way, each in splits.items() if not isinstance(each, str)]
    if len(possible) > 1:
        return [(backend, *choose_parallel(shape.config, ranks, backend, shape.infos)) for backend in backends]
    refusals = [each for each in splits.values() if isinstance(each, str)]
    return [(backend, possible[0], refusals[0] if refusals else "it is asked for") for backend in backends]


def _sections(
    shape: Shape,
    alone: Split,
    splits: Mapping[Parallel, Split | str],
    chosen: Sequence[tuple[str, Parallel, str]],
    measured: Measured | None,
) -> Iterator[tuple[str, Iterable[str]]]:
    """The titles of the report, and the lines under each."""
    from phi4_mlx.commands.sizing import report
    from phi4_mlx.commands.sizing.shape import matrix_weights
    from phi4_mlx.models.machine import memory_limit

    possible, weights = [each for each in splits.values() if not isinstance(each, str)], matrix_weights(shape.model())
    yield "Ways", report.ways(splits, chosen)
    for split in possible:
        yield f"By {split.parallel}", report.ranks(split, memory_limit())
    if measured is not None:
        yield "Measured here", measured.lines()
    yield "Named Macs and links", report.macs(possible, alone, weights)
    yield "A fleet", report.fleet(alone, weights)


def _ranks(args: argparse.Namespace, launch: Launch | None) -> int:
    """The number of machines, each known to answer if it has a name."""
    if launch is not None:
        given = args.ranks if args.hosts is None else len(args.hosts.split(","))
        if given not in (None, launch.size):
            raise RequestError(f"{given} machines are planned, and mlx.launch has started {launch.size} ranks")
        return launch.size
    if (args.hosts is None) == (args.ranks is None):
        found = "both --hosts and --ranks" if args.hosts else "neither --hosts nor --ranks"
        raise RequestError(f"plan is for several machines, and {found} is given; name them, or their number")
    if args.hosts is None:
        return int(args.ranks)
    hosts = [each.strip().rpartition("@")[2] for each in args.hosts.split(",")]
    if len(hosts) < 2 or len(hosts) > MOST_RANKS:
        raise RequestError(f"--hosts {args.hosts!r:.60} names {amount(len(hosts), 'machine')}; name 2 to {MOST_RANKS}")
    for at, host in enumerate(hosts):
        if not host or host in hosts[:at]:
            raise RequestError(f"--hosts {args.hosts!r:.60} has {f'{host!r:.60} twice' if host else 'an empty name'}")
    for host in hosts:
        _check_host(host)
    return len(hosts)


def _check_host(host: str) -> None:
    """Raises RequestError for a host without an address, or that does not answer. One that refuses ssh is there."""
    way_out = "check the name and the link, or plan for a number of machines with --ranks"
    try:
        socket.create_connection((host, SSH_PORT), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        pass
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        raise RequestError(f"host {host!r:.60} has no address: {reason}; {way_out}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RequestError(f"host {host!r:.60} does not answer: {reason}; {way_out}") from None


def _path(args: argparse.Namespace) -> Path:
    """The folder or the config.json of the model; of a Hugging Face id only the config is downloaded."""
    from phi4_mlx.files.embedded import EMBEDDED
    from phi4_mlx.hub import NEEDED_FILES, download

    name = args.model or _default()
    path = Path(os.path.expanduser(name))
    if name in EMBEDDED:
        return EMBEDDED[name]
    if os.path.exists(path):
        return path
    return download(name, args.revision, [each for each in NEEDED_FILES if each == "config.json"])


def _default() -> str:
    from phi4_mlx.hub import DEFAULT_MODEL

    return DEFAULT_MODEL


def _json(
    name: str, alone: Split, splits: Sequence[Split], chosen: Sequence[tuple[str, str, str]], limit: int,
    measured: Measured | None,
) -> dict[str, Any]:
    """The JSON of `--json`."""
    from phi4_mlx.generation.memory import PREFILL_STEP_SIZE

    def crossing(split: Split, tokens: int) -> dict[str, int]:
        found = split.exchanges(tokens)
        return {"exchanges": found.count, "bytes": found.nbytes}

    return {
        "model": name,
        "weights_bytes": alone.weights_bytes[0],
        "limit_bytes": limit,
        "chosen": [{"backend": backend, "parallel": way, "reason": reason} for backend, way, reason in chosen],
        "splits": [
            {
                "parallel": split.parallel,
                "weights_bytes": split.weights_bytes,
                "cache_token_bytes": [cost.token_bytes for cost in split.costs],
                "activation_bytes": [cost.activation_bytes for cost in split.costs],
                "decode_step": crossing(split, 1),
                "prefill_chunk": crossing(split, PREFILL_STEP_SIZE),
                "longest_context": split.most_tokens(limit),
            }
            for split in splits
        ],
        "measured": None if measured is None else measured.to_json(),
    }
