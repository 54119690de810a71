"""Packing of codes as MLX stores them: a row is one stream of bits, the lowest bit of each code and word first."""

from __future__ import annotations

import mlx.core as mx

WORD = 32  # codes that fill whole words, whatever their bits


def packed(codes: mx.array, bits: int) -> mx.array:
    """Packs codes.

    Args:
        codes: whole numbers below 2 ** bits, [rows, in]; `in` is a multiple of 32.
        bits: of a code.

    Returns:
        uint32 [rows, in * bits / 32].
    """
    runs = codes.astype(mx.uint32).reshape(len(codes), -1, WORD)
    words = [mx.zeros(runs.shape[:2], mx.uint32) for _ in range(bits)]
    for number in range(WORD):
        word, shift = divmod(number * bits, WORD)
        words[word] = words[word] | (runs[..., number] << shift)
        if shift + bits > WORD:
            words[word + 1] = words[word + 1] | (runs[..., number] >> (WORD - shift))
    return mx.stack(words, axis=-1).reshape(len(codes), -1)


def unpacked(weight: mx.array, bits: int) -> mx.array:
    """The codes of a packed matrix, the inverse of `packed`.

    Args:
        weight: uint32 [rows, words].
        bits: of a code.

    Returns:
        uint32 [rows, in].
    """
    runs = weight.reshape(len(weight), -1, bits)
    codes = []
    for number in range(WORD):
        word, shift = divmod(number * bits, WORD)
        code = runs[..., word] >> shift
        if shift + bits > WORD:
            code = code | (runs[..., word + 1] << (WORD - shift))
        codes.append(code & (2**bits - 1))
    return mx.stack(codes, axis=-1).reshape(len(weight), -1)
