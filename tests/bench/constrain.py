"""What an answer that is held to a schema costs at the true vocabulary of 200,064: the mask, the schema, the tokenizer.

    python tests/bench/constrain.py

Each schema is answered at random, with a limit of tokens, so that finding a way to the end is part of the time. Last
line: JSON; the bar is a median mask under 1 ms.
"""

from __future__ import annotations

import json
import random
import runpy
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import mlx.core as mx
import numpy as np

from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema, regex, tool_calls
from phi4_mlx.grammar.vocabulary import vocabulary_of
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
V, MAX_TOKENS, ANSWERS = 200_064, 256, 5
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "mail": {"type": "string", "format": "email"},
        "price": {"type": "number", "exclusiveMinimum": 0},
        "kind": {"enum": ["fruit", "vegetable", "nut"]},
        "when": {"type": "string", "format": "date-time"},
    },
    "required": ["name", "price", "kind"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "item": lambda: json_schema(ITEM),
    "list": lambda: json_schema({"type": "array", "items": ITEM}),
    "tree": lambda: json_schema(
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}}}}
    ),
    "wide": lambda: json_schema({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(400)}}),
    "any": lambda: json_schema(True),
    "pattern": lambda: regex(r"(\w+ ){3,20}\w+\."),
    "tools": lambda: tool_calls([{"name": f"tool_{n}", "parameters": ITEM} for n in range(20)], "required"),
    "text or tools": lambda: tool_calls([{"name": f"tool_{n}", "parameters": ITEM} for n in range(20)]),
}


def answer(constraint: Constraint, dice: random.Random, masks: list[float], takes: list[float]) -> int:
    """Draws one answer evenly from the masks; returns how many tokens it has, the forced ones included."""
    tokens = 0
    while tokens < MAX_TOKENS and not constraint.done:
        start = time.perf_counter()
        mask = constraint.mask()
        mx.eval(mask)
        masks.append(time.perf_counter() - start)
        token = int(dice.choice(np.flatnonzero(np.array(mask)).tolist()))
        start = time.perf_counter()
        forced = constraint.accept(token)
        takes.append(time.perf_counter() - start)
        tokens += 0 if forced is None else 1 + len(forced)
    return tokens


def prepared() -> tuple[Tokenizer, float]:
    """The true tokenizer, and the seconds that llguidance's copy of it takes."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer(runpy.run_path(str(ROOT / "tests" / "data" / "o200k.py"))["write"](Path(name)))
    start = time.perf_counter()
    vocabulary_of(tokenizer)
    return tokenizer, time.perf_counter() - start


def main() -> None:
    """Prints a line a grammar, then JSON."""
    tokenizer, build_s = prepared()
    print(f"tokenizer: {build_s:.2f} s, once")
    all_masks, all_takes, compiles = list[float](), list[float](), list[float]()
    for name, make in SCHEMAS.items():
        masks, takes, drawn = list[float](), list[float](), 0
        for seed in range(ANSWERS):
            start = time.perf_counter()
            constraint = Constraint(make(), tokenizer, V, MAX_TOKENS)
            compiles.append(time.perf_counter() - start)
            drawn += answer(constraint, random.Random(seed), masks, takes)
        compile_ms = 1e3 * median(compiles[-ANSWERS:])
        print(
            f"{name}: {drawn} tokens in {len(masks)} steps; mask {1e3 * median(masks):.3f} ms, accept "
            f"{1e3 * median(takes):.3f} ms (most {1e3 * max(takes):.1f}), compile {compile_ms:.1f} ms"
        )
        all_masks, all_takes = all_masks + masks, all_takes + takes
    result = {
        "bench": "constrain",
        "mask_ms": round(1e3 * median(all_masks), 3),
        "mask_p99_ms": round(1e3 * quantiles(all_masks, n=100)[-1], 3),
        "accept_ms": round(1e3 * median(all_takes), 3),
        "accept_p99_ms": round(1e3 * quantiles(all_takes, n=100)[-1], 3),
        "compile_ms": round(1e3 * median(compiles), 1),
        "tokenizer_s": round(build_s, 2),
        "bar_ms": 1.0,
    }
    print(json.dumps(result | {"met": result["mask_ms"] < result["bar_ms"]}))


if __name__ == "__main__":
    main()
