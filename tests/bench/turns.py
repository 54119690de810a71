"""Memory over 200 turns of conversation on the demo: MLX's, active and cached, and what the process has resident.

    python tests/bench/turns.py [--turns 200]

Conversations of ten turns, sampled and greedy in turn, each begun with /reset, some of them across the RoPE boundary;
a turn is taken back and asked again in each. Memory is read when a conversation has ended and is forgotten. The first
40 turns warm up. The bar: the last fifth of what follows is within 2 % of its first fifth, all three. Last line: JSON.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
from statistics import median

import mlx.core as mx
from peer import last_line

from phi4_mlx import load, make_sampler
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.generation.options import DecodeOptions

WARM, TALK = 40, 10  # turns, and turns of a conversation
BAR_PERCENT = 2.0
QUESTIONS = (
    "hello", "what are you?", "what is 12 * 31?", "my name is Ada", "what is my name?", "convert 5 km to miles",
    "thank you", "what is 7 + 8?", "who are you?", "goodbye",
)  # fmt: skip


def resident_bytes() -> int:
    """Of this process, as `ps` has it: on macOS and Linux."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], check=True, capture_output=True, text=True)
    return 1024 * int(shown.stdout)


def talk(conversation: Conversation, number: int) -> None:
    """One conversation, and the end of it."""
    for turn, question in enumerate(QUESTIONS[:TALK]):
        sampler = None if turn % 2 else make_sampler(0.8, top_p=0.95, seed=number)
        for _ in conversation.ask(question, DecodeOptions(max_tokens=40, sampler=sampler)):
            pass
    last = conversation.turns.pop()
    for _ in conversation.ask(last.question, DecodeOptions(max_tokens=40)):
        pass
    conversation.turns.clear()
    conversation.forget_cache()


def drift_percent(series: list[int]) -> float:
    """How far the median of the last fifth is from that of the first."""
    fifth = max(1, len(series) // 5)
    first, last = median(series[:fifth]), median(series[-fifth:])
    return 100 * (last - first) / first if first else 0.0


def main() -> None:
    """Prints a line a conversation, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    turns = parser.parse_args().turns
    model, tokenizer = load("demo")
    conversation = Conversation(model, tokenizer, system="You are brief.")
    memory: dict[str, list[int]] = {"active": [], "cached": [], "resident": []}
    tokens = 0
    for number in range((WARM + turns) // TALK):
        talk(conversation, number)
        tokens = max(tokens, conversation.usage.prompt_tokens)
        gc.collect()
        if number >= WARM // TALK:
            for name, bytes_now in zip(
                memory, (mx.get_active_memory(), mx.get_cache_memory(), resident_bytes()), strict=True
            ):
                memory[name].append(bytes_now)
            shown = ", ".join(f"{name} {series[-1] / 1e6:.2f} MB" for name, series in memory.items())
            print(f"{(number + 1) * TALK - WARM:4} turns: {shown}", flush=True)
    drifts = {name: round(drift_percent(series), 3) for name, series in memory.items()}
    last_line(
        "turns",
        all(drift <= BAR_PERCENT for drift in drifts.values()),
        turns=turns,
        longest_prompt=tokens,
        drift_percent=drifts,
        bar_percent=BAR_PERCENT,
        memory_bytes={name: series[-1] for name, series in memory.items()},
    )


if __name__ == "__main__":
    main()
