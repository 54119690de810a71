"""Small pictures and clips, and prompts with them, for the tiny Phi-4-multimodal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phi4_mlx.tokens.media.audio import Audio
from phi4_mlx.tokens.media.image import Image
from phi4_mlx.tokens.prompt import MediaSettings, Medium, Prompt, slots
from tests.conformance import recipe_multimodal as recipe

SETTINGS = MediaSettings(recipe.CROP, 4, recipe.IMAGE_TOKEN, recipe.AUDIO_TOKEN)


def picture(seed: int = 0, down: int = 1, across: int = 1) -> Image:
    """A picture of random pixels, without padding: 41 tokens for one crop."""
    size = (down * recipe.CROP, across * recipe.CROP)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image(pixels, size, recipe.CROP, recipe.PATCH)


def clip(seed: int = 0, frames: int = 83) -> Audio:
    """A clip of random features: 11 tokens for 83 frames."""
    return Audio(2 * np.random.default_rng(seed).standard_normal((frames, 80), dtype=np.float32), frames / 100)


def prompt_of(*parts: Medium | Sequence[int]) -> Prompt:
    """Media and ids in a row."""
    prompt = Prompt()
    for part in parts:
        prompt += part if isinstance(part, (list, range, tuple)) else slots(part, SETTINGS.token(part.kind))
    return prompt
