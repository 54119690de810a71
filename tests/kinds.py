"""Every kind of model: its tiny model, and the folder of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from phi4_mlx.models.model import LanguageModel
from tests.conftest import make_tiny_model, write_tiny_checkpoint
from tests.tiny_multimodal import make_tiny_multimodal, write_tiny_multimodal
from tests.tiny_sambay import make_tiny_sambay, write_tiny_sambay

MAKERS: dict[str, Callable[..., LanguageModel]] = {
    "phi3": make_tiny_model,
    "phi4flash": make_tiny_sambay,
    "phi4mm": make_tiny_multimodal,
}
WRITERS: dict[str, Callable[..., Path]] = {
    "phi3": write_tiny_checkpoint,
    "phi4flash": write_tiny_sambay,
    "phi4mm": write_tiny_multimodal,
}
SAME = {"phi4_multimodal": "phi4mm"}
"""model_type -> the one above that is the same model under other names in its files."""
