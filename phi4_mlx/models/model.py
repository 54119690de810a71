"""The contract of a model: everything that the rest of the package may ask of one.

A new model is one file that subclasses `LanguageModel`, or `CausalLM` if it is a decoder with a head; a config, a chat
format, and a line in `phi4_mlx.checkpoint.KINDS`. Generation, batching, serving, training and conversion then work with
it unchanged.

Shapes: B batch, T new tokens, S cached plus new, D hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.adapters.named import NamedAdapters
from phi4_mlx.config.fields import Config
from phi4_mlx.errors import RequestError
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions, LayerCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime, regime_of
from phi4_mlx.models.split_logits import LEAST, Logits
from phi4_mlx.tokens.prompt import READS_ONLY_TEXT, Medium, Place, places_of


@dataclass(frozen=True)
class ContextCost:
    """Bytes that a context takes, from which memory plans are made.

    Attributes:
        token_bytes: cached by each token, all layers together.
        layer_bytes: of those, cached by the largest layer; its old buffer stands beside the new one while it grows.
        fixed_bytes: cached whatever the length, such as recurrent states; each snapshot takes as many again.
        activation_bytes: activation memory of each prefilled token.
        score_bytes: attention scores of one (query, key) pair over all heads, where they are materialised; else 0.
        media_bytes: activation memory of reading a picture or a clip, before the tokens are prefilled.
        reads: times that a decode step reads `token_bytes` of each cached token; layers may share keys and values.
    """

    token_bytes: int
    layer_bytes: int
    fixed_bytes: int
    activation_bytes: int
    score_bytes: int
    media_bytes: int = 0
    reads: int = 1


class LanguageModel(nn.Module, ABC):
    """Token ids in, logits out.

    Attributes:
        config: the model's shapes.
        boundary: the longest sequence under the short RoPE table; None for a model with a single regime.
        lora_keys: the linear layers within a block that LoRA adapts by default, by their path.
        recompute: in training, keep only each block's input and run the block again in backward.
        adapters: those that a cache may name, mixed by row; None if the model does not mix.
        watch: called with each block and its output, which is not computed yet; training shows its progress by them.
    """

    config: Config
    boundary: int | None = None
    lora_keys: tuple[str, ...] = ()
    recompute: bool
    adapters: NamedAdapters | None = None
    watch: Callable[[nn.Module, mx.array], object] | None = None

    @abstractmethod
    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """Hidden states after the last norm, of ids that the cache has admitted.

        Args:
            ids: token ids [B, T], any integer dtype.
            cache: appended to; None for no cache.
            embeddings: [B, T, D], used in place of those of `ids`.
            segments: [B, T], without a cache: the number of the packed sample that each token belongs to. Samples do
                not see each other, and each starts at position 0.
            rows: compute only the last `rows` positions; None for all.

        Returns:
            [B, rows or T, D], in `dtype`.
        """

    @abstractmethod
    def logits(self, hidden: mx.array) -> mx.array:
        """The head: hidden states [..., D] -> logits [..., V]."""

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> Logits:
        """The logits that draws from the n rows of `hidden` [..., D] need: all [n, V], or those of a split head.

        Args:
            count: of the likeliest on each rank, where ranks split the head.
            temps: the temperature of each row, or one for all; 1 if empty.
        """
        return self.logits(hidden).flatten(0, -2)

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The module whose weights `logits` uses; the embedding where the two are tied."""

    @property
    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The blocks, from the first; mlx-lm's name."""

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """The dtype of hidden states, keys and values."""

    @abstractmethod
    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """An empty cache for each layer that has one.

        Raises:
            RequestError: the model cannot keep such a cache.
        """

    @abstractmethod
    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """Bytes that a context takes, with keys and values in `kv_bits` (None: unquantised)."""

    def __call__(
        self, ids: mx.array, cache: Sequence[LayerCache] | None = None, media: Sequence[Medium] = ()
    ) -> mx.array:
        """Logits of the next token at each position, exact at every length.

        Where the new tokens take a cached sequence past the RoPE boundary, the whole sequence runs again under the
        long table.

        The logits are computed when they are read, which must be in the thread of the call. Where other threads use the
        model too, hold `phi4_mlx.models.shared_stream.shared_stream()` around the call and the reading.

        Args:
            ids: token ids [B, T], any integer dtype, each below the vocabulary size.
            cache: from `make_cache`, or a list of mlx-lm's `KVCache`; it is appended to.
            media: those whose slots are among the ids, in order; B must be 1.

        Returns:
            Logits [B, T, V], in `dtype`.

        Raises:
            RequestError: a list of foreign caches would cross the RoPE boundary; the media do not fit the ids, or the
                model reads only text.
        """
        T = ids.shape[1]
        if cache is not None and not isinstance(cache, (PromptCache, BatchCache)):
            if media:
                raise RequestError("media need a cache that remembers them; make it with model.make_cache()")
            cache = PromptCache(cache, self.boundary)
        places = self.locate(ids, media, cache) if not isinstance(cache, BatchCache) else ()
        if places and cache is None:
            cache = self.make_cache()
        if isinstance(cache, PromptCache):
            ids = cache.admit(ids, places)
        return self.logits(self.hidden(ids, cache, rows=T))

    def locate(self, ids: mx.array, media: Sequence[Medium], cache: PromptCache | None) -> Sequence[Place]:
        """Finds the slots of media.

        Args:
            ids: token ids [B, T].
            media: in order.
            cache: of the tokens before them, which may end within a medium.

        Returns:
            The places of the media in `ids`.

        Raises:
            RequestError: the ids have more or fewer slots, or the model reads only text.
        """
        if media:
            raise RequestError(f"{len(media)} media are given, and this model {READS_ONLY_TEXT}")
        return ()

    def make_cache(
        self, regime: Regime | None = None, kv_bits: int | None = None, max_kv_size: int | None = None
    ) -> PromptCache:
        """An empty cache for one batch of sequences.

        Args:
            regime: "long" for a conversation that will outgrow the RoPE boundary anyway: it never runs again, but is
                not exact below the boundary. None chooses the table by the length, as the reference does.
            kv_bits: 4 or 8 quantises keys and values; None does not.
            max_kv_size: the most tokens to keep, at least 512; None keeps all.

        Raises:
            RequestError: a value is outside its range, or the model cannot keep such a cache.
        """
        options = CacheOptions(regime, kv_bits, max_kv_size)
        return PromptCache(self.layer_caches(options), self.boundary, options)

    def make_batch_cache(self, regime: Regime, kv_bits: int | None = None) -> BatchCache:
        """An empty cache for rows of several sequences, all under one RoPE table and with the same `kv_bits`."""
        return BatchCache(self.layer_caches(CacheOptions(regime, kv_bits)), regime)

    def regime(self, length: int) -> Regime:
        """The RoPE table that a sequence of `length` tokens needs."""
        return regime_of(length, self.boundary)

    def quantizable(self, path: str, module: nn.Module) -> bool:
        """True if the converter may quantise the module at `path`."""
        return hasattr(module, "to_quantized")

    def in_float32(self, name: str) -> bool:
        """True if the parameter of that name is written in float32 where the others are cast to another dtype."""
        return False

    def on_demand(self, name: str) -> bool:
        """True if the parameter of that name is read from the disk at its first use, not when the model is loaded."""
        return False

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(int(array.nbytes) for _, array in tree_flatten(self.parameters()))

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a decode step reads."""
        return self.weights_bytes

    @property
    def slot_ids(self) -> frozenset[int]:
        """The ids of slots of media; empty if the model reads only text."""
        return frozenset()

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises RequestError unless there are ids, or a `Prompt`, in the vocabulary, and only media that it reads."""
        _check_range(ids, self.config)
        self.check_media(ids)

    def check_media(self, ids: Sequence[int]) -> None:
        """Raises RequestError if ids have media that the model cannot read, or slots without media."""
        if places := places_of(ids):
            raise RequestError(f"the prompt has {places[0].medium.kind} input, and this model {READS_ONLY_TEXT}")


def _check_range(ids: Sequence[int], config: Config) -> None:
    """Refuses no ids, and those outside the vocabulary, which MLX would read past."""
    V, context = config.vocab_size, config.max_position_embeddings
    if not ids:
        raise RequestError(f"the prompt has 0 tokens; it needs at least 1, and the context holds {context}")
    if not (min(ids) >= 0 and max(ids) < V):
        outside = next(token for token in ids if not 0 <= token < V)
        raise RequestError(f"token {outside} of the prompt is outside the model's vocabulary of {V}")
