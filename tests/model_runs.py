"""Prompts, filled caches, decoded tokens and peak memory: what the tests of models and of generation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache


def random_ids(n: int, seed: int = 0, B: int = 1) -> mx.array:
    """Random token ids of the tiny models, [B, n]."""
    return mx.random.randint(0, 512, (B, n), key=mx.random.key(seed))


def filled_cache(model: LanguageModel, ids: mx.array, **options: Any) -> PromptCache:
    """A cache of the ids [B, S]; `options` as of `make_cache`."""
    cache = model.make_cache(**options)
    mx.eval(model(ids, cache))
    return cache


def decoded(model: LanguageModel, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """The tokens that `generate_step` yields."""
    return [token for token, _ in generate_step(prompt, model, max_tokens=max_tokens, **options)]


def greedy_without_cache(model: LanguageModel, prompt: list[int], n: int) -> list[int]:
    """The likeliest tokens, each from a pass over the whole sequence."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(mx.array([ids]))[0, -1].argmax().item()))
    return ids[len(prompt) :]


def close(a: mx.array, b: mx.array, atol: float = 1e-4) -> bool:
    """True if logits of the tiny models are equal up to the order of their fp32 sums."""
    return bool(mx.allclose(a, b, rtol=0, atol=atol))


def peak_memory(compute: Callable[[], mx.array]) -> int:
    """The peak of MLX's memory in bytes during a computation, with everything that is alive already."""
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(compute())
    return mx.get_peak_memory()
