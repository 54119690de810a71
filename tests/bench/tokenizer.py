"""How fast tokenizer.json is read and text becomes ids, beside the `tokenizers` library: the true o200k table, in turn.

    python tests/bench/tokenizer.py

The text is Python's own standard library, cut into prompts of three lengths. Last line: JSON; ratios are medians.
"""

from __future__ import annotations

import json
import os
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer as Library

from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, TEXT_CHARS = 5, 1_000_000
PROMPT_CHARS = (200, 2_000, 20_000)


def text() -> str:
    """Source that both sides see for the first time."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)[:TEXT_CHARS]


def seconds(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    """Time for all texts, one by one."""
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def loaded(folder: Path) -> tuple[Tokenizer, Library, list[tuple[float, float]]]:
    """Both tokenizers, and the seconds that each took, ours first, in every round."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ours = load_tokenizer(folder)
        middle = time.perf_counter()
        library = Library.from_file(str(folder / "tokenizer.json"))
        times.append((middle - start, time.perf_counter() - middle))
    return ours, library, times


def main() -> None:
    """Prints a line a measure, then JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = runpy.run_path(str(ROOT / "tests" / "data" / "o200k.py"))["write"](Path(name))
        ours, library, times = loaded(folder)
    load_s, ratio = median(ours for ours, _ in times), round(median(theirs / ours for ours, theirs in times), 2)
    print(f"load: {load_s:.2f} s, {ratio} times as fast as tokenizers")

    def reference(prompt: str) -> list[int]:
        return library.encode(prompt, add_special_tokens=False).ids

    whole = text()
    differing = ours.encode(whole) != reference(whole)
    result: dict[str, object] = {"bench": "tokenizer", "same_ids": not differing, "load_s": round(load_s, 3)}
    result["ratio_load"] = ratio
    for length in PROMPT_CHARS:
        prompts = [whole[at : at + length] for at in range(0, len(whole), length)]
        times = [(seconds(ours.encode, prompts), seconds(reference, prompts)) for _ in range(ROUNDS)]
        ratio = round(median(theirs / ours for ours, theirs in times), 2)
        speed = len(whole) / median(ours for ours, _ in times) / 1e6
        print(f"prompts of {length:,} characters: {speed:.1f} M characters/s, {ratio} times as fast as tokenizers")
        result[f"ratio_{length}"] = ratio
    print(json.dumps(result))


if __name__ == "__main__":
    main()
