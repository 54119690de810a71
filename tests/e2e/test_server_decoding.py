"""The server's options of decoding: four clients at a time get the answers of `generate`, in fewer passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from phi4_mlx import generate, make_logits_processors
from tests.conftest import Demo
from tests.e2e.server_process import ENDLESS, serving

TEXT = "Repeat this: The mill stands by the river, and the river runs to the sea."
TOKENS = 150


@pytest.mark.slow
def test_four_copying_clients_take_at_most_0_6_of_the_passes(demo: Demo) -> None:
    model, tokenizer = demo
    bias: dict[str, Any] = ENDLESS["logit_bias"]
    expected = []
    for n in range(4):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": f"{TEXT} {n}"}])
        processors = make_logits_processors({int(token): value for token, value in bias.items()})
        expected.append(
            generate(model, tokenizer, prompt, max_tokens=TOKENS, kv_bits=8, logits_processors=processors)
        )
    options = ("--kv-bits", "8", "--speculate", "lookup", "--max-step-ms", "60000")
    with serving(*options) as server, ThreadPoolExecutor(4) as clients:
        asked = [
            clients.submit(
                server.ask, f"{TEXT} {n}", temperature=0, logit_bias=bias, max_tokens=TOKENS, priority=n % 2
            )
            for n in range(4)
        ]
        answers = [each.result().json()["choices"][0]["message"]["content"] for each in asked]
        metrics = server.metrics()
    assert answers == expected
    assert metrics["held_tokens_total"] > TOKENS
    assert metrics["passes_total"] <= 0.6 * TOKENS
