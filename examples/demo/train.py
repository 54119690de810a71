"""Trains an embedded package from scratch: data, tokenizer, model, 4-bit package. The run is seeded.

    python examples/demo/train.py [--package demo-flash | demo-multimodal] [--output FOLDER]

On Linux, set `OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0`, which is several times faster. MLX needs a C++
compiler to fuse its loops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from recipe_demo import make_demo
from recipe_flash import make_flash
from recipe_multimodal import make_multimodal

from phi4_mlx.convert.package import convert
from phi4_mlx.models.model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent.parent

Recipe = Callable[[Path], tuple[LanguageModel, dict[str, Any]]]
"""(folder, which gets the files of the tokenizer) -> (trained model, config.json)"""


def make_text(recipe: Recipe, group_size: int, folder: Path, output: Path) -> None:
    """Trains a text model and converts it to 4 bits, with `group_size` numbers that share a scale."""
    model, config = recipe(folder)
    stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | stops, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    shutil.rmtree(output, ignore_errors=True)
    convert(folder, output, quantize=True, q_group_size=group_size)


# name -> a function of (folder of the unquantised weights, folder of the package)
PACKAGES: dict[str, Callable[[Path, Path], None]] = {
    "demo": partial(make_text, make_demo, 64),
    "demo-flash": partial(make_text, make_flash, 32),
    "demo-multimodal": make_multimodal,
}


def main() -> None:
    """Writes the unquantised checkpoint and the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=PACKAGES, default="demo")
    parser.add_argument("--output", type=Path, help="the package (default: the embedded one)")
    parser.add_argument("--unquantised", type=Path, help="the checkpoint (default: build/NAME-fp32)")
    options = parser.parse_args()
    name: str = options.package
    output = options.output or ROOT / "phi4_mlx" / name.replace("-", "_")
    folder = options.unquantised or ROOT / "build" / f"{name}-fp32"
    start = time.perf_counter()

    folder.mkdir(parents=True, exist_ok=True)
    PACKAGES[name](folder, output)
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, sum(os.times()[:4]) / 60  # with child processes
    print(f"{output} after {minutes:.1f} min, {cpu_minutes:.1f} min of CPU time")
    beside = "" if name == "demo-multimodal" else f" --beside {folder}"
    print(f"now: python examples/demo/evaluate.py --package {name}{beside}")


if __name__ == "__main__":
    main()
