"""Byte-level BPE of tokenizer.json, and the proof that tiktoken gives the same ids.

tiktoken merges by the rank of the token that a merge makes; tokenizer.json lists its merges in order. `merges_agree`
proves that both give the same ids for a vocabulary, as they do for o200k. The proof takes seconds for a vocabulary of
that size, so tables already proven are recognised by their contents.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

# Proven tables -> number of ids, from 0, that are bytes or made by merges. The entries are o200k, in Phi-4-mini and its
# siblings: by `_contents`, and by the SHA-256 of Phi-4-mini's file from '"model": {' to the end.
KNOWN_TABLES = {"8bcd96176fac69034823239ed706a0a460fe333f994f65b706561dbc59c0446a": 199_998}
KNOWN_FILES = {"6dc64037568e0c35e916693e8b558b0b43183e02da12b2268b776ee616742428": 199_998}


def _spelling() -> str:
    """The character for each byte: printable Latin-1 as itself, the others from U+0100.

    Source: `bytes_to_unicode` in the GPT-2 release.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256))


SPELLING = _spelling()
_BYTE_OF_CHAR = codecs.charmap_build(SPELLING)


def token_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry; the entry's UTF-8 if it is not in the byte alphabet."""
    try:
        return codecs.charmap_encode(token, "strict", _BYTE_OF_CHAR)[0]
    except UnicodeEncodeError:
        return token.encode(errors="replace")


def parse(raw: bytes) -> tuple[Any, int | None]:
    """Parses tokenizer.json.

    Args:
        raw: the file's bytes.

    Returns:
        The parsed file, and for a known table its number in `KNOWN_TABLES`. The merges of a known file are omitted:
        they are two thirds of it, and are not needed.

    Raises:
        ValueError: it is not JSON.
    """
    start = max(raw.rfind(b'"model": {'), 0)
    merged = KNOWN_FILES.get(hashlib.sha256(memoryview(raw)[start:]).hexdigest())
    if merged is not None:
        return json.loads(raw[: raw.index(b'"merges": [', start)] + b'"merges": []}}'), merged
    spec = json.loads(raw)
    try:
        return spec, KNOWN_TABLES.get(_contents(spec["model"]))
    except (KeyError, TypeError, AttributeError, ValueError):  # malformed: the checks that follow report it
        return spec, None


def _contents(model: Mapping[str, Any]) -> str:
    """SHA-256 of the entries in the order of their ids and of the merges in theirs, however the file writes them."""
    vocab, merges = model["vocab"], model["merges"]
    if set(map(type, merges)) == {list} and set(map(len, merges)) == {2}:
        merges = [*map(" ".join, merges)]
    parts = [repr(sorted(vocab.values())), repr(len(merges)), *sorted(vocab, key=vocab.__getitem__), *merges]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pattern(spec: Mapping[str, Any]) -> str | None:
    """The pattern that splits a text before merging; None if tiktoken cannot express the file's settings.

    Args:
        spec: a parsed tokenizer.json.
    """
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
    regex: str | None = split["pattern"].get("Regex")
    return regex


def merges_agree(spec: Mapping[str, Any]) -> bool:
    """True if merging by the rank of the merged token gives the same ids as the list of merges.

    It does if each byte has a token, the list makes each of its tokens once, in the order of their ids, and the bytes
    of each token, under the merges before its own, reduce to exactly the two parts that its merge names. Then two
    neighbours whose joined text has a rank are always the two parts of a listed merge, because the merges so far inside
    their bytes are those that would happen in these bytes alone.

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
    """The parts that a token's characters merge into under the ranks below its own: lowest first, then leftmost."""
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
    """The merges as pairs; older files write a pair as one string with a space."""
    merges = spec["model"]["merges"]
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]  # type: ignore[misc]


def ranks(spec: Mapping[str, Any], merged: int | None = None) -> dict[bytes, int]:
    """The bytes and the id of every token that is a byte or made by a merge.

    Args:
        spec: a parsed tokenizer.json whose merges agree.
        merged: the second value that `parse` returned.
    """
    vocab: dict[str, int] = spec["model"]["vocab"]
    if merged is None:
        tokens = [*SPELLING, *(left + right for left, right in merge_pairs(spec))]
    else:
        tokens = [token for token, rank in vocab.items() if rank < merged]
    texts = [codecs.charmap_encode(token, "strict", _BYTE_OF_CHAR)[0] for token in tokens]
    return dict(zip(texts, map(vocab.__getitem__, tokens), strict=True))
