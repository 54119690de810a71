"""Many clients at once, half of which disconnect at random moments: no answer is lost, and no memory.

`CLIENTS=100 ROUNDS=10 python -m pytest -s tests/e2e/test_server_load.py` is the full size, which takes minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import Server, serving, until

CLIENTS, ROUNDS = int(os.environ.get("CLIENTS", "20")), int(os.environ.get("ROUNDS", "3"))
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/responses")
LONGEST_CUT_S = 0.05 * CLIENTS  # about what an answer takes
KEPT_BYTES = 2**22  # for the prompt cache: full after the first round


def body(path: str, draw: random.Random) -> dict[str, Any]:
    text = " ".join(draw.choice(["one", "two", "three", "sea", "miles"]) for _ in range(draw.randint(1, 60)))
    messages = [{"role": "user", "content": text}]
    asked = {"input": text, "prompt": text, "messages": messages, "stream": draw.random() < 0.7, "seed": 1}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {"model": "demo", limit: draw.randint(4, 40), **asked} if path != "/v1/responses" else {
        "model": "demo", limit: draw.randint(4, 40), "input": text, "stream": asked["stream"]
    }  # fmt: skip


def ended(path: str, stream: bool, text: str) -> bool:
    """True if an answer is complete."""
    if not stream:
        return "usage" in json.loads(text)
    last = {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}.get(path)
    return f"event: {last}" in text or "response.incomplete" in text if last else text.endswith("data: [DONE]\n\n")


async def client(http: httpx.AsyncClient, number: int, cut: bool) -> str:
    """One request; returns its outcome."""
    draw = random.Random(number)
    path = draw.choice(PATHS)
    asked = body(path, draw)
    if not cut:
        answer = await http.post(path, json=asked)
        return (
            "whole" if answer.status_code == 200 and ended(path, asked["stream"], answer.text) else answer.text[-300:]
        )
    try:
        await asyncio.wait_for(http.post(path, json=asked), draw.uniform(0, LONGEST_CUT_S))
        return "too late to be cut"
    except asyncio.TimeoutError:
        return "cut"


async def load_round(server: Server, number: int) -> Counter[str]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
        first = number * CLIENTS
        told = await asyncio.gather(*(client(http, first + n, n % 2 == 1) for n in range(CLIENTS)))
    return Counter(told)


def resident_bytes(pid: int) -> int:
    return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout)


@pytest.mark.slow
def test_nothing_is_lost_under_load() -> None:
    told: Counter[str] = Counter()
    memory: list[float] = []
    waits: list[float] = []  # of one request after a round, as a share of the round's time
    resident: list[list[int]] = []
    with serving("--prompt-cache-bytes", str(KEPT_BYTES), "--max-queue", str(max(256, CLIENTS))) as server:
        for number in range(ROUNDS + 1):  # the first is to warm up
            start = time.monotonic()
            told += asyncio.run(load_round(server, number))
            end = time.monotonic()
            assert server.ask("Say hello.").status_code == 200
            waits.append((time.monotonic() - end) / (end - start))
            until(lambda: server.metrics()["jobs"] == 0)
            metrics = server.metrics()
            assert metrics["answers_under_way"] == 0 and metrics["kv_bytes"] == 0
            assert metrics["prefix_cache_bytes"] <= KEPT_BYTES
            # The prompt cache stays near its limit, give or take an entry; all other memory must be freed.
            memory.append(metrics["active_memory_bytes"] - metrics["prefix_cache_bytes"])
            resident.append([resident_bytes(server.process.pid), resident_bytes(server.engine)])
        assert metrics["engine_restarts_total"] == 0 and metrics["prefix_cache_failures_total"] == 0
        assert not any("Traceback" in line for line in server.lines), server.lines
    half = len(memory) // 2  # arrays are rounded up to 16 KB, so single rounds differ by a percent or two
    later, earlier = statistics.median(memory[half:]), statistics.median(memory[1 : half + 1])
    drift = (later - earlier) / metrics["active_memory_bytes"]
    figures = {"clients": CLIENTS, "rounds": ROUNDS, "answers": dict(told), "longest_wait": round(max(waits), 3)}
    figures |= {"drift": round(drift, 4), "active_bytes": metrics["active_memory_bytes"]}
    print(json.dumps(figures | {"resident_mb": [[each >> 20 for each in pair] for pair in resident]}))
    assert set(told) <= {"whole", "cut", "too late to be cut"}, told
    assert told["whole"] >= (CLIENTS + 1) // 2 * (ROUNDS + 1) and told["cut"] > 0
    assert max(waits) < 1 and abs(drift) < (0.02 if ROUNDS >= 10 else 0.05)
