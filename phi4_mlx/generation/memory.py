"""Memory plans: the bytes that a context takes and the longest one that fits, before anything is computed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from phi4_mlx.errors import RequestError
from phi4_mlx.models.attention import SLICE
from phi4_mlx.models.cache import CacheOptions, KVCache, buffer_length
from phi4_mlx.models.machine import memory_limit
from phi4_mlx.models.model import ContextCost, LanguageModel
from phi4_mlx.models.snapshot import MAX_SNAPSHOTS
from phi4_mlx.terminal.amount import amount, size

PREFILL_STEP_SIZE = 2048  # tokens a chunk; the hidden states of one chunk take about 100 MB in Phi-4-mini

# Caches that take less memory, as messages offer them -> their options.
SMALLER = {
    "--kv-bits 4 makes room for more": CacheOptions(None, kv_bits=4),
    "--max-kv-size drops the oldest": CacheOptions(None, max_kv_size=512),
}


def cache_bytes(cost: ContextCost, length: int, snapshots: int = MAX_SNAPSHOTS) -> int:
    """Bytes of the buffers of one sequence that hold `length` tokens and the next one, and of its snapshots."""
    return buffer_length(length) * cost.token_bytes + (1 + snapshots) * cost.fixed_bytes


@dataclass(frozen=True)
class ContextPlan:
    """The memory of a model with one context.

    Attributes:
        weights_bytes: of the model, with the adapters of its own.
        cost: bytes that the context takes.
        longest: the most tokens of the model's context.
        kept: the most tokens that the cache keeps between two chunks.
        limit_bytes: usable bytes of this machine.
        ways_out: those of `SMALLER` that the model supports, in words.
    """

    weights_bytes: int
    cost: ContextCost
    longest: int
    kept: int
    limit_bytes: int
    ways_out: tuple[str, ...] = tuple(SMALLER)

    def cache_bytes(self, length: int, chunk: int = PREFILL_STEP_SIZE) -> int:
        """Bytes of the buffers for `length` tokens put in by chunks; a bounded cache still holds a whole chunk."""
        return cache_bytes(self.cost, self._cached(length, chunk))

    def peak_bytes(self, length: int, chunk: int = PREFILL_STEP_SIZE) -> int:
        """Bytes at the peak of a prefill of `length` tokens in chunks."""
        new = min(length, chunk)
        cache = self.cache_bytes(length, chunk)
        growing = buffer_length(self._cached(length, chunk)) * self.cost.layer_bytes
        scores = min(new * length, SLICE) * self.cost.score_bytes
        activations = max(new * self.cost.activation_bytes + scores, self.cost.media_bytes)
        return self.weights_bytes + cache + growing + activations

    def _cached(self, length: int, chunk: int) -> int:
        """Tokens in the cache at the peak."""
        return min(length, max(self.kept, self.kept - KVCache.STEP + chunk))

    @property
    def most_tokens(self) -> int:
        """The longest context whose peak fits this machine; 0 if the weights alone do not."""
        low, high = 0, self.longest + 1  # `low` fits; `high` does not, or is past the context
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle) <= self.limit_bytes else (low, middle)
        return low


def plan_context(model: LanguageModel, kv_bits: int | None = None, max_kv_size: int | None = None) -> ContextPlan:
    """The memory plan of a model; reads no weights.

    Args:
        model: from `load`.
        kv_bits: as for `make_cache`.
        max_kv_size: as for `make_cache`.

    Raises:
        RequestError: as for `make_cache`.
    """
    model.layer_caches(CacheOptions(None, kv_bits, max_kv_size))  # raises for a cache that the model cannot keep
    ways_out = []
    for way_out, options in SMALLER.items():
        with contextlib.suppress(RequestError):
            model.layer_caches(options)
            ways_out.append(way_out)
    return ContextPlan(
        weights_bytes=model.weights_bytes + (sum(model.adapters.nbytes.values()) if model.adapters else 0),
        cost=model.context_cost(kv_bits),
        longest=model.config.max_position_embeddings,
        kept=max_kv_size or model.config.max_position_embeddings,
        limit_bytes=memory_limit(),
        ways_out=tuple(ways_out),
    )


def check_context(plan: ContextPlan, length: int, answer: int = 0) -> None:
    """Refuses a text that does not fit, before it has cost any time.

    Args:
        plan: the memory.
        length: tokens of the prompt.
        answer: the longest answer that was asked for, in tokens; 0 if it may be as long as fits.

    Raises:
        RequestError: the tokens need more memory than this machine allows; says how many would fit.
    """
    needed = plan.peak_bytes(length + answer)
    if needed > plan.limit_bytes:
        ways_out = [*(["lower max-tokens"] if answer else []), *plan.ways_out]
        way_out = ", ".join(ways_out) or "shorten it"
        answered = f" with an answer of {answer:,}" if answer else ""
        raise RequestError(
            f"a prompt of {amount(length, 'token')}{answered} takes {size(needed)}, and this machine allows "
            f"{size(plan.limit_bytes)}: {amount(plan.most_tokens, 'token')}; {way_out}"
        )


def room_for_rows(plan: ContextPlan, length: int) -> int:
    """Bytes for rows beside a prefill of `length` tokens: half of what is left, as they are copied while they move."""
    return max(0, plan.limit_bytes - plan.peak_bytes(length)) // 2
