"""Loading before the first step: model and data from the Hub, samples, and weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.data.jsonl import find_split
from phi4_mlx.data.samples import Pair, Sample, load_pairs, load_samples
from phi4_mlx.errors import RequestError
from phi4_mlx.hub import resolve
from phi4_mlx.lora.settings import Settings
from phi4_mlx.lora.view import Tell, View
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.terminal.amount import size
from phi4_mlx.tokens.tokenizer import Tokenizer

WEIGHTS_AT_ONCE = 16  # tensors that are read in one computation

Samples = Sequence[Sample] | Sequence[Pair]


@dataclass(frozen=True)
class Data:
    """Samples or pairs of each split; empty for a split that is missing or not needed."""

    train: Samples = ()
    valid: Samples = ()
    test: Samples = ()


def download(settings: Settings, view: View, split: str = "train") -> Path:
    """Downloads a model and data of the Hub that are not here yet; the Hub's library has bars of its own.

    Args:
        settings: the options, which name both.
        view: leaves the terminal to those bars.
        split: the split of the data to download; the others are, when they are read.

    Returns:
        The model's folder.

    Raises:
        CheckpointError, RequestError: there is no such model or data, or the Hub cannot be reached.
    """
    with view.aside():
        folder = resolve(settings.base)
        if not Path(os.path.expanduser(settings.data)).exists():
            find_split(settings.data, split)
    return folder


def read_data(
    settings: Settings, tokenizer: Tokenizer, tell: Tell, splits: Sequence[str] = ("train", "valid", "test")
) -> Data:
    """Reads all samples of a run, and reports their numbers.

    Args:
        settings: the options.
        tokenizer: encodes the samples.
        tell: called with each message for people.
        splits: the splits to read; "test" is read only with `settings.test`.

    Raises:
        RequestError: a line cannot be used, or a split that is needed is missing.
    """
    found: dict[str, Samples] = {}
    for split in splits:
        if split == "test" and not settings.test:
            continue
        if settings.task == "sft":
            found[split], report = load_samples(
                settings.data, tokenizer, split,
                mask_prompt=settings.mask_prompt, max_seq_length=settings.max_seq_length,
            )  # fmt: skip
        else:
            found[split], report = load_pairs(settings.data, tokenizer, split, max_seq_length=settings.max_seq_length)
        for message in report.messages() if found[split] else ():
            tell(f"{split}: {message}")
    if settings.test and not found.get("test"):
        raise RequestError(f"{settings.data} holds no test.jsonl, which --test needs; leave --test out")
    if settings.patience and "valid" in splits and not found["valid"]:
        raise RequestError(
            f"--patience {settings.patience} needs a validation set, and {settings.data} holds no valid.jsonl; "
            "leave --patience out"
        )
    return Data(**found)


def read_weights(model: LanguageModel, view: View) -> None:
    """Reads the weights of a lazy model, a few at a time; not those that text does not need."""
    arrays = [array for name, array in tree_flatten(model.parameters()) if not model.on_demand(name)]
    total, done = sum(array.nbytes for array in arrays), 0
    for first in range(0, len(arrays), WEIGHTS_AT_ONCE):
        some = arrays[first : first + WEIGHTS_AT_ONCE]
        mx.eval(some)
        done += sum(array.nbytes for array in some)
        view.phase(f"reading the weights: {size(done)} of {size(total)}")
