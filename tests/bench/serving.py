"""Our server beside mlx_lm.server: tokens per second, time to the first token, and connections lost.

    python tests/bench/serving.py [--runs 5] [--model FOLDER]

Both serve the same package to the same streamed, greedy chat requests, in turns. Four loads: one client; 8 and 32
clients at once, with prompts of their own; 8 clients whose prompts share their first 1,500 characters. Every request
opens its own connection. An answer has at most 64 tokens and may end earlier; each server's own count is used. A server
that loses a connection gets no tokens for it. Ratios are medians of pairs. Bars: `tokens_ratio` at least 1.0 in every
row and 2.0 with 8 clients, `first_ratio` at most 0.6, 0 connections lost. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import httpx
from harness import ROOT, alternate, environment, last_line, median_ratio, option_parser

DEMO = ROOT / "phi4_mlx" / "demo"
LOADS = {"1 client": (1, False), "8 clients": (8, False), "32 clients": (32, False), "8 clients, shared": (8, True)}
MAX_TOKENS = 64
START_S, ANSWER_S = 120.0, 300.0
WORDS = ("the", "weather", "in", "London", "and", "Paris", "today", "tomorrow", "please", "tell", "me", "about", "rain")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: of its chat endpoint.
        model: the name that its requests give.
    """

    url: str
    model: str


@dataclass(frozen=True)
class Answer:
    """One request's outcome.

    Attributes:
        first_s: seconds from the request to the first text; None if there was none.
        tokens: in the answer.
        lost: True if the connection was refused, reset or closed before the end.
    """

    first_s: float | None
    tokens: int
    lost: bool = False


@dataclass(frozen=True)
class Round:
    """One load on one server.

    Attributes:
        tokens_per_s: tokens of all answers by the time of the whole round.
        first_s: the median time to the first token.
        lost: connections lost.
    """

    tokens_per_s: float
    first_s: float
    lost: int


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(name: str, command: Sequence[str], model: str) -> Iterator[Server]:
    """A server that answers, until the end of the block."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)], stdout=log, stderr=log, env=environment()
        )
        try:
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start:\n{log.read()[-2000:]}")
                time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}/v1/chat/completions", model)
        finally:
            process.kill()
            process.wait()


def prompts(count: int, shared: bool, draw: random.Random) -> list[str]:
    """New prompts of 10 to 40 words, which share a beginning of 1,500 characters or none."""

    def some(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    beginning = some(400)[:1500] if shared else ""
    return [f"{beginning} {some(draw.randint(10, 40))}?".strip() for _ in range(count)]


async def ask(server: Server, prompt: str) -> Answer:
    """Streams one answer over a connection of its own."""
    body = {
        "model": server.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS,
        "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start, first, tokens, ended = time.perf_counter(), None, 0, False
    try:
        async with (
            httpx.AsyncClient(timeout=ANSWER_S) as client,
            client.stream("POST", server.url, json=body) as response,
        ):
            if response.status_code != 200:
                raise SystemExit(f"{server.url} answered {response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if first is None and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                        first = time.perf_counter() - start
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.TransportError:
        pass
    return Answer(first, tokens if ended else 0, not ended)


def load(server: Server, asked: Sequence[str]) -> Round:
    """Sends all prompts at once and waits for the last answer."""

    async def all_answers() -> list[Answer]:
        return list(await asyncio.gather(*(ask(server, prompt) for prompt in asked)))

    start = time.perf_counter()
    answers = asyncio.run(all_answers())
    took = time.perf_counter() - start
    firsts = [answer.first_s for answer in answers if answer.first_s is not None]
    return Round(
        sum(answer.tokens for answer in answers) / took,
        median(firsts) if firsts else ANSWER_S,
        sum(answer.lost for answer in answers),
    )


def row_of(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, object]:
    """The figures of one load, ours first."""
    speeds = [[each.tokens_per_s for each in rounds] for rounds in (ours, theirs)]
    firsts = [[each.first_s for each in rounds] for rounds in (ours, theirs)]
    return {
        "tokens_per_s": [round(median(each), 1) for each in speeds],
        "tokens_ratio": round(median_ratio(*speeds), 2),
        "first_s": [round(median(each), 3) for each in firsts],
        "first_ratio": round(median_ratio(*firsts), 2),
        "lost": sum(each.lost for each in ours),
        "lost_theirs": sum(each.lost for each in theirs),
    }


def main() -> None:
    """Prints a line for each load, then JSON."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", type=Path, default=DEMO)
    args = parser.parse_args()
    folder = str(args.model)
    draw, rows = random.Random(1), {}
    with (
        serving("our server", ["-m", "phi4_mlx.server", "--model", folder, "--log-level", "error"], "any") as ours,
        serving("mlx_lm.server", ["-m", "mlx_lm", "server", "--model", folder], folder) as theirs,
    ):
        for server in (ours, theirs):
            load(server, prompts(2, False, draw))  # warm up
        for name, (clients, shared) in LOADS.items():
            # Each run has prompts of its own, so that neither server finds an earlier run's in its prompt cache.
            asked = [prompts(clients, shared, draw) for _ in range(args.runs)]
            turns = {id(server): iter(asked) for server in (ours, theirs)}
            pairs = alternate(*(partial(_next_round, each, turns[id(each)]) for each in (ours, theirs)), args.runs)
            rows[name] = row_of(*pairs)
            print(name, json.dumps(rows[name]), flush=True)
    last_line("serving", **rows)


def _next_round(server: Server, asked: Iterator[Sequence[str]]) -> Round:
    return load(server, next(asked))


if __name__ == "__main__":
    main()
