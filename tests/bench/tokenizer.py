"""Speed of reading the o200k tokenizer.json and of encoding text, beside the `tokenizers` library.

    python tests/bench/tokenizer.py

The text is Python's standard library, cut into prompts of three lengths. Ratios are medians of pairs. The last line is
JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from harness import alternate, last_line, median_ratio, option_parser, seconds, timed, with_o200k_files
from tokenizers import Tokenizer as Library

from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

ROUNDS, TEXT_CHARS = 5, 1_000_000
PROMPT_CHARS = (200, 2_000, 20_000)


def text() -> str:
    """Source code of Python's standard library, new to both tokenizers."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)[:TEXT_CHARS]


def with_strings(folder: Path) -> float:
    """CPU time to read the same table with its merges written as strings, relative to the file as it is."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    other = folder / "strings"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=2), encoding="utf-8")

    def cpu_seconds(folder: Path) -> float:
        start = time.process_time()
        load_tokenizer(folder)
        return time.process_time() - start

    return median_ratio(*alternate(partial(cpu_seconds, other), partial(cpu_seconds, folder), ROUNDS))


def loaded(folder: Path) -> tuple[Tokenizer, Library, float, float, float]:
    """(our tokenizer, the library's, our seconds to read it, speed relative to the library, `with_strings`)."""
    ours, theirs = alternate(
        partial(timed, load_tokenizer, folder),
        partial(timed, Library.from_file, str(folder / "tokenizer.json")),
        ROUNDS,
    )
    our_s, their_s = [took for _, took in ours], [took for _, took in theirs]
    return ours[-1][0], theirs[-1][0], median(our_s), median_ratio(their_s, our_s), with_strings(folder)


def encode_all(encode: Callable[[str], list[int]], prompts: list[str]) -> None:
    """Encodes each prompt by itself."""
    for prompt in prompts:
        encode(prompt)


def main() -> None:
    """Prints a line for each figure, then JSON."""
    option_parser(__doc__).parse_args()
    ours, library, load_s, ratio, strings = with_o200k_files(loaded)
    print(f"load: {load_s:.2f} s, {ratio:.2f} times the speed of tokenizers; as strings {strings:.2f} of the time")

    def reference(prompt: str) -> list[int]:
        return library.encode(prompt, add_special_tokens=False).ids

    whole = text()
    ratios = {"ratio_load": round(ratio, 2), "ratio_load_strings": round(strings, 2)}
    same = ours.encode(whole) == reference(whole)
    for length in PROMPT_CHARS:
        prompts = [whole[at : at + length] for at in range(0, len(whole), length)]
        our_s, their_s = alternate(
            partial(seconds, encode_all, ours.encode, prompts), partial(seconds, encode_all, reference, prompts), ROUNDS
        )
        ratio = round(median_ratio(their_s, our_s), 2)
        speed = len(whole) / median(our_s) / 1e6
        print(f"prompts of {length:,} characters: {speed:.1f} M characters/s, {ratio} times the speed of tokenizers")
        ratios[f"ratio_{length}"] = ratio
    last_line("tokenizer", same_ids=same, load_s=round(load_s, 3), **ratios)


if __name__ == "__main__":
    main()
