"""Models of mlx-lm behind the contract of a model, so that they are evaluated as ours are.

mlx-lm's code computes the body and the head; the caches, and with them batches and shared beginnings, are ours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError, message_of
from phi4_mlx.evaluation.comparator_tokenizer import ComparatorTokenizer
from phi4_mlx.evaluation.sharing import join_group
from phi4_mlx.evaluation.subject import Subject, fingerprint
from phi4_mlx.files.json_file import JsonObject, read_json
from phi4_mlx.fingerprint import base_fingerprint
from phi4_mlx.hub import resolve
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions, KVCache, LayerCache
from phi4_mlx.models.model import ContextCost, LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.shared_stream import shared_stream


def load_comparator(name: str) -> Subject:
    """Loads a model that mlx-lm supports, to evaluate it beside ours.

    Args:
        name: a folder or a Hub id.

    Raises:
        CheckpointError: mlx-lm cannot load it.
        RequestError: its layers do not all keep keys and values, as those of recurrent models.
    """
    from mlx_lm import load

    folder = resolve(name)
    config = read_json(folder / "config.json")
    with shared_stream():
        try:
            model, tokenizer = load(str(folder))[:2]
        except Phi4Error:
            raise
        except Exception as error:  # mlx-lm has no class of its own
            raise CheckpointError(f"mlx-lm cannot load {name}: {message_of(error)}") from None
        return comparator(model, ComparatorTokenizer(tokenizer), name, config)


def comparator(inner: nn.Module, tokenizer: ComparatorTokenizer, name: str, config: JsonObject) -> Subject:
    """A model of mlx-lm as a subject.

    Args:
        inner: from `mlx_lm.load`.
        tokenizer: of the model.
        name: for tables and messages.
        config: its config.json.

    Raises:
        RequestError: its layers do not all keep keys and values.
    """
    model = MlxLmModel(inner, name, config)
    model.eval()
    parts = base_fingerprint(model), tokenizer.fingerprint()
    return Subject(model, tokenizer, name, fingerprint(*parts), tokenizer.start_id, join_group())


@dataclass(frozen=True)
class ComparatorConfig:
    """The fields of a config.json that every kind of config has."""

    raw: JsonObject
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    context_note: str = ""
    quantization: None = None

    @property
    def model_type(self) -> str:
        """mlx-lm's name of the kind of model."""
        return str(self.raw.get("model_type"))

    @property
    def tie_word_embeddings(self) -> bool:
        """True if the head is the embedding."""
        return bool(self.raw.get("tie_word_embeddings"))

    def to_dict(self) -> JsonObject:
        """The config as a config.json."""
        return dict(self.raw)


class MlxLmModel(LanguageModel):
    """A model of mlx-lm whose layers all keep keys and values; a window is a mask over all of them.

    Args:
        inner: the model: `model` is the body up to the last norm, and calling it applies the head.
        name: for messages.
        config: its config.json.

    Raises:
        RequestError: it is of another form.
    """

    def __init__(self, inner: nn.Module, name: str, config: JsonObject):
        super().__init__()
        self.inner = inner
        self._name = name
        self.recompute = False
        self._check()
        self._head_of = _Head(inner)
        probe = [KVCache() for _ in self.layers]
        hidden = inner.model(mx.array([[0]]), _views(probe, 0))
        logits = self._head_of(hidden)
        mx.eval(logits)
        self._dtype = hidden.dtype
        self._token_bytes = sum(int(array.nbytes) for layer in probe for array in layer.state)
        context = config.get("max_position_embeddings", 8192)
        self.config = ComparatorConfig(config, logits.shape[-1], hidden.shape[-1], len(self.layers), context)

    def _check(self) -> None:
        from mlx_lm.models import cache

        inner, known = self.inner, (cache.KVCache, cache.RotatingKVCache)
        if not hasattr(inner, "model") or not all(type(each) in known for each in cache.make_prompt_cache(inner)):
            raise RequestError(
                f"{self._name}: comparators are models of mlx-lm whose layers all keep keys and values, such as Llama, "
                "Qwen 2.5, Gemma 2 and Phi-3.5"
            )

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`; neither `embeddings` nor `segments` can be given."""
        assert embeddings is None and segments is None, "comparators are evaluated, not trained"
        if cache is None:
            cache = self.make_cache()
        cache.record(ids)
        started = None
        if isinstance(cache, BatchCache):
            shortest = cache.columns - max(cache.lengths)
            starts = [cache.columns - length for length in cache.lengths]
            if len({*starts}) > 1 or shortest:
                started = mx.array(starts).reshape(-1, *[1] * (self._mask_dims - 1))
        hidden: mx.array = self.inner.model(ids, _views(cache, cache.positions, started))
        return hidden if rows is None else hidden[:, -rows:]

    @cached_property
    def _mask_dims(self) -> int:
        """Dimensions of a mask that differs by row: some of mlx-lm's attentions add one for grouped heads.

        Raises:
            RequestError: rows of different lengths cannot be run together.
        """
        texts = [[1, 2, 3], [4]]
        caches = [self.make_cache() for _ in texts]
        for ids, cache in zip(texts, caches, strict=True):
            self.hidden(mx.array([ids]), cache)
        rows = self.make_batch_cache("short")
        rows.join(caches)
        starts = [rows.columns - length for length in rows.lengths]
        alone = mx.concatenate([self.hidden(mx.array([[5]]), cache) for cache in caches])
        errors = {}
        for dims in (4, 5):
            layers = [layer.fork(rows.columns) for layer in rows]
            started = mx.array(starts).reshape(-1, *[1] * (dims - 1))
            with contextlib.suppress(ValueError):  # shapes that cannot be broadcast
                together = self.inner.model(mx.array([[5], [5]]), _views(layers, rows.positions, started))
                errors[dims] = (mx.linalg.norm(together - alone) / mx.linalg.norm(alone)).item()
        best = min(errors, key=lambda dims: errors[dims], default=0)
        if best and errors[best] < 0.05:  # a wrong mask is off by more, and bfloat16 by less
            return best
        raise RequestError(f"{self._name}: mlx-lm does not run rows of different lengths of this model together")

    def logits(self, hidden: mx.array) -> mx.array:
        """See `LanguageModel.logits`."""
        return self._head_of(hidden)

    @property
    def head(self) -> nn.Module:
        """See `LanguageModel.head`."""
        head: nn.Module = self.inner.get("lm_head", self.inner["model"]["embed_tokens"])
        return head

    @property
    def layers(self) -> list[nn.Module]:
        """See `LanguageModel.layers`."""
        return list(self.inner.layers)

    @property
    def dtype(self) -> mx.Dtype:
        """See `LanguageModel.dtype`."""
        return self._dtype

    def layer_caches(self, options: CacheOptions) -> list[LayerCache]:
        """See `LanguageModel.layer_caches`."""
        if options.kv_bits is not None or options.max_kv_size is not None:
            raise RequestError("comparators keep all keys and values unquantised; leave out kv_bits and max_kv_size")
        return [KVCache() for _ in self.layers]

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """See `LanguageModel.context_cost`; an upper bound, with all scores in memory."""
        arrays = [array for _, array in tree_flatten(self.layers[0].parameters())]
        widest = max(int(array.shape[0]) for array in arrays)
        heads = max(1, self.config.hidden_size // 64)
        return ContextCost(
            token_bytes=self._token_bytes,
            layer_bytes=self._token_bytes // len(self.layers),
            fixed_bytes=0,
            activation_bytes=self._dtype.size * (4 * self.config.hidden_size + 4 * widest),
            score_bytes=4 * heads,
        )


class _Head:
    """The head of a model of mlx-lm: the model itself, over a body that passes hidden states through."""

    def __init__(self, inner: nn.Module):
        self._model = copy.copy(inner)
        self._model["model"] = _Through(inner.model)

    def __call__(self, hidden: mx.array) -> mx.array:
        *batch, D = hidden.shape
        logits: mx.array = self._model(hidden.reshape(1, -1, D))
        return logits.reshape(*batch, -1)


class _Through(nn.Module):
    """A body that returns its input; a tied head finds the embedding here."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.embed_tokens = body.embed_tokens

    def __call__(self, hidden: mx.array, *_: object, **__: object) -> mx.array:
        return hidden


class _View:
    """A layer's cache as mlx-lm's attention uses it.

    Args:
        layer: of keys and values.
        offset: position of the next token; of each row [B] where they differ.
        started: the column that each row starts at, [B, 1, ..]; None if all start at the first.
    """

    def __init__(self, layer: KVCache, offset: int | mx.array, started: mx.array | None):
        self.offset, self._started = offset, started
        self._layer = layer
        self.update_and_fetch = layer.update_and_fetch

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of the next N tokens, in mlx-lm's signature."""
        before = self._layer.offset
        windowed = window_size is not None and before + N > window_size
        if self._started is None and not windowed:
            return self._layer.make_mask(N, return_array and N > 1)
        columns, at = mx.arange(before + N), mx.arange(before, before + N)[:, None]
        mask = columns <= at
        if window_size is not None:
            mask = mask & (columns > at - window_size)
        return mask if self._started is None else mask & (columns >= self._started)


def _views(layers: Sequence[Any], offset: int | mx.array, started: mx.array | None = None) -> list[_View]:
    return [_View(layer, offset, started) for layer in layers]
