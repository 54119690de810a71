"""The fingerprints of models and adapters, each computed once, since it reads all weights."""

from __future__ import annotations

import weakref

import mlx.core as mx

from phi4_mlx.fingerprint import adapter_fingerprint, base_fingerprint, named_fingerprint
from phi4_mlx.generation.prompt_cache_content import Tokenizer
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.version import __version__

MADE_BY = f"phi4_mlx {__version__}, mlx {mx.__version__}"  # another version may compute other numbers


class Fingerprints:
    """What tells stored caches apart, beside tokens, RoPE table and options.

    Args:
        tokenizer: of all models.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.fingerprint()[:32]
        self._bases: dict[int, tuple[weakref.ref[LanguageModel], str]] = {}  # by the id of the model
        self._adapters: dict[tuple[int, str | None], str] = {}

    def of(self, model: LanguageModel, adapter: str | None) -> dict[str, str]:
        """The fingerprints for a file's metadata; any thread may ask.

        Args:
            model: the model, which may have an adapter that is always on.
            adapter: one that the model has by this name; None for none.
        """
        with shared_stream():
            number = id(model)
            reference, base = self._bases.get(number, (None, ""))
            if reference is None or reference() is not model:
                base = base_fingerprint(model)
                self._bases[number] = weakref.ref(model), base
                self._adapters = {key: each for key, each in self._adapters.items() if key[0] != number}
            if (number, adapter) not in self._adapters:
                found = adapter_fingerprint(model) if adapter is None else named_fingerprint(model, adapter)
                self._adapters[number, adapter] = found
            return {
                "model": base,
                "adapter": self._adapters[number, adapter],
                "tokenizer": self._tokenizer,
                "made_by": MADE_BY,
            }
