"""The recipe of `demo-multimodal`: both towers learn at once, each on a core, over the frozen decoder of `demo`.

Sound beside a picture has a projection of its own, which learns last, over the finished towers and LoRAs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import learn_both
import learn_pictures
import learn_sounds
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from package_multimodal import config, write_package

from phi4_mlx.config.multimodal import MultimodalConfig
from phi4_mlx.models.audio import AudioEmbedding
from phi4_mlx.models.vision import ImageEmbedding

SEED = 1

Learner = Callable[..., tuple[nn.Module, dict[str, mx.array]]]


def learn(side: str, folder: Path) -> None:
    """Trains "vision" or "speech" and saves the tower and the LoRA in a folder."""
    settings = MultimodalConfig.from_dict(config())
    if side == "vision":
        tower, lora = learn_pictures.learn(settings.vision, SEED)
    else:
        tower, lora = learn_sounds.learn(settings.audio, SEED)
    save(folder, side, tower, lora)


def save(folder: Path, side: str, tower: nn.Module, lora: dict[str, mx.array]) -> None:
    """Writes the files that `restore` reads."""
    mx.save_safetensors(str(folder / f"{side}-tower.safetensors"), dict(tree_flatten(tower.parameters())))
    mx.save_safetensors(str(folder / f"{side}-lora.safetensors"), lora)


def restore(folder: Path) -> tuple[ImageEmbedding, AudioEmbedding, dict[str, dict[str, mx.array]]]:
    """The trained towers and LoRAs."""
    settings = MultimodalConfig.from_dict(config())
    vision = ImageEmbedding(settings.vision, settings.hidden_size)
    speech = AudioEmbedding(settings.audio, settings.hidden_size)
    for side, tower in (("vision", vision), ("speech", speech)):
        tower.load_weights(str(folder / f"{side}-tower.safetensors"))
    return vision, speech, {side: mx.load(str(folder / f"{side}-lora.safetensors")) for side in ("vision", "speech")}


def make_multimodal(folder: Path, output: Path) -> None:
    """Trains the towers and writes the package.

    Args:
        folder: gets the unquantised towers and LoRAs.
        output: the package.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=learn, args=(side, folder)) for side in ("vision", "speech")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a tower was not trained; see its message above")
    vision, speech, loras = restore(folder)
    learn_both.learn(vision, speech, loras["vision"], SEED)
    save(folder, "speech", speech, loras["speech"])
    write_package(output, vision, speech, loras)
