"""A decode step of 8 rows under four adapters and none, beside the base alone on the same rows.

    python tests/bench/mixed_adapters.py [--runs 21] [--width 768]

A decoder of two layers with Phi-4-mini's proportions, 4 bits, with the adapters of Phi-4-multimodal in proportion (8
bits, together 3/16 of the width) and a user's LoRA and DoRA of rank 8. CPU time of the process; the median of the
ratios of pairs. Bar: `ratio` at most 1.15. `text_rows_equal`: rows without an adapter are the base's to the bit. The
last line is JSON.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from harness import alternate, last_line, median_ratio, option_parser

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.adapters.layers import add_adapter, current_adapter
from phi4_mlx.adapters.quantized import quantized
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.text import Model

ROWS = ["vision", None, "speech", None, "lora", "vision", "dora", None]
PROMPT = 16


def base(width: int) -> Model:
    """A decoder of two layers."""
    model = Model(
        ModelConfig.from_dict({
            "model_type": "phi3", "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 2,
            "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 4096, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        })
    )  # fmt: skip
    return model.eval()


def adapter(width: int, rank: int, kind: str = "lora") -> Adapter:
    """An adapter that changes something."""
    model = base(width)
    add_adapter(model, rank=rank, kind=kind, scale=2.0)
    made = current_adapter(model, kind)
    draw = {
        name: 0.02 * mx.random.normal(array.shape) if name.endswith("lora_b") else array
        for name, array in made.tensors.items()
    }
    return Adapter(made.kind, made.scale, 0.0, draw, kind)


def filled(model: Model, names: list[str | None]) -> BatchCache:
    """A cache of a prompt a row, under these adapters."""
    batch, caches = model.make_batch_cache("short"), []
    for number, name in enumerate(names):
        caches.append(model.make_cache())
        caches[-1].adapter = name
        mx.eval(model(mx.full((1, PROMPT), number + 3), caches[-1]))
    batch.join(caches)
    return batch


def step(model: Model, cache: BatchCache) -> tuple[float, mx.array]:
    """CPU seconds of a step, and its logits."""
    start = time.process_time()
    logits = model(mx.full((len(ROWS), 1), 7), cache)
    mx.eval(logits)
    return time.process_time() - start, logits


def main() -> None:
    """Measures and prints."""
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--width", type=int, default=768)
    options: Any = parser.parse_args()
    width = options.width
    model = base(width)
    nn.quantize(model, 64 if width % 1536 == 0 else 32, 4)
    model.adapters.add("vision", quantized(adapter(width, width * 256 // 3072)))
    model.adapters.add("speech", quantized(adapter(width, width * 320 // 3072)))
    model.adapters.add("lora", adapter(width, 8))
    model.adapters.add("dora", adapter(width, 8, "dora"))
    mixed, alone = filled(model, ROWS), filled(model, [None] * len(ROWS))
    for cache in (mixed, alone):
        for _ in range(3):
            step(model, cache)
    ours, theirs = alternate(partial(step, model, mixed), partial(step, model, alone), options.runs)
    fresh = [step(model, filled(model, names))[1] for names in (ROWS, [None] * len(ROWS))]
    text = mx.array([number for number, name in enumerate(ROWS) if name is None])
    ratio = median_ratio([seconds for seconds, _ in ours], [seconds for seconds, _ in theirs])
    equal = mx.array_equal(fresh[0][text], fresh[1][text]).item()
    print(f"width {width}: a mixed step takes {ratio:.3f} of the base's CPU time")
    last_line("mixed_adapters", ratio=round(ratio, 3), text_rows_equal=equal, width=width, bar=1.15)


if __name__ == "__main__":
    main()
