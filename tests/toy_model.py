"""A second kind of model for tests: a gated linear recurrence whose cache cannot be trimmed, only restored.

h_t = a * h_(t-1) + W_in norm(x_t), and x_t becomes x_t + W_out silu(h_t). It implements the contract in
`phi4_mlx.models.model` and nothing else, so code that works with it does not depend on the kind of model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from phi4_mlx.checkpoint import KINDS, Kind
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import ContextCost, LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.tokens.chat_format import recognise
from tests.conftest import TOKENIZER


@dataclass(frozen=True)
class ToyConfig:
    hidden_size: int = 64
    vocab_size: int = 512
    max_position_embeddings: int = 1024
    num_hidden_layers: int = 2
    tie_word_embeddings: bool = True
    quantization: Mapping[str, Any] | None = None
    model_type: str = "toy"
    context_note = ""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ToyConfig:
        return cls(**{each.name: raw[each.name] for each in fields(cls) if each.name in raw})

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class RecurrentCache:
    """The state of one layer, [B, D], and the number of tokens in it."""

    rewindable = False
    state_names = ("state", "length")

    def __init__(self) -> None:
        self.h: mx.array | None = None
        self.offset = 0

    @property
    def state(self) -> Sequence[mx.array]:
        return [] if self.h is None else [self.h, mx.array([self.offset])]

    @state.setter
    def state(self, state: Sequence[mx.array]) -> None:
        self.h, self.offset = (state[0], int(state[1].item())) if len(state) else (None, 0)

    @property
    def nbytes(self) -> int:
        return 0 if self.h is None else self.h.nbytes

    def is_trimmable(self) -> bool:
        return False

    def can_trim(self, n: int) -> bool:
        return False

    def trim(self, n: int) -> int:
        if n < self.offset:
            return 0
        n, self.h, self.offset = self.offset, None, 0
        return n

    def make_mask(self, N: int) -> None:
        return None

    def fork(self, length: int) -> RecurrentCache:
        assert length == self.offset
        twin = RecurrentCache()
        twin.h, twin.offset = self.h, self.offset
        return twin

    def compact(self) -> None:
        self.h = None if self.h is None else mx.contiguous(self.h)

    def snapshot(self) -> tuple[mx.array | None, int]:
        return self.h, self.offset

    def restore(self, snapshot: tuple[mx.array | None, int]) -> None:
        self.h, self.offset = snapshot

    def kept(self, length: int) -> int:
        return 1

    def join(self, members: Sequence[RecurrentCache], columns: int) -> None:
        self.h, self.offset = mx.concatenate([member.h for member in members]), columns

    def keep(self, rows: Sequence[int], start: int) -> None:
        assert self.h is not None
        self.h, self.offset = (self.h[mx.array(rows)], self.offset - start) if rows else (None, 0)

    def row(self, number: int, start: int) -> Sequence[mx.array]:
        assert self.h is not None
        return [self.h[number : number + 1], mx.array([self.offset - start])]


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        D = config.hidden_size
        self.norm = nn.RMSNorm(D)
        self.decay = mx.zeros((D,))
        self.in_proj, self.out_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)

    def __call__(self, x: mx.array, cache: RecurrentCache | None, starts: mx.array | None) -> mx.array:
        inputs, a = self.in_proj(self.norm(x)), mx.sigmoid(self.decay)  # [B, T, D]
        h = mx.zeros_like(inputs[:, 0]) if cache is None or cache.h is None else cache.h
        states = []
        for t in range(x.shape[1]):
            h = (h if starts is None else mx.where(starts[:, t : t + 1], 0, h)) * a + inputs[:, t]
            states.append(h)
        if cache is not None:
            cache.h, cache.offset = h, cache.offset + x.shape[1]
        return x + self.out_proj(nn.silu(mx.stack(states, axis=1)))


class ToyDecoder(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [ToyLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size)


class ToyModel(LanguageModel):
    lora_keys = ("in_proj", "out_proj")

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config, self.recompute = config, False
        self.model = ToyDecoder(config)

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        if cache is not None:
            cache.record(ids)
        x = self.model.embed_tokens(ids) if embeddings is None else embeddings
        starts = None
        if segments is not None:
            starts = mx.concatenate([mx.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1) > 0
        for layer, layer_cache in zip(self.model.layers, cache or [None] * len(self.layers), strict=True):
            run = nn.utils.checkpoint(layer) if self.recompute and self.training else layer
            x = run(x, layer_cache, starts)
        return self.model.norm(x if rows is None else x[:, -rows:])

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.embed_tokens.as_linear(hidden)

    @property
    def head(self) -> nn.Module:
        return self.model.embed_tokens

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    @property
    def dtype(self) -> mx.Dtype:
        return self.model.norm.weight.dtype

    def layer_caches(self, options: CacheOptions) -> list[Any]:
        return [RecurrentCache() for _ in self.layers]

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        state = self.config.hidden_size * self.dtype.size
        return ContextCost(0, 0, state * self.config.num_hidden_layers, 4 * state, 0)


TOY = Kind(ToyConfig.from_dict, ToyModel, recognise)


def make_toy_model(seed: int = 0) -> ToyModel:
    """A toy model whose logits have unit scale and depend on every token before."""
    model = ToyModel(ToyConfig())
    keys = iter(mx.random.split(mx.random.key(seed), 100))

    def draw(path: str, old: mx.array) -> mx.array:
        if old.ndim == 1:
            return (3.0 if "decay" in path else 1.0) + 0.1 * mx.random.normal(old.shape, key=next(keys))
        return (2.0 if "proj" in path else 1.0) * old.shape[1] ** -0.5 * mx.random.normal(old.shape, key=next(keys))

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def write_toy_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes the toy model as a folder; loading it needs `register_toy`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_toy_model(seed)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def register_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the toy to the table of model kinds for one test."""
    monkeypatch.setitem(KINDS, "toy", TOY)
