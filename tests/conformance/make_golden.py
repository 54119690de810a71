"""Writes golden.npz: logits and greedy tokens of transformers' Phi3ForCausalLM in fp32, eager attention, on a CPU.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/conformance/make_golden.py

Only the files make_golden*.py import torch. The tolerance of the comparison is 2e-4 at unit scale (test_model.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import recipe
import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM


def reference(case: str) -> dict[str, np.ndarray]:
    """The config, logits and greedy tokens of one case."""
    config = Phi3Config(**recipe.config(case), attn_implementation="eager")
    model = Phi3ForCausalLM(config).eval()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    made = recipe.weights(case, shapes)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in made.items()}, strict=False)
    ids = torch.from_numpy(recipe.tokens(case))[None]
    out = {"config": np.array(json.dumps(config.to_dict(), sort_keys=True))}  # in the layout of transformers 5
    with torch.no_grad():
        for T in recipe.LENGTHS:
            out[f"logits{T}"] = model(ids[:, :T]).logits[0].numpy()
        prompt = ids[:, : recipe.PROMPT_LENGTH]
        grown = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=recipe.NEW_TOKENS, do_sample=False
        )
    out["generated"] = grown[0, recipe.PROMPT_LENGTH :].numpy().astype(np.int32)
    return out


def main() -> None:
    """Writes golden.npz beside this file."""
    torch.manual_seed(0)
    golden = {f"{case}/{name}": value for case in recipe.CASES for name, value in reference(case).items()}
    golden["made_with"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    path = Path(__file__).with_name("golden.npz")
    np.savez_compressed(path, **golden)
    scale = np.mean([v.std() for k, v in golden.items() if k.endswith(f"logits{recipe.LENGTHS[-1]}")])
    print(f"{path.name}: {len(recipe.CASES)} cases, {path.stat().st_size} bytes, mean logit std {scale:.3f}")


if __name__ == "__main__":
    main()
