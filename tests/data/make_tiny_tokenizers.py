"""Writes the small tokenizers of the tests beside this file. Run it again only to change them.

    python tests/data/make_tiny_tokenizers.py

tiny_tokenizer: byte-level BPE like Phi-4-mini's, with its pattern, its twelve added tokens and its chat template.
tiny_sentencepiece: like Phi-3.5-mini's, with a leading space and byte fallback.
disagreeing: byte-level BPE whose merges are not in the order of the ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
OFFICIAL = HERE / "phi-4-mini-instruct"
TEXTS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone. 1234567890 + 42 = ?",
    "def main(argument): return [value for value in argument if value is not None]",
    "Hello, world! What is the weather in Paris today? It's 21 degrees, and we don't need a coat.",
    'A list of tools: [{"name": "get_weather", "description": "The weather", "parameters": {"city": {"type": "str"}}}]',
    "Größe, façade, naïve, Привет мир, こんにちは世界, 안녕하세요, مرحبا",
] * 4


def pattern() -> str:
    """The pattern of o200k, as in tiktoken and the official tokenizer.json."""
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    tail = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join([
        rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+{tail}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*{tail}",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ])  # fmt: skip


def byte_level() -> Tokenizer:
    """500 entries: 256 bytes, 232 merges, 12 added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern()), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=488, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    official = json.loads((OFFICIAL / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    for _, entry in sorted(official.items(), key=lambda item: int(item[0])):
        add = tokenizer.add_special_tokens if entry["special"] else tokenizer.add_tokens
        add([AddedToken(entry["content"], rstrip=entry["rstrip"], normalized=False, special=entry["special"])])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """The layout of converted Llama tokenizers: metaspace by normalizer, byte fallback, a decoder of four steps."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=first, show_progress=False)
    words = [word for text in TEXTS[:4] * 8 for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    marks = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens([AddedToken(text, rstrip=True, normalized=False) for text in marks])
    return tokenizer


def disagreeing(spec: dict[str, Any]) -> dict[str, Any]:
    """The byte-level tokenizer with the ids of two merges swapped."""
    vocab = spec["model"]["vocab"]
    a, b = (left + right for left, right in (spec["model"]["merges"][0], spec["model"]["merges"][150]))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return spec


def save(name: str, tokenizer: Tokenizer, template: str, end: list[str], tokenizer_class: str) -> None:
    """Writes the three files of a tokenizer folder."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    config = {
        "tokenizer_class": tokenizer_class, "chat_template": template, "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    stops = {"eos_token_id": [tokenizer.token_to_id(text) for text in end]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


def main() -> None:
    """Writes all three tokenizers."""
    stock = json.loads((OFFICIAL / "tokenizer_config.json").read_text())["chat_template"]
    bytes_ = byte_level()
    save("tiny_tokenizer", bytes_, stock, ["<|end|>", "<|endoftext|>"], "PreTrainedTokenizerFast")
    save("tiny_sentencepiece", sentencepiece(), "", ["<|end|>", "<|assistant|>", "<|endoftext|>"], "LlamaTokenizer")
    (HERE / "disagreeing").mkdir(exist_ok=True)
    spec = json.dumps(disagreeing(json.loads(bytes_.to_str())), ensure_ascii=False, indent=2)
    (HERE / "disagreeing" / "tokenizer.json").write_text(spec, encoding="utf-8")


if __name__ == "__main__":
    main()
