"""Writes golden_pictures.npz: torch's bicubic global view of normalised pictures, fp32, on a CPU.

    pip install torch==2.13.0
    python tests/conformance/make_golden_pictures.py

Only the files make_golden*.py import torch. The tolerance of the comparison is 5e-6 (test_pictures.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import recipe_pictures as recipe
import torch


def global_view(padded: np.ndarray, crop: int) -> np.ndarray:
    """The picture normalised and resized to one crop [crop, crop, 3]."""
    pixels = torch.from_numpy(padded.copy()).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    view = torch.nn.functional.interpolate(pixels[None], size=(crop, crop), mode="bicubic", align_corners=False)
    return view[0].permute(1, 2, 0).contiguous().numpy()


def main() -> None:
    """Writes golden_pictures.npz beside this file."""
    golden = {
        recipe.name(crop, grid): recipe.stored(global_view(recipe.padded(crop, grid), crop))
        for crop, grids in recipe.CASES.items()
        for grid in grids
    }
    golden["made_with"] = np.array(f"torch {torch.__version__}")
    path = Path(__file__).with_name("golden_pictures.npz")
    np.savez_compressed(path, **golden)
    print(f"{path.name}: {len(golden) - 1} views, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
