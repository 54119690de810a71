"""A script in place of a model's answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse


class ScriptedStream:
    """Stands in for `stream`: an answer, character by character, and its finish reason.

    Attributes:
        options: those of the latest call.
        prompt_tokens: length of its prompt.
    """

    def __init__(self, text: str, reason: str = "stop") -> None:
        self.text, self.reason = text, reason
        self.options, self.prompt_tokens = DecodeOptions(), 0

    def __call__(
        self, model: Any, tokenizer: Any, ids: list[int], cache: Any, options: DecodeOptions
    ) -> Iterator[GenerationResponse]:
        self.options, self.prompt_tokens = options, len(ids)
        token = min(tokenizer.eos_ids)
        for number, char in enumerate(self.text, 1):
            reason = self.reason if number == len(self.text) else None
            yield GenerationResponse(char, token, mx.zeros(1), len(ids), 1.0, number, 1.0, 0.1, 0, reason)
