"""The kind of a served model, which tells a client's page what to offer: read from the package, not from its name."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Literal

from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.tokens.chat_format import chat_template
from phi4_mlx.tokens.tokenizer import ChatFormat

ModelKind = Literal["demo", "demo-reasoning", "instruct", "reasoning", "base"]


def model_kind(folder: Path, chat_format: ChatFormat, chosen: bool = False) -> ModelKind:
    """The kind of a package.

    Args:
        folder: of the package.
        chat_format: its chat format.
        chosen: True if a person chose the format, and the package need not name one.

    Returns:
        "reasoning" if its answers begin with the model's thoughts; "base" for a package without a chat template; else
        "instruct". Embedded packages and what is made of them, which share their tokenizers, are "demo-reasoning" or
        "demo".

    Raises:
        ConfigError: a file that may contain the chat template is damaged.
    """
    own = folder / "tokenizer.json"
    embedded = (each / "tokenizer.json" for each in EMBEDDED.values())
    if own.is_file() and any(filecmp.cmp(own, each, shallow=False) for each in embedded):
        return "demo-reasoning" if chat_format.reasons else "demo"
    if chat_format.reasons:
        return "reasoning"
    return "instruct" if chosen or chat_template(folder) else "base"
