"""The vision tower of Phi-4-multimodal: SigLIP in NaViT's form, over crops of a picture, and its projection.

A crop is cut into patches; masked patches, which only pad, are seen by no query but have outputs of their own. The
features are the output of all encoder layers except the last, pooled 2 by 2. The rows of a picture are its crops put
together, a separator after each line, then a separator and the global view; an MLP brings them to the decoder's width.

Shapes: n crops with the global view first, c pixels and g patches of a crop's side, P = g * g, D width of the tower.

Source: `modeling_phi4_multimodal.py` in transformers; SigLIP (arXiv 2303.15343), NaViT (arXiv 2307.06304).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.config.multimodal import VisionConfig
from phi4_mlx.models.fused import LayerNorm
from phi4_mlx.models.padded import PaddedLinear, attention

if TYPE_CHECKING:
    import numpy as np

CROPS = 4  # processed together: 37 at once would take gigabytes


class PatchEmbedding(nn.Module):
    """A linear map of patches; its weight has the layout of a convolution, [D, 3, p, p]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        p = config.patch_size
        self.weight = mx.random.normal((config.hidden_size, 3, p, p)) * (3 * p * p) ** -0.5
        self.bias = mx.zeros(config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Pixels [n, c, c, 3] -> [n, P, D]."""
        D, _, p, _ = self.weight.shape
        n, c, _, _ = pixels.shape
        g = c // p
        patches = pixels.reshape(n, g, p, g, p, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, g * g, 3 * p * p)
        return patches @ self.weight.reshape(D, -1).T + self.bias


class PositionTable(nn.Module):
    """Learned positions, [P, D]."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = mx.random.normal((rows, width)) * width**-0.5


class Embeddings(nn.Module):
    """Patches and their positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = PositionTable(config.grid**2, config.hidden_size)

    def __call__(self, pixels: mx.array, mask: np.ndarray) -> mx.array:
        """Pixels [n, c, c, 3] and mask [n, g, g] -> [n, P, D]."""
        positions = mx.array(position_ids(mask))
        return self.patch_embedding(pixels) + self.position_embedding.weight[positions]


class Attention(nn.Module):
    """Multi-head attention of every patch to every patch that is not masked."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            PaddedLinear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        n, P, D = x.shape
        heads = [
            project(x).reshape(n, P, self.num_heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        ]
        queries, keys, values = heads  # [n, H, P, Dh]
        return self.out_proj(attention(queries, keys, values, mask).transpose(0, 2, 1, 3).reshape(n, P, D))


class MLP(nn.Module):
    """Two linear layers around GELU in its tanh form."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = PaddedLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = PaddedLinear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_approx(self.fc1(x)))


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The encoder layers that are computed; the checkpoint's last one is not."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.used_layers)]


class ImageProcessor(nn.Module):
    """SigLIP without its last layer, its last norm and its pooling head."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def __call__(self, pixels: mx.array, mask: np.ndarray) -> mx.array:
        """Pixels [n, c, c, 3] and mask [n, g, g] -> [n, P, D]."""
        x = self.embeddings(pixels, mask)
        seen = None if mask.all() else mx.array(mask.reshape(len(mask), 1, 1, -1))
        for layer in self.encoder.layers:
            x = layer(x, seen)
        return x


class ImageEmbedding(nn.Module):
    """The tower, and its projection to the decoder.

    Args:
        config: the tower's shapes.
        hidden_size: the decoder's width.
    """

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.img_processor = ImageProcessor(config)
        self.global_img_feature_extensor = mx.zeros((1, 1, config.hidden_size))
        self.sub_img_feature_extensor = mx.zeros((1, 1, 1, config.hidden_size))
        self.img_projection_up = PaddedLinear(config.hidden_size, hidden_size)
        self.img_projection_down = PaddedLinear(hidden_size, hidden_size)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the tower computes in."""
        return self.global_img_feature_extensor.dtype

    def __call__(self, pixels: np.ndarray | mx.array, mask: np.ndarray | mx.array) -> mx.array:
        """Features of crops, `CROPS` at a time.

        Args:
            pixels: [n, c, c, 3], from -1 to 1, any floating dtype.
            mask: bool [n, g, g], False for patches that only pad.

        Returns:
            [n, (g / 2) ** 2, D], in `dtype`.
        """
        import numpy as np

        seen = np.array(mask, bool)
        features = []
        for first in range(0, len(seen), CROPS):
            part = mx.array(pixels[first : first + CROPS]).astype(self.dtype)
            x = self.img_processor(part, seen[first : first + CROPS])
            n, half = len(x), self.config.grid // 2
            features.append(x.reshape(n, half, 2, half, 2, -1).mean(axis=(2, 4)).reshape(n, half * half, -1))
            if len(seen) > CROPS:
                mx.eval(features[-1])
        return features[0] if len(features) == 1 else mx.concatenate(features)

    def rows(self, features: mx.array, mask: np.ndarray | mx.array, size: tuple[int, int]) -> mx.array:
        """The rows of a picture in the decoder's sequence.

        Args:
            features: [n, (g / 2) ** 2, D], as the tower returns them.
            mask: bool [n, g, g].
            size: (height, width) of the padded picture, multiples of the crop's side.

        Returns:
            [N, hidden_size]: lines of the crops, a separator, lines of the global view.
        """
        import numpy as np

        crop_size, half = self.config.crop_size, self.config.grid // 2
        down, across = size[0] // crop_size, size[1] // crop_size
        seen = np.array(mask, bool)[1 : 1 + down * across, ::2, ::2]
        seen = seen.reshape(down, across, half, half).swapaxes(1, 2).reshape(down * half, across * half)
        height, width = int(seen[:, 0].sum()), int(seen[0].sum())
        crops = features[1 : 1 + down * across].reshape(down, across, half, half, -1).swapaxes(1, 2)
        crops = crops.reshape(down * half, across * half, -1)[:height, :width]
        whole = features[0].reshape(half, half, -1)
        rows = [self._lines(crops), self.global_img_feature_extensor[0], self._lines(whole)]
        return self.img_projection_down(nn.gelu(self.img_projection_up(mx.concatenate(rows))))

    def _lines(self, features: mx.array) -> mx.array:
        """[height, width, D] -> [height * (width + 1), D], a separator after each line."""
        height, _, D = features.shape
        separator = mx.broadcast_to(self.sub_img_feature_extensor[0], (height, 1, D))
        return mx.concatenate([features, separator], axis=1).reshape(-1, D)


def position_ids(mask: np.ndarray) -> np.ndarray:
    """The position of each patch: its place among the patches that are not masked, stretched over the whole grid.

    Args:
        mask: bool [n, g, g].

    Returns:
        int64 [n, g * g]; 0 for masked patches.

    Source: NaViT, section 2.1, as `Phi4MultimodalVisionEmbeddings` has it.
    """
    import numpy as np

    g = mask.shape[1]
    at = np.arange(g)
    down, across = (
        np.minimum(at * g // np.maximum(count, 1)[:, None], g - 1)
        for count in (mask[:, :, 0].sum(1), mask[:, 0].sum(1))
    )
    ids: np.ndarray = np.where(mask, down[:, :, None] * g + across[:, None, :], 0).reshape(len(mask), -1)
    return ids
