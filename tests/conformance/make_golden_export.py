"""Writes golden_export.npz: logits of transformers' models, loaded from the dense folders that this project exports.

    pip install torch==2.13.0 transformers==5.23.0
    PYTHONPATH=. python tests/conformance/make_golden_export.py

In fp32, eager attention, on a CPU. The tolerance of the comparison is 1e-4 at unit scale (test_export.py). The folders'
config.json and tensors' shapes are stored too, so that the test can check that today's export writes the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi4_mlx.checkpoint import load
from phi4_mlx.export.dense_folder import write_dense
from phi4_mlx.files.safetensors import read_header
from tests.conformance import recipe_export as recipe


def reference(case: str, scratch: Path) -> dict[str, np.ndarray]:
    """The exported folder of a case, and transformers' logits for it."""
    model, adapter = recipe.write_source(case, scratch)
    write_dense(model, scratch / "out", adapter)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        scratch / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    text, (_, ours) = "Hello, <|user|> world!", load(scratch / "out")
    assert AutoTokenizer.from_pretrained(scratch / "out").encode(text) == ours.encode(text, specials=True)
    ids = torch.from_numpy(recipe.tokens(case))[None]
    shapes = {name: info.shape for name, info in read_header(scratch / "out" / "model.safetensors").items()}
    out = {
        "config": np.array((scratch / "out" / "config.json").read_text()),
        "shapes": np.array(json.dumps(shapes, sort_keys=True)),
    }
    with torch.no_grad():
        for T in recipe.LENGTHS:
            out[f"logits{T}"] = loaded.eval()(ids[:, :T]).logits[0, -recipe.ROWS :].numpy()
    return out


def main() -> None:
    """Writes golden_export.npz beside this file."""
    golden = {}
    for case in recipe.BASES:
        with tempfile.TemporaryDirectory() as scratch:
            golden |= {f"{case}/{name}": value for name, value in reference(case, Path(scratch)).items()}
    golden["made_with"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    path = Path(__file__).with_name("golden_export.npz")
    np.savez_compressed(path, **golden)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
