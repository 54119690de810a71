"""Rebuilds Phi-4-mini-instruct's tokenizer files from the o200k rank table, byte for byte.

    python tests/data/o200k.py FOLDER

The table is OpenAI's o200k_base (MIT), the small files are Microsoft's (MIT). The merge of a token is the pair that
remains when its bytes are merged with lower ranks only. The result has the hash of the official file.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4_mlx.tokens.tokenizer import ByteTokenizer

HERE = Path(__file__).parent
SHA256 = "382cc235b56c725945e149cc25f191da667c836655efd0857b004320e90e91ea"


def write(folder: Path) -> Path:
    """Writes tokenizer.json and the small files into `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "phi-4-mini-instruct").glob("*.json"):
        shutil.copy(file, folder)
    text = json.dumps(_spec(_merges()), ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def tokenizer() -> ByteTokenizer:
    """The tokenizer with Phi-4-mini's chat format, without a folder; the merges, which take 15 s, are not needed."""
    from phi4_mlx.tokens.chat_format import CHAT_FORMATS
    from phi4_mlx.tokens.tokenizer import ByteTokenizer

    config = json.loads((HERE / "phi-4-mini-instruct" / "generation_config.json").read_text())
    made = ByteTokenizer(_spec([]), _ranks(), config["eos_token_id"])
    made.chat_format = CHAT_FORMATS["phi4-mini"]
    return made


def _merges() -> list[list[str]]:
    ranks = _ranks()
    ordered = sorted(ranks, key=ranks.__getitem__)
    spelled = _spelled(ordered)
    return [[spelled[left], spelled[right]] for left, right in (_merge(t, ranks) for t in ordered if len(t) > 1)]


def _spec(merges: list[list[str]]) -> dict[str, Any]:
    """The content of tokenizer.json."""
    ranks = _ranks()
    spelled = _spelled(ranks)
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    vocab |= {"<|endoftext98|>": 199998, "<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    vocab |= {f"<|endoftext{n:02}|>": 200000 + n for n in range(18)}
    tiny = json.loads((HERE / "tiny_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((HERE / "phi-4-mini-instruct" / "tokenizer_config.json").read_text())
    added = [{"id": int(token), **entry} for token, entry in config["added_tokens_decoder"].items()]
    keys = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        **tiny,
        "added_tokens": [{key: entry[key] for key in keys} for entry in added],
        "model": {
            **tiny["model"],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def _ranks() -> dict[bytes, int]:
    table = gzip.decompress((HERE / "o200k_base.tiktoken.gz").read_bytes())
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in table.splitlines()}


def _spelled(tokens: Iterable[bytes]) -> dict[bytes, str]:
    char_of = _char_of_byte()
    return {token: "".join(map(char_of.__getitem__, token)) for token in tokens}


def _merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that a token is merged from."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in pairwise(parts)]
        at = pairs.index(min(pairs))
        assert pairs[at] < own, f"no merge gives {token!r}"
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _char_of_byte() -> dict[int, str]:
    """The printable character of each byte. Source: `bytes_to_unicode` in the GPT-2 release."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
