"""The time to the first token of a long prompt: cold, from memory, and from the disk after a restart of the engine.

    python tests/bench/restart.py [--model demo] [--tokens 4000]

Both engines have compiled their kernels before. Bar: from the disk at most 0.15 of cold. The last line is JSON.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from harness import last_line, option_parser

from phi4_mlx.checkpoint import load
from phi4_mlx.generation.cache_store.store import store_settings
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.loop import turn
from phi4_mlx.server.engine.protocol import Finish, Job
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.tokens.prompt import Prompt

BAR = 0.15  # of the cold time


def first_token_s(engine: Engine, ids: list[int]) -> tuple[float, int]:
    """Seconds from a job's arrival to the end of its only token, and the tokens that were cached."""
    start = time.perf_counter()
    events = turn(engine, [Job(1, Prompt(ids), 1, Sampling(temp=0.0))])
    while not any(isinstance(event, Finish) for event in events):
        events = turn(engine, [])
    seconds = time.perf_counter() - start
    return seconds, next(event.cached_tokens for event in events if isinstance(event, Finish))


def measure(model: str, tokens: int) -> dict[str, Any]:
    """Cold, from memory, and from the disk after a restart."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, store=store_settings(str(Path(folder) / "store"), 2**33))

        def started() -> Engine:
            engine = Engine(*load(model), settings)
            first_token_s(engine, [5, 6, 7])  # compiles the kernels
            return engine

        engine = started()
        ids = [3 + (n * 7919 + n // 13) % 900 for n in range(tokens)]
        cold_s, _ = first_token_s(engine, ids)
        memory_s, _ = first_token_s(engine, ids)
        engine.close(60.0)
        engine = started()
        disk_s, cached = first_token_s(engine, ids)
        gauges = engine.gauges()
        engine.close(60.0)
    return {
        "model": model, "tokens": tokens, "cold_s": cold_s, "memory_s": memory_s, "disk_s": disk_s,
        "cached_tokens": cached, "of_cold": disk_s / cold_s, "bar": BAR, "ok": disk_s <= BAR * cold_s,
        "disk_bytes": gauges["prefix_cache_disk_bytes"],
    }  # fmt: skip


def main() -> None:
    """Prints the figures as JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--model", default="demo", help="a folder or an embedded model")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the prompt")
    args = parser.parse_args()
    last_line("restart", **measure(args.model, args.tokens))


if __name__ == "__main__":
    main()
