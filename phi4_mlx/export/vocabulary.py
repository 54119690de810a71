"""The tokenizer of a GGUF file: tokens, their types, merges or scores, and the ids with a meaning.

Source: the GGUF specification, and llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.regular_file import TOKENIZER_BYTES
from phi4_mlx.files.safetensors import bytes_in
from phi4_mlx.tokens import byte_bpe
from phi4_mlx.tokens.tokenizer import Control, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types. A control token is not shown in an answer, one that is user-defined is."""

# Part of the pattern that splits a text -> llama.cpp's name for it. Source: `llm_tokenizer_bpe` in llama-vocab.cpp.
_SPLITTERS = {
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|": "gpt-4o",  # o200k
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|": "dbrx",  # cl100k, as Phi-4
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece's.
        pre: llama.cpp's name for the way a text is split before merging.
        tokens: the text of each id, [V].
        types: of each id, [V].
        merges: pairs with a space between, for "gpt2".
        scores: of each id, for "llama": the higher one merges first.
        ids: "bos", "eos", "eot", "eom", "unknown" and "padding" -> id, those that exist.
        add_space_prefix: whether a text begins with a space that is not in it.
        strips_before: control tokens that remove the white space before them.
        strips_after: control tokens that remove the white space after them.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: Mapping[str, int]
    add_space_prefix: bool
    strips_before: frozenset[str]
    strips_after: frozenset[str]


def read_vocabulary(folder: Path, tokenizer: Tokenizer, end: str, rows: int) -> Vocabulary:
    """Reads the tokenizer of a checkpoint as GGUF stores it.

    Args:
        folder: the checkpoint.
        tokenizer: its tokenizer.
        end: the control token that ends a turn.
        rows: of the embedding; ids without a text are padding.

    Raises:
        RequestError: llama.cpp has no tokenizer that gives the same ids.
        TokenizerError: the tokenizer lacks `end`.
    """
    spec = json.loads(bytes_in(folder, "tokenizer.json", TOKENIZER_BYTES))
    pre = _splitter(folder, spec)
    tokens = [f"[PAD{token}]" for token in range(rows)]
    types = [UNUSED] * rows
    for text, token in spec["model"]["vocab"].items():
        tokens[token], types[token] = _utf8(text), NORMAL
    added = {each["content"]: each for each in spec["added_tokens"]}
    for text, token in tokenizer.control_ids.items():
        tokens[token], types[token] = _utf8(text), CONTROL if added[text].get("special") else USER_DEFINED
    ids = _ids(folder, tokenizer, end)
    merges = byte_bpe.merge_pairs(spec)
    strips = [frozenset(text for text, each in added.items() if each.get(side)) for side in ("lstrip", "rstrip")]
    if pre is not None:
        return Vocabulary("gpt2", pre, tokens, types, [_utf8(" ".join(m)) for m in merges], [], ids, False, *strips)
    vocab = spec["model"]["vocab"]
    for token in vocab.values():
        if types[token] == NORMAL and len(tokens[token]) == 6 and tokens[token].startswith("<0x"):
            types[token] = BYTE
    scores = [-1e4] * rows
    for order, (left, right) in enumerate(reversed(merges)):
        scores[vocab[left + right]] = float(order - len(merges))  # of the first merge that makes it, written last
    unknown = vocab.get(spec["model"].get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
        ids["unknown"] = unknown
    return Vocabulary("llama", "default", tokens, types, [], scores, ids, tokenizer.leading_spaces == 1, *strips)


def _splitter(folder: Path, spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way a byte-level BPE splits a text; None for SentencePiece's; else RequestError."""
    pattern = byte_bpe.pattern(spec)
    pre = next((name for part, name in _SPLITTERS.items() if pattern and part in pattern), None)
    byte_level = pattern is not None or (spec.get("decoder") or {}).get("type") == "ByteLevel"
    first_only = (spec.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
    if (byte_level and pre is None) or first_only:
        found = "a space before the first text alone" if first_only else f"the pattern {pattern!r:.60}"
        raise RequestError(
            f"{folder}: tokenizer.json splits texts by {found}, which llama.cpp does not have; it has the patterns of "
            "o200k and cl100k, and SentencePiece's spaces; use --format hf"
        )
    return pre


def _utf8(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which a file cannot hold."""
    return text.encode(errors="replace").decode()


def _ids(folder: Path, tokenizer: Tokenizer, end: str) -> dict[str, int]:
    """The ids with a meaning. Those that end an answer are "eot" for the end of a turn, then "eos", then "eom"."""
    config: dict[str, Any] = read_json(folder / "config.json")
    (turn,) = tokenizer.encode_pieces([Control(end)])
    ends = [turn, *sorted(token for token in tokenizer.eos_ids - {turn} if token < tokenizer.vocab_size)]
    ids = {"eos": turn, **dict(zip(("eot", "eos", "eom"), ends, strict=False))}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        found = config.get(key)
        if type(found) is int and 0 <= found < tokenizer.vocab_size:
            ids[name] = found
    return ids
