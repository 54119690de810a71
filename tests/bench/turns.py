"""Growth of memory over 200 turns of conversation on the demo: MLX's active and cached memory, resident memory.

    python tests/bench/turns.py [--turns 200]

Each conversation has ten turns, alternately sampled and greedy, one of them undone and asked again; some cross the RoPE
boundary. Memory is read after each conversation is cleared. The first 40 turns warm up. Bar: the median of the last
fifth of readings at most 2 % above that of the first fifth, for all three. The last line is JSON.
"""

from __future__ import annotations

import gc
import os
import subprocess
from statistics import median

import mlx.core as mx
from harness import last_line, option_parser

from phi4_mlx import load, make_sampler
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.generation.options import DecodeOptions

WARM, TALK = 40, 10  # turns to warm up, turns of one conversation
BAR_PERCENT = 2.0
QUESTIONS = (
    "hello", "what are you?", "what is 12 * 31?", "my name is Ada", "what is my name?", "convert 5 km to miles",
    "thank you", "what is 7 + 8?", "who are you?", "goodbye",
)  # fmt: skip


def resident_bytes() -> int:
    """Resident memory of this process, from `ps` (macOS and Linux)."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], check=True, capture_output=True, text=True)
    return 1024 * int(shown.stdout)


def talk(conversation: Conversation, number: int) -> None:
    """Holds one conversation, then clears it."""
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
    """Growth of the median of the last fifth over that of the first fifth."""
    fifth = max(1, len(series) // 5)
    first, last = median(series[:fifth]), median(series[-fifth:])
    return 100 * (last - first) / first if first else 0.0


def main() -> None:
    """Prints a line for each conversation, then JSON."""
    parser = option_parser(__doc__)
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
        turns=turns,
        longest_prompt=tokens,
        drift_percent=drifts,
        bar_percent=BAR_PERCENT,
        memory_bytes={name: series[-1] for name, series in memory.items()},
        ok=all(drift <= BAR_PERCENT for drift in drifts.values()),
    )


if __name__ == "__main__":
    main()
