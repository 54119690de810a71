"""What a context costs in bytes, and how much of one this machine allows: worked out before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.errors import RequestError
from phi4_mlx.models.attention import BLOCK, SLICE
from phi4_mlx.models.cache import KVCache, buffer_length, group_size
from phi4_mlx.models.text import Model

PREFILL_STEP_SIZE = 2048  # tokens a chunk; hidden states of one chunk take about 100 MB in Phi-4-mini


def memory_limit() -> int:
    """Bytes that may be taken: what Metal recommends, or else the machine's memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kv_bytes(model: Model, kv_bits: int | None = None) -> int:
    """Bytes of the keys and values of one token.

    Args:
        model: what `load` returned.
        kv_bits: as `make_cache` takes it.
    """
    config, itemsize = model.config, model.model.norm.weight.dtype.size
    head = config.head_dim * itemsize
    if kv_bits is not None:  # and a scale and a bias for each group
        head = config.head_dim * kv_bits // 8 + 2 * itemsize * config.head_dim // group_size(config.head_dim)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head


@dataclass(frozen=True)
class ContextPlan:
    """What a model and its cache take.

    Attributes:
        weights_bytes: of the model.
        token_bytes: of the keys and values of one token.
        layer_bytes: of those, in one layer: while its buffers grow, the old ones stand beside the new.
        work_bytes: of what a chunk of a prefill has in memory besides, for each of its tokens.
        score_bytes: of the scores of all heads for a pair of tokens, where they are made: on a CPU.
        longest: tokens that the model's context holds.
        held: tokens that the cache holds at most, between two chunks.
        limit_bytes: what this machine allows.
    """

    weights_bytes: int
    token_bytes: int
    layer_bytes: int
    work_bytes: int
    score_bytes: int
    longest: int
    held: int
    limit_bytes: int

    def cache_bytes(self, length: int, chunk: int = PREFILL_STEP_SIZE) -> int:
        """Bytes of the buffers for so many tokens, put in in chunks; a cache that forgets still holds all of one."""
        return buffer_length(min(length, max(self.held, self.held - KVCache.STEP + chunk))) * self.token_bytes

    def peak_bytes(self, length: int, chunk: int = PREFILL_STEP_SIZE) -> int:
        """Bytes at the peak of a prefill of so many tokens, in chunks."""
        new, cache = min(length, chunk), self.cache_bytes(length, chunk)
        growing = cache * self.layer_bytes // self.token_bytes
        scores = min(new * length, SLICE) * self.score_bytes
        return self.weights_bytes + cache + growing + new * self.work_bytes + scores

    @property
    def most_tokens(self) -> int:
        """The longest context whose peak is within what this machine allows; 0 if the weights alone are not."""
        low, high = 0, self.longest + 1  # the peak of `low` is within it, that of `high` is not or is nobody's
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle) <= self.limit_bytes else (low, middle)
        return low


def plan_context(model: Model, kv_bits: int | None = None, max_kv_size: int | None = None) -> ContextPlan:
    """The plan of a model; nothing of it is read for that.

    Args:
        model: what `load` returned.
        kv_bits: as `make_cache` takes it.
        max_kv_size: likewise.
    """
    config, itemsize = model.config, model.model.norm.weight.dtype.size
    heads = config.num_attention_heads * config.head_dim
    width = heads + 2 * config.num_key_value_heads * config.head_dim
    work = itemsize * (2 * config.hidden_size + max(3 * width, 3 * config.intermediate_size))
    if kv_bits is not None:  # in float32: queries, what they saw, and two blocks of scores
        work += 4 * (3 * heads + 2 * config.num_attention_heads * BLOCK)
    dense = kv_bits is None and mx.default_device() == mx.Device(mx.cpu)
    token_bytes = kv_bytes(model, kv_bits)
    return ContextPlan(
        weights_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        token_bytes=token_bytes,
        layer_bytes=token_bytes // config.num_hidden_layers,
        work_bytes=work,
        score_bytes=itemsize * config.num_attention_heads if dense else 0,
        longest=config.max_position_embeddings,
        held=max_kv_size or config.max_position_embeddings,
        limit_bytes=memory_limit(),
    )


def check_context(plan: ContextPlan, length: int) -> None:
    """Refuses a text that cannot fit, before it has cost any time.

    Raises:
        RequestError: it needs more memory than this machine allows; says how much would fit.
    """
    needed = plan.peak_bytes(length)
    if needed > plan.limit_bytes:
        raise RequestError(
            f"{length:,} tokens need {needed / 1e9:.1f} GB, and this machine allows {plan.limit_bytes / 1e9:.1f} GB: "
            f"{plan.most_tokens:,} tokens; --kv-bits 4 makes room for more, --max-kv-size forgets the oldest"
        )
