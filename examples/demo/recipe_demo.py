"""The recipe of `demo`: corpus, tokenizer, and a model like Phi-4-mini; two streams run at once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import corpus
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from bpe import save_tokenizer, train_bpe
from cpu_math import cross_entropy, fast_cpu_math
from initialise import initialise
from mlx.utils import tree_flatten, tree_map

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer

SEED = 4
LEARNED_TOKENS = 1000  # 1,012 with the added tokens; the embedding has a few more rows, like Phi-4-mini's
ROTATING_PAIRS = 24  # of 32 pairs in a head
CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        # Fast pairs are unchanged; the slowest rotates as far in 4,096 tokens as it did in 256.
        "long_factor": [round(16 ** (max(0, pair - 7) / (ROTATING_PAIRS - 8)), 6) for pair in range(ROTATING_PAIRS)],
        "short_factor": [1.0] * ROTATING_PAIRS,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 1024,
}
BOUNDARY = CONFIG["original_max_position_embeddings"]
WIDTHS = (64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024)  # of batches; up to 256 use the short RoPE table
BATCH_TOKENS = 2048
WARMUP_STEPS = 50
PEAK_RATE = 2e-3
SETTLING_RATE = 5e-4
OTHER_TOKENS_WEIGHT = 0.15  # loss weight of tokens that are not the assistant's


@dataclass(frozen=True)
class Batch:
    """Rows of one width, padded on the right: ids [B, T + 1], and loss weights of the targets [B, T]."""

    ids: mx.array
    weights: mx.array


def corpus_texts() -> Iterator[str]:
    """Texts for learning the tokenizer's merges."""
    for talk in corpus.conversations(SEED, 6000, 50, 700):
        yield from (json.dumps(tool.declaration["function"]) for tool in talk.tools)
        for message in talk.messages:
            yield message["content"]
            yield from (json.dumps(call["function"]) for call in message.get("tool_calls", ()))


def encode(tokenizer: Tokenizer, talk: corpus.Dialogue) -> tuple[list[int], list[float]]:
    """(ids, loss weights) of a conversation; the assistant's tokens up to `<|end|>` have weight 1."""
    tools = [tool.declaration for tool in talk.tools]
    ids = tokenizer.apply_chat_template(talk.messages, tools=tools or None, add_generation_prompt=True)[:-1]
    assistant, end = (tokenizer.control_ids[text] for text in ("<|assistant|>", "<|end|>"))
    weights, speaking = [], False
    for token in ids:
        weights.append(1.0 if speaking else OTHER_TOKENS_WEIGHT)
        speaking = (speaking or token == assistant) and token != end
    return ids, weights


def batches(tokenizer: Tokenizer, seed: int, budget: dict[tuple[int, int], int]) -> list[Batch]:
    """Shuffled batches.

    Args:
        tokenizer: the demo's tokenizer.
        seed: the seed of the corpus and of the order.
        budget: (shortest, longest) conversation in characters -> approximate number of tokens.
    """
    rows: dict[int, list[tuple[list[int], list[float]]]] = {width: [] for width in WIDTHS}
    for (shortest, longest), tokens in budget.items():
        for talk in corpus.conversations(seed, 1_000_000, shortest, longest):
            ids, weights = encode(tokenizer, talk)
            width = next((width for width in WIDTHS if len(ids) - 1 <= width), None)
            if width is not None:
                rows[width].append((ids, weights))
                tokens -= width
            if tokens <= 0:
                break
    made = []
    for width, examples in rows.items():
        size = BATCH_TOKENS // width
        for start in range(0, len(examples) - size + 1, size):
            rows_ids, rows_weights = np.zeros((size, width + 1), np.int32), np.zeros((size, width + 1), np.float32)
            for row, (ids, weights) in enumerate(examples[start : start + size]):
                rows_ids[row, : len(ids)], rows_weights[row, : len(ids)] = ids, weights
            made.append(Batch(mx.array(rows_ids), mx.array(rows_weights[:, 1:])))
    random.Random(seed).shuffle(made)
    return made


def rounded(weight: mx.array) -> mx.array:
    """A matrix quantised to 4 bits and dequantised; vectors unchanged."""
    return mx.dequantize(*mx.quantize(weight)) if weight.ndim == 2 else weight


def make_step(model: Model, optimizer: optim.Optimizer, packed: bool) -> Callable[[Batch], mx.array]:
    """A function that does one update and returns the assistant's loss.

    The halves of a batch run in parallel on two streams. With `packed`, the loss is computed with 4-bit weights, and
    its gradient updates the unquantised ones.
    """
    streams = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]

    def loss(parameters: Any, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        each = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        return (each * weights).sum(), (each * (weights == 1)).sum()

    loss_and_grad = mx.value_and_grad(loss)

    @partial(mx.compile, inputs=[model.state, optimizer.state], outputs=[model.state, optimizer.state])
    def step(ids: mx.array, weights: mx.array) -> mx.array:
        parameters, half = model.trainable_parameters(), ids.shape[0] // 2
        seen = tree_map(rounded, parameters) if packed else parameters
        results = []
        for stream, rows in zip(streams, (slice(None, half), slice(half, None)), strict=True):
            with mx.stream(stream):
                results.append(loss_and_grad(seen, ids[rows], weights[rows]))
        grads = tree_map(lambda a, b: (a + b) / weights.sum(), results[0][1], results[1][1])
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        model.update(optimizer.apply_gradients(grads, parameters))
        return (results[0][0][1] + results[1][0][1]) / (weights == 1).sum()

    return lambda batch: step(batch.ids, batch.weights)


def train(model: Model, plan: list[Batch], peak_rate: float, packed: bool = False) -> None:
    """Trains on each batch of the plan once."""
    warm = optim.linear_schedule(peak_rate / 50, peak_rate, WARMUP_STEPS)
    cool = optim.cosine_decay(peak_rate, len(plan) - WARMUP_STEPS, peak_rate / 50)
    schedule = optim.join_schedules([warm, cool], [WARMUP_STEPS])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.02)
    optimizer.init(model.trainable_parameters())
    step = make_step(model, optimizer, packed)
    start, tokens, recent = time.perf_counter(), 0, []
    with fast_cpu_math():
        for number, batch in enumerate(plan, 1):
            value = step(batch)
            mx.eval(value, model.state, optimizer.state)
            tokens += batch.weights.size
            recent.append(value.item())
            if number % 50 == 0 or number == len(plan):
                seconds = time.perf_counter() - start
                print(
                    f"step {number}/{len(plan)}  loss {sum(recent) / len(recent):.3f}  {tokens / 1e6:.2f} M tokens  "
                    f"{tokens / seconds:.0f} tokens/s  {seconds / 60:.1f} min",
                    flush=True,
                )
                recent = []


# (shortest, longest) conversation in characters -> tokens, padding included. First short conversations only, then all
# lengths; last with weights rounded to 4 bits, so that quantisation does not cost accuracy.
FIRST = {(30, 480): 8_200_000}
THEN = {(30, 480): 3_000_000, (650, 2400): 2_200_000}
SETTLE = {(30, 480): 1_800_000, (650, 2400): 600_000}


def make_demo(folder: Path) -> tuple[Model, dict[str, Any]]:
    """Trains the tokenizer and the model.

    Args:
        folder: gets the files of the tokenizer.

    Returns:
        The model and its config.json.
    """
    mx.random.seed(SEED)
    start = time.perf_counter()
    save_tokenizer(train_bpe(corpus_texts(), LEARNED_TOKENS), folder, CONFIG["max_position_embeddings"])
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_format = CHAT_FORMATS["phi4-mini"]
    plan = batches(tokenizer, 1, FIRST) + batches(tokenizer, 2, THEN)
    model = Model(ModelConfig.from_dict(CONFIG))
    initialise(model, SEED, [tokenizer.decode([token]) for token in range(LEARNED_TOKENS)])
    count = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    print(f"{count:,} parameters, {len(plan)} batches, {time.perf_counter() - start:.0f} s so far", flush=True)
    train(model, plan, PEAK_RATE)
    train(model, batches(tokenizer, 3, SETTLE), SETTLING_RATE, packed=True)
    return model, CONFIG
