"""Phi-4-multimodal: the decoder of Phi-4-mini, whose sequence also has rows of pictures and sound.

A medium is a run of slots in the ids. Its tower and a projection turn it into one row a slot, which takes the place of
the slot's embedding. All kinds of media in a request together decide the adapter, for every token of it.

Shapes: B batch, T new tokens, D hidden, V vocabulary.

Source: `modeling_phi4_multimodal.py` in transformers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.config.multimodal import MultimodalConfig
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.lazy_arrays import unchanged
from phi4_mlx.models import text
from phi4_mlx.models.audio import WINDOW, AudioEmbedding
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import ContextCost
from phi4_mlx.models.multimodal_names import EXTEND
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.vision import CROPS, ImageEmbedding
from phi4_mlx.tokens.prompt import AbsentMedium, Kind, Medium, Mode, Place, Prompt, joined, places_of

if TYPE_CHECKING:
    from phi4_mlx.tokens.media.image import Image

MAX_ROWS = 32_768  # kept of media; 200 MB in the published model


class MediaEmbeddings(nn.Module):
    """Both towers with their projections, under the checkpoint's names."""

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.image_embed = ImageEmbedding(config.vision, config.hidden_size)
        self.audio_embed = AudioEmbedding(config.audio, config.hidden_size)


class _RowCache:
    """Rows of media [tokens, D] by digest and projection; the least recently used go first."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], mx.array] = OrderedDict()

    def get(self, key: tuple[str, str]) -> mx.array | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: tuple[str, str], rows: mx.array) -> None:
        self._rows[key] = rows
        while len(self._rows) > 1 and sum(map(len, self._rows.values())) > MAX_ROWS:
            self._rows.popitem(last=False)

    def clear(self) -> None:
        self._rows.clear()

    def __reduce__(self) -> tuple[object, ...]:
        return _RowCache, ()  # copies of the model start without rows


class Model(text.Model):
    """A phi3 decoder with its head, and the towers for pictures and sound."""

    config: MultimodalConfig

    def __init__(self, config: MultimodalConfig):
        super().__init__(config)
        self.model.embed_tokens_extend = MediaEmbeddings(config)
        self._row_cache = _RowCache()

    def update(self, parameters: Any, strict: bool = True) -> Model:
        """See `mlx.nn.Module.update`; rows of other weights are dropped."""
        self._row_cache.clear()
        return super().update(parameters, strict)  # type: ignore[no-any-return]

    @property
    def vision(self) -> ImageEmbedding:
        """The tower of pictures: (pixels [n, c, c, 3], mask [n, g, g]) -> [n, (g / 2) ** 2, width of the tower]."""
        return self._towers.image_embed

    @property
    def audio(self) -> AudioEmbedding:
        """The tower of sound: features [T, 80] -> [T / 8, width of the tower]."""
        return self._towers.audio_embed

    @property
    def _towers(self) -> MediaEmbeddings:
        towers: MediaEmbeddings = self.model.embed_tokens_extend
        return towers

    def encode(self, medium: Medium, mode: Mode | str) -> mx.array:
        """The rows of a picture or a clip.

        Args:
            medium: from `read_image` or `read_audio`.
            mode: of the request, which decides the projection of sound.

        Returns:
            [tokens, D], in `dtype`.

        Raises:
            RequestError: the picture was read for a model with other crops.
            CheckpointError: a tower, which is read at its first use, has changed on the disk.
        """
        if isinstance(medium, AbsentMedium):
            raise RequestError(
                f"the {medium.kind} of {medium.tokens} tokens with SHA-256 {medium.digest[:12]}... must be read again, "
                "and the prompt cache file has only its keys and values; give the prompt with its media"
            )
        if medium.kind == "image":
            self._check_crops(medium)
            self._read(self.vision)
            mask = medium.mask
            rows = self.vision.rows(self.vision(medium.pixels, mask), mask, medium.size)
        else:
            self._read(self.audio)
            rows = self.audio.rows(self.audio(medium.features), Mode(mode).projection)
        return rows.astype(self.dtype)

    def _read(self, tower: nn.Module) -> None:
        """Reads a tower from the disk, if it has not been used yet."""
        if not self.training:
            with unchanged("the weights of a tower"):
                mx.eval(tower.parameters())

    def _check_crops(self, image: Image) -> None:
        ours, theirs = self.config.vision, (image.crop_size, image.patch_size)
        if theirs != (ours.crop_size, ours.patch_size):
            raise RequestError(
                f"a picture was read with crop_size {theirs[0]} and patch_size {theirs[1]}; this model needs "
                f"{ours.crop_size} and {ours.patch_size}"
            )

    def _rows(self, medium: Medium, mode: Mode) -> mx.array:
        """`encode` of a medium, once."""
        if self.training:
            return self.encode(medium, mode)
        key = (medium.digest, mode.projection if medium.kind == "audio" else "")
        rows = self._row_cache.get(key)
        if rows is None:
            rows = self.encode(medium, mode)
            if not mx.isfinite(rows).all():
                raise CheckpointError(
                    f"the {medium.kind} tower computed NaN or infinity instead of rows; its weights are damaged, "
                    "download the checkpoint again"
                )
            self._row_cache.put(key, rows)
        return rows

    def hidden(
        self,
        ids: mx.array,
        cache: PromptCache | BatchCache | None = None,
        *,
        embeddings: mx.array | None = None,
        segments: mx.array | None = None,
        rows: int | None = None,
    ) -> mx.array:
        """See `LanguageModel.hidden`. The cache knows which of the ids are slots of its media."""
        if embeddings is None and isinstance(cache, PromptCache):
            places = cache.tokens.next_places(ids.shape[1])
            if places:
                embeddings = self._embeddings(ids, places, cache.mode)
        return super().hidden(ids, cache, embeddings=embeddings, segments=segments, rows=rows)

    def _embeddings(self, ids: mx.array, places: Sequence[Place], mode: Mode) -> mx.array:
        """The embeddings of ids [1, T], with rows of media in their places, [1, T, D]."""
        x = self.model.embed_tokens(ids)
        parts, end = [], 0
        for place in places:
            rows = self._rows(place.medium, mode)
            parts += [x[:, end : place.start], rows[None, place.skipped : place.skipped + place.count]]
            end = place.end
        return mx.concatenate([*parts, x[:, end:]], axis=1)

    def locate(self, ids: mx.array, media: Sequence[Medium], cache: PromptCache | None) -> list[Place]:
        """See `LanguageModel.locate`. Slots of a kind take its media in order; a chunk may end within a medium."""
        unfinished = cache.tokens.unfinished if cache is not None else None
        if not media and unfinished is None:
            return []
        if ids.shape[0] != 1:
            raise RequestError(f"media go with one sequence of ids, not with {ids.shape[0]}; call the model for each")
        numbers: list[int] = ids[0].tolist()
        if unfinished and media and media[0].digest == unfinished.medium.digest:
            slots = numbers.count(self._slot_tokens[media[0].kind])
            others = sum(medium.tokens for medium in media[1:] if medium.kind == media[0].kind)
            media = media[1:] if slots <= unfinished.count + others else media  # given again for its other slots
        given = [*([unfinished] if unfinished else []), *(Place(0, medium) for medium in media)]
        found: list[Place] = []
        for kind, token in self._slot_tokens.items():
            rows = [(each, n) for each in given if each.medium.kind == kind for n in range(each.count)]
            at = [position for position, number in enumerate(numbers) if number == token]
            cut = cache is not None and numbers[-1:] == [token]
            if len(at) > len(rows) or (len(at) < len(rows) and not cut and (media or at)):
                raise RequestError(
                    f"the ids have {len(at)} {kind} slots and the media take {len(rows)}; encode both as one prompt, "
                    "as tokenizer.apply_chat_template does"
                )
            found += [
                Place(position, each.medium, each.skipped + n, 1) for position, (each, n) in zip(at, rows, strict=False)
            ]
        return [*joined(sorted(found, key=lambda place: place.start))]

    @property
    def _slot_tokens(self) -> dict[Kind, int]:
        return {"image": self.config.vision.image_token_id, "audio": self.config.audio.audio_token_id}

    @property
    def slot_ids(self) -> frozenset[int]:
        """See `LanguageModel.slot_ids`."""
        return frozenset(self._slot_tokens.values())

    def check_media(self, ids: Sequence[int]) -> None:
        """See `LanguageModel.check_media`; a plain list has lost its media, while a `Prompt` may have drawn slots."""
        slots = () if isinstance(ids, Prompt) else self.slot_ids.intersection(ids)
        if slots:
            raise RequestError(
                f"the prompt has token {min(slots)}, a slot of a picture or a clip, without its media; pass on what "
                "tokenizer.apply_chat_template returns, which knows them"
            )
        for place in places_of(ids):
            if place.medium.kind == "image" and not isinstance(place.medium, AbsentMedium):
                self._check_crops(place.medium)

    def make_cache(
        self, regime: Regime | None = None, kv_bits: int | None = None, max_kv_size: int | None = None
    ) -> PromptCache:
        """See `LanguageModel.make_cache`."""
        cache = super().make_cache(regime, kv_bits, max_kv_size)
        cache.mode_adapters = frozenset(self.adapters.names)
        return cache

    def on_demand(self, name: str) -> bool:
        """See `LanguageModel.on_demand`: the towers, which text does not need."""
        return name.startswith(EXTEND)

    def context_cost(self, kv_bits: int | None = None) -> ContextCost:
        """See `LanguageModel.context_cost`."""
        vision, audio = self.config.vision, self.config.audio
        patches = vision.grid**2
        scores = vision.num_attention_heads * patches if mx.default_device() == mx.Device(mx.cpu) else 0
        image = CROPS * patches * (6 * vision.hidden_size + 2 * vision.intermediate_size + scores)
        bands = audio.input_size // 2  # behind the first convolution, the largest arrays of sound
        sound = 2 * WINDOW * audio.time_reduction // 2 * bands * audio.nemo_conv_channels
        return replace(super().context_cost(kv_bits), media_bytes=self.dtype.size * max(image, sound))
