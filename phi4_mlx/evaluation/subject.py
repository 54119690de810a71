"""The model that is evaluated, with everything that its answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.sharing import join_group
from phi4_mlx.fingerprint import adapter_fingerprint, base_fingerprint
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.tokens.tokenizer import Tokenizer

Progress = Callable[[int, int], object]
"""Called with (done, in all)."""

# Tokens that begin a text in training. Source: `bos_token` in tokenizer_config.json of the family's models.
_STARTS = ("<s>", "<|endoftext|>")


@dataclass
class Subject:
    """The model that is evaluated.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the model.
        name: the name that it was loaded by, for tables.
        fingerprint: of weights, adapter, tokenizer and chat format; answers are kept under it.
        bos_id: the token that begins a text; None for that of the family.
        group: processes that share the work out among them, each with the same model; None for this one alone.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    name: str
    fingerprint: str
    bos_id: int | None = None
    group: mx.distributed.Group | None = None

    @property
    def start_id(self) -> int:
        """The token that begins a text: the context of a text without one.

        Raises:
            RequestError: the tokenizer has neither such a token nor one that ends a turn.
        """
        control, ends = self.tokenizer.control_ids, self.tokenizer.eos_ids
        if self.bos_id is not None:
            return self.bos_id
        found = [control[text] for text in _STARTS if text in control] or sorted(ends)
        if not found:
            raise RequestError(f"{self.name}: the tokenizer has no token that begins a text, such as {_STARTS[1]}")
        return found[0]


def load_subject(
    name: str,
    adapter_path: str | None = None,
    *,
    revision: str | None = None,
    verify: bool = False,
    chat_format: str | None = None,
) -> Subject:
    """Loads a model to evaluate, in each of the processes that this one was started with.

    Args:
        name: a folder, a Hub id, or the name of an embedded package.
        adapter_path: a folder with a LoRA adapter to put on the model.
        revision, verify, chat_format: as for `load`.

    Raises:
        Phi4Error: as for `load`.
    """
    model, tokenizer = load(name, adapter_path, revision=revision, verify=verify, chat_format=chat_format)
    label = name if adapter_path is None else f"{name} + {Path(adapter_path).name}"
    with shared_stream():
        parts: tuple[str, ...] = base_fingerprint(model), adapter_fingerprint(model)
    parts += tokenizer.fingerprint(), tokenizer.chat_format.name
    return Subject(model, tokenizer, label, fingerprint(*parts), group=join_group())


def fingerprint(*parts: str) -> str:
    """One fingerprint of several, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
