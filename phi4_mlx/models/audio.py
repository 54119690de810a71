"""The audio tower of Phi-4-multimodal: a conformer over log-mel frames, and its two projections.

Three convolutions of stride 2 turn eight frames into a token. Conformer blocks follow, with a relative bias on the
attention. Sound longer than `WINDOW` tokens is cut into windows that do not see each other, the last one filled with
zeros that it does see. Each window passes through everything before the next one, so memory does not grow with length.

Shapes: B clips of one length, T frames, F bands, t tokens, D width of the tower, C channels of the front end.

Source: `modeling_phi4_multimodal.py` in transformers; Conformer (arXiv 2005.08100).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.config.multimodal import AudioConfig
from phi4_mlx.models.fused import LayerNorm
from phi4_mlx.models.padded import PaddedLinear, attention

if TYPE_CHECKING:
    import numpy as np

WINDOW = 500  # tokens that see each other


class MeanVarianceNorm(nn.Module):
    """Normalisation of each band by statistics of the training data, which are never trained."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.global_mean = mx.zeros(config.input_size)
        self.global_invstd = mx.ones(config.input_size)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return (x - self.global_mean) * self.global_invstd


class StridedConv(nn.Module):
    """A 3 x 3 convolution of stride 2 over one channel each, [C, 1, 3, 3]; the input has one channel or all."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.random.normal((channels, 1, 3, 3)) / 3
        self.bias = mx.zeros(channels)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, F, 1 or C] -> [B, T / 2, F / 2, C], halves rounded up."""
        weight = self.weight.transpose(0, 2, 3, 1)
        return mx.conv2d(x, weight, stride=2, padding=1, groups=x.shape[-1]) + self.bias


class Subsampling(nn.Module):
    """The front end: frames -> tokens."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        C = config.nemo_conv_channels
        self.conv = [StridedConv(C), nn.ReLU()]
        for _ in range(config.reductions - 1):
            self.conv += [StridedConv(C), PaddedLinear(C, C), nn.ReLU()]
        self.out = PaddedLinear(C * config.reduced_bands, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, F] -> [B, t, D]."""
        x = x[..., None]
        for layer in self.conv:
            x = layer(x)
        B, t, _, _ = x.shape  # [B, t, F / 8, C]
        return self.out(x.swapaxes(2, 3).reshape(B, t, -1))


class BiasTable(nn.Module):
    """The bias of each distance for each head, [2 * bias_max_distance, H]."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.weight = mx.zeros((2 * config.bias_max_distance, config.num_attention_heads))


class RelativeBias(nn.Module):
    """A bias on attention scores by the distance of key and query, constant beyond the largest one.

    Source: T5 (arXiv 1910.10683), section 2.1, with one bucket a distance.
    """

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.bias_values = BiasTable(config)

    def __call__(self, t: int) -> mx.array:
        """The bias of t tokens, [1, H, t, t]."""
        table = self.bias_values.weight
        most = len(table) // 2
        at = mx.arange(t)
        distance = mx.clip(at[None, :] - at[:, None], -most, most - 1)
        return table[distance + most].transpose(2, 0, 1)[None]


class FeedForward(nn.Module):
    """down(up * silu(gate)) of the normalised input; up before gate in the fused projection."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.layer_norm = LayerNorm(config.hidden_size)
        self.gate_up_proj = PaddedLinear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = PaddedLinear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        up, gate = mx.split(self.gate_up_proj(self.layer_norm(x)), 2, axis=-1)
        return self.down_proj(up * nn.silu(gate))


class Attention(nn.Module):
    """Multi-head attention with a relative bias."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            PaddedLinear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        B, t, D = x.shape
        heads = [
            project(x).reshape(B, t, self.num_heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        ]
        queries, keys, values = heads  # [B, H, t, Dh]
        return self.o_proj(attention(queries, keys, values, bias).transpose(0, 2, 1, 3).reshape(B, t, D))


class GatedConv(nn.Module):
    """(a + b1) * silu(g + b2) of the two halves of a pointwise convolution."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        D = config.hidden_size
        self.ext_pw_conv_1d = PaddedLinear(D, 2 * D)
        self.b1, self.b2 = mx.zeros((1, D, 1)), mx.zeros((1, D, 1))

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.ext_pw_conv_1d(x), 2, axis=-1)
        return (value + self.b1[..., 0]) * nn.silu(gate + self.b2[..., 0])


class CausalConv(nn.Module):
    """A depthwise convolution in time that sees no later token, [D, 1, taps]."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.weight = mx.random.normal((config.hidden_size, 1, config.kernel_size)) * config.kernel_size**-0.5
        self.bias = mx.zeros(config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, t, D] -> [B, t, D]."""
        D, _, taps = self.weight.shape
        x = mx.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])
        return mx.conv1d(x, self.weight.swapaxes(1, 2), groups=D) + self.bias


class SeparableConv(nn.Module):
    """A depthwise convolution, then a pointwise one."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.dw_conv = CausalConv(config)
        self.pw_conv = PaddedLinear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.pw_conv(self.dw_conv(x))


class Convolution(nn.Module):
    """The convolution module of a conformer block."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.layer_norm = LayerNorm(config.hidden_size)
        self.glu = GatedConv(config)
        self.dw_sep_conv_1d = SeparableConv(config)
        self.ext_pw_conv_1d = PaddedLinear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.ext_pw_conv_1d(nn.silu(self.dw_sep_conv_1d(self.glu(self.layer_norm(x)))))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each added to its input; then a norm."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.feed_forward_in = FeedForward(config)
        self.layer_norm_att = LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.conv = Convolution(config)
        self.feed_forward_out = FeedForward(config)
        self.layer_norm = LayerNorm(config.hidden_size)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        x = x + 0.5 * self.feed_forward_in(x)
        x = x + self.self_attn(self.layer_norm_att(x), bias)
        x = x + self.conv(x)
        x = x + 0.5 * self.feed_forward_out(x)
        return self.layer_norm(x)


class AudioEncoder(nn.Module):
    """Log-mel frames -> tokens of the tower's width."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.reduction = config.time_reduction
        self.encoder_embedding = MeanVarianceNorm(config)
        self.embed = Subsampling(config)
        self.relative_attention_bias_layer = RelativeBias(config)
        self.encoders = [ConformerBlock(config) for _ in range(config.num_blocks)]

    def __call__(self, features: mx.array) -> mx.array:
        """[B, T, F] -> [B, t, D], window by window."""
        tokens = -(-features.shape[1] // self.reduction)
        padded = tokens if tokens <= WINDOW else WINDOW
        bias = self.relative_attention_bias_layer(padded)
        windows = []
        for first in range(0, tokens, WINDOW):
            x = self.embedded(features, first, min(first + WINDOW, tokens))
            t = x.shape[1]
            x = mx.pad(x, [(0, 0), (0, padded - t), (0, 0)])
            for block in self.encoders:
                x = block(x, bias)
            windows.append(x[:, :t])
            if tokens > WINDOW:
                mx.eval(windows[-1])
        return windows[0] if len(windows) == 1 else mx.concatenate(windows, axis=1)

    def embedded(self, features: mx.array, first: int, last: int) -> mx.array:
        """Tokens from `first` to before `last` behind the front end; the token before them is computed with them."""
        halo = min(first, 1)
        frames = features[:, (first - halo) * self.reduction : last * self.reduction]
        return self.embed(self.encoder_embedding(frames))[:, halo:]


class AudioEmbedding(nn.Module):
    """The tower, and its projections to the decoder: one for sound alone, one for sound beside pictures.

    Args:
        config: the tower's shapes.
        hidden_size: the decoder's width.
    """

    def __init__(self, config: AudioConfig, hidden_size: int):
        super().__init__()
        self.encoder = AudioEncoder(config)
        self.up_proj_for_speech = PaddedLinear(config.hidden_size, hidden_size)
        self.down_proj_for_speech = PaddedLinear(hidden_size, hidden_size)
        self.up_proj_for_vision_speech = PaddedLinear(config.hidden_size, hidden_size)
        self.down_proj_for_vision_speech = PaddedLinear(hidden_size, hidden_size)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the tower computes in."""
        return self.encoder.encoder_embedding.global_mean.dtype

    def __call__(self, features: np.ndarray | mx.array) -> mx.array:
        """The tower.

        Args:
            features: log-mel frames [T, F], or [B, T, F] of B clips of one length, any floating dtype.

        Returns:
            [t, D] or [B, t, D], in `dtype`; t is T / 8, rounded up.
        """
        x = mx.array(features).astype(self.dtype)
        encoded: mx.array = self.encoder(x if x.ndim == 3 else x[None])
        return encoded if x.ndim == 3 else encoded[0]

    def rows(self, encoded: mx.array, projection: str) -> mx.array:
        """The rows of a clip in the decoder's sequence.

        Args:
            encoded: [..., t, D], as the tower returns it.
            projection: "speech" for sound alone, "vision" beside pictures.

        Returns:
            [..., t, hidden_size].
        """
        up, down = {
            "speech": (self.up_proj_for_speech, self.down_proj_for_speech),
            "vision": (self.up_proj_for_vision_speech, self.down_proj_for_vision_speech),
        }[projection]
        rows: mx.array = down(nn.gelu(up(encoded)))
        return rows
