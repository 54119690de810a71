"""Byte-level BPE as tokenizer.json writes it, and the proof that tiktoken makes the same of it.

tiktoken merges by the rank of the token that a merge makes; tokenizer.json lists its merges in order. `merges_agree`
proves that the two come to the same for a vocabulary, as they do for o200k. That takes seconds for so large a one, so
the hash of a model already proven stands for it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

# SHA-256 of the end of tokenizer.json, from '"model": {' on, as the `tokenizers` library writes it -> how many ids,
# counted from 0, are bytes or what their merges make. Known to agree: o200k, in Phi-4-mini and its siblings.
KNOWN_MODELS = {"6dc64037568e0c35e916693e8b558b0b43183e02da12b2268b776ee616742428": 199_998}


def _spelling() -> str:
    """The character that each byte is written as: printable Latin-1 as itself, the rest from U+0100 on.

    Source: `bytes_to_unicode` in the GPT-2 release.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256))


SPELLING = _spelling()
_BYTE_OF_CHAR = codecs.charmap_build(SPELLING)


def token_bytes(token: str) -> bytes:
    """The bytes that an entry of the vocabulary stands for; the entry's own text if it is not spelled in bytes."""
    try:
        return codecs.charmap_encode(token, "strict", _BYTE_OF_CHAR)[0]
    except UnicodeEncodeError:
        return token.encode(errors="replace")


def parse(raw: bytes) -> tuple[Any, int | None]:
    """Parses tokenizer.json.

    Args:
        raw: the file.

    Returns:
        What it holds, and for a known model the number of ids that are bytes and what merges make of them. Its merges
        are left out then: they are two thirds of the file, and nobody needs them.

    Raises:
        ValueError: it is not JSON.
    """
    start = max(raw.rfind(b'"model": {'), 0)
    merged = KNOWN_MODELS.get(hashlib.sha256(memoryview(raw)[start:]).hexdigest())
    if merged is not None:
        raw = raw[: raw.index(b'"merges": [', start)] + b'"merges": []}}'
    return json.loads(raw), merged


def pattern(spec: Mapping[str, Any]) -> str | None:
    """The pattern that parts a text into pieces; none where a setting of the file is more than tiktoken can express."""
    model, steps = spec["model"], (spec.get("pre_tokenizer") or {}).get("pretokenizers") or []
    settings = (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges",
    )  # fmt: skip
    if (
        model.get("type", "BPE") != "BPE"
        or any(model.get(setting) for setting in settings)
        or spec.get("normalizer")
        or (spec.get("decoder") or {}).get("type") != "ByteLevel"
        or [step.get("type") for step in steps] != ["Split", "ByteLevel"]
    ):
        return None
    split, byte_level = steps
    keeps_matches_alone = split.get("behavior") == "Removed" and split.get("invert")
    if not keeps_matches_alone or byte_level.get("add_prefix_space") or byte_level.get("use_regex", True):
        return None
    return split["pattern"].get("Regex")


def merges_agree(spec: Mapping[str, Any]) -> bool:
    """Whether merging by the rank of the merged token does what the list of merges does.

    It does when each byte has a token, the list makes each of its tokens once, in the order of their ids, and each
    token's own bytes come down, under the merges before its own, to the very two parts that its merge names. For then
    no two neighbours ever meet whose joint rank is not that of a listed merge: what has merged inside their bytes so
    far is what would have merged in those bytes alone.

    Args:
        spec: a parsed tokenizer.json of byte-level BPE.
    """
    vocab, merges = spec["model"]["vocab"], merge_pairs(spec)
    made = [vocab.get(left + right) for left, right in merges]
    alphabet = [vocab.get(char) for char in SPELLING]
    if None in made or any(a >= b for a, b in pairwise(made)) or None in alphabet:
        return False
    if len({*alphabet, *made}) < len(alphabet) + len(made):
        return False
    ranks = dict(zip(SPELLING, alphabet, strict=True))
    ranks.update((left + right, rank) for (left, right), rank in zip(merges, made, strict=True))
    return all(
        left in ranks and right in ranks and _parts(left + right, ranks, rank) == [left, right]
        for (left, right), rank in zip(merges, made, strict=True)
    )


def _parts(token: str, ranks: Mapping[str, int], below: int) -> list[str]:
    """What the characters of a token merge into under the ranks below its own, lowest first, leftmost first."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        rank = min(pairs)
        if rank >= below:
            break
        at = pairs.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merge_pairs(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write each as one string with a space."""
    merges = spec["model"]["merges"]
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]  # type: ignore[misc]


def ranks(spec: Mapping[str, Any], merged: int | None = None) -> dict[bytes, int]:
    """Bytes -> id of all that merges can make.

    Args:
        spec: a parsed tokenizer.json whose merges agree.
        merged: the second part of what `parse` returned.
    """
    vocab: dict[str, int] = spec["model"]["vocab"]
    if merged is None:
        tokens = [*SPELLING, *(left + right for left, right in merge_pairs(spec))]
    else:
        tokens = [token for token, rank in vocab.items() if rank < merged]
    texts = [codecs.charmap_encode(token, "strict", _BYTE_OF_CHAR)[0] for token in tokens]
    return dict(zip(texts, map(vocab.__getitem__, tokens), strict=True))
