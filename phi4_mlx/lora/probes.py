"""Prompts on which an adapter is measured: those of its own data, and those on which it changes the model most.

An adapter's config may name the data. Where it does not, or the data is gone, the prompts are searched: short texts and
single words of the vocabulary, of which those are taken that the adapter answers most differently from the base.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from phi4_mlx.adapters.folder import read_config
from phi4_mlx.data.samples import Sample, load_pairs, load_samples
from phi4_mlx.errors import Phi4Error
from phi4_mlx.lora.effect import log_probs
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.tokenizer import Tokenizer

OWN, FOUND = 16, 16  # prompts of each kind
MOST_TOKENS = 1024  # of a prompt
_WORDS = 112  # of the vocabulary, that are tried
_LINES = 256  # of the data, that are read
_BATCH = 32  # prompts tried together
_TEXTS = (
    "hi", "hello", "thanks", "good morning", "bye", "how are you?", "what are you?", "who made you?",
    "what can you do?", "tell me a joke", "what is 7 * 8?", "what is the capital of France?", "why is the sky blue?",
    "write a poem about the sea", "translate to German: good night", "1, 2, 3, 4, 5",
)  # fmt: skip


def own_prompts(adapter_path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts of the data that an adapter's config names, up to the last answer of a sample; empty without such data.

    Args:
        adapter_path: the adapter's folder, or a file in it.
        tokenizer: of the base.
    """
    path = Path(os.path.expanduser(adapter_path))
    named = read_config(path if path.is_dir() else path.parent).get("data")
    data = Path(os.path.expanduser(named)) if isinstance(named, str) and named and "\0" not in named else None
    if data is None or not (data.is_file() or data.is_dir()):  # never downloaded, and no pipe
        return []
    prompts = [_prompt(sample) for sample in _samples(data, tokenizer)]
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, prompts)) if 0 < len(ids) <= MOST_TOKENS]
    return prompts[:: max(1, len(prompts) // OWN)][:OWN]


def found_prompts(
    base: LanguageModel,
    tuned: LanguageModel,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[int]]:
    """The prompts, of many short ones, after which the next token of two models differs most.

    Args:
        base: the model without the adapter.
        tuned: the model with it.
        tokenizer: of the base.
        progress: called with (prompts done, all prompts).
    """
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for text in [*_TEXTS, *_words(tokenizer)]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        by_length[len(ids)].append(list(ids))
    measured: list[tuple[float, list[int]]] = []
    for prompts in by_length.values():
        for first in range(0, len(prompts), _BATCH):
            some = prompts[first : first + _BATCH]
            now, before = (log_probs(model, mx.array(some), 1)[:, -1] for model in (tuned, base))
            change: list[float] = (mx.exp(now) * (now - before)).sum(axis=-1).tolist()
            measured += zip(change, some, strict=True)
            progress(len(measured), sum(map(len, by_length.values())))
    return [ids for _, ids in sorted(measured, reverse=True)[:FOUND]]


def _samples(data: Path, tokenizer: Tokenizer) -> Sequence[Sample]:
    """The first samples of a data set in any format; empty if it cannot be read."""
    for mask_prompt in (True, False):  # True refuses plain texts
        try:
            samples, _ = load_samples(
                data, tokenizer, mask_prompt=mask_prompt, max_seq_length=2 * MOST_TOKENS, lines=_LINES
            )
            return samples
        except (Phi4Error, ImportError):  # Parquet needs pyarrow
            continue
    try:
        return [pair.chosen for pair in load_pairs(data, tokenizer, max_seq_length=2 * MOST_TOKENS, lines=_LINES)[0]]
    except (Phi4Error, ImportError):
        return []


def _prompt(sample: Sample) -> list[int]:
    """Everything before the last answer of a chat; the first half of a plain text."""
    if all(sample.targets[1:]):
        return sample.ids[: max(1, len(sample.ids) // 2)]
    end = len(sample.ids)
    while end and not sample.targets[end - 1]:
        end -= 1
    while end and sample.targets[end - 1]:
        end -= 1
    return sample.ids[:end]


def _words(tokenizer: Tokenizer) -> list[str]:
    """Words spread evenly over the vocabulary."""
    control = set(tokenizer.control_ids.values())
    decoded = (tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size) if token not in control)
    words = [word for word in dict.fromkeys(decoded) if len(word) > 1 and word.isprintable() and "\ufffd" not in word]
    return words[:: max(1, len(words) // _WORDS)][:_WORDS]
