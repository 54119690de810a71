"""The demo's byte-level BPE tokenizer in the layout of Phi-4-mini's: o200k's pattern, the same added tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Source: o200k_base in tiktoken.
PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip
# The pattern for learning merges. Digits are single tokens, a capital starts a token, and only these words include the
# space before them. So a number, name or unit has the same tokens everywhere, which makes it easy to copy.
WITH_SPACE = ["and", "are", "as", "is", "my", "need", "of", "please", "tell", "that", "the", "this", "you"]
LEARNING_PATTERN = (
    rf"\p{{N}}| (?:{'|'.join(WITH_SPACE)})(?!\p{{Ll}})|\p{{Ll}}+|\p{{Lu}}+\p{{Ll}}*| ?[^\s\p{{L}}\p{{N}}]+|\s+"
)

# (text, rstrip, special), in Phi-4-mini's order
ADDED_TOKENS = [
    ("<|endoftext|>", False, True), ("<|endofprompt|>", False, True), ("<|assistant|>", True, True),
    ("<|end|>", True, True), ("<|user|>", True, True), ("<|system|>", True, True), ("<|tool|>", True, False),
    ("<|/tool|>", True, False), ("<|tool_call|>", True, False), ("<|/tool_call|>", True, False),
    ("<|tool_response|>", True, False), ("<|tag|>", True, True),
]  # fmt: skip
# Source: tokenizer_config.json of microsoft/Phi-4-mini-instruct.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns `vocab_size` tokens, including the 256 bytes, and appends the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LEARNING_PATTERN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    for text, rstrip, special in ADDED_TOKENS:
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(text, rstrip=rstrip, normalized=False, special=special)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json in Phi-4-mini's layout."""
    ids = {text: tokenizer.token_to_id(text) for text, _, _ in ADDED_TOKENS}
    decoder = {
        str(ids[text]): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False,
            "special": special,
        }
        for text, rstrip, special in ADDED_TOKENS
    }  # fmt: skip
    end_of_text = ADDED_TOKENS[0][0]
    config: dict[str, Any] = {
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder,
        "bos_token": end_of_text, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": end_of_text, "model_max_length": context, "pad_token": end_of_text,
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": end_of_text,
    }  # fmt: skip
    end = ids[end_of_text]
    stops = {"bos_token_id": end, "eos_token_id": [ids["<|end|>"], end], "pad_token_id": end}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
