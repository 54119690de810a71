"""How fast text becomes ids, beside the `tokenizers` library: the true o200k table, the same text, in turn.

    python tests/bench/tokenizer.py

The text is this project's own source, about 2 kB a prompt. Last line: JSON, bytes a second and their ratio (medians).
"""

from __future__ import annotations

import json
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer as Library

from phi4_mlx.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, PROMPT_CHARS = 7, 2000


def prompts() -> list[str]:
    """The Python files of the checkout, cut into prompts."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("phi4_mlx/**/*.py")))
    return [text[at : at + PROMPT_CHARS] for at in range(0, len(text), PROMPT_CHARS)]


def seconds(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    """Time for all texts, one by one."""
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line a tokenizer, then JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = runpy.run_path(str(ROOT / "tests" / "data" / "o200k.py"))["write"](Path(name))
        ours = load_tokenizer(folder)
        library = Library.from_file(str(folder / "tokenizer.json"))
    texts = prompts()
    size = sum(len(text.encode()) for text in texts)

    def reference(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    differing = sum(ours.encode(text, specials=True) != reference(text) for text in texts)  # warms both up, too
    times = [(seconds(ours.encode, texts), seconds(reference, texts)) for _ in range(ROUNDS)]
    result = {
        "bench": "tokenizer",
        "differing_prompts": differing,
        "bytes_per_s": round(size / median(ours for ours, _ in times)),
        "tokenizers_bytes_per_s": round(size / median(theirs for _, theirs in times)),
        "ratio": round(median(theirs / ours for ours, theirs in times), 2),
    }
    print(f"{len(texts)} prompts, {size:,} bytes: {result['ratio']} times as fast as tokenizers")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
