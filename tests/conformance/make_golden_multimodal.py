"""Writes golden_multimodal.npz: towers, logits and greedy tokens of transformers' Phi4MultimodalForCausalLM.

    pip install torch==2.13.0 transformers==5.23.0
    PYTHONPATH=. python tests/conformance/make_golden_multimodal.py

In fp32, eager attention, on a CPU. transformers never switches LoRAs, so that of a mode is merged into the weights.
Tolerances of the comparison: towers 1e-5, beyond 500 tokens of sound 5e-5, logits 1e-4 (test_multimodal.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import recipe_multimodal as recipe
import torch
import transformers
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from phi4_mlx.tokens.media.image import Image


def reference(adapter: str | None = None) -> Phi4MultimodalForCausalLM:
    """The model with the LoRA of that name merged; it has exactly the recipe's tensors."""
    raw = recipe.config()
    model = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**raw, attn_implementation="eager")).eval()
    made = recipe.weights(raw) | (recipe.merged(raw, adapter) if adapter else {})
    own = {name: tuple(array.shape) for name, array in model.state_dict().items() if name != "lm_head.weight"}
    assert own == recipe.shapes(raw), sorted(own.items() ^ recipe.shapes(raw).items())
    model.load_state_dict({name: torch.from_numpy(array) for name, array in made.items()}, strict=False)
    return model


def towers() -> dict[str, np.ndarray]:
    """The towers and the rows that their projections make."""
    extend = reference().model.embed_tokens_extend
    pixels, mask = torch.from_numpy(recipe.pixels()).permute(0, 3, 1, 2), torch.tensor(recipe.mask().tolist())
    size = torch.tensor([[recipe.CROP, 2 * recipe.CROP]])
    N, D = recipe.IMAGE_TOKENS, recipe.config()["hidden_size"]
    slots = torch.full((1, N), recipe.IMAGE_TOKEN)
    out = {
        "vision": extend.image_embed.get_img_features(pixels, mask),
        "vision_rows": extend.image_embed(slots, torch.zeros(1, N, D), pixels[None], size, mask[None])[0],
    }
    for name, frames in recipe.FRAMES.items():
        features = torch.from_numpy(recipe.features(name))[None]
        out[f"audio_{name}"] = extend.audio_embed.encoder(features, None)[0]
        if name != "short":
            continue
        t = -(-frames // 8)
        slots, rows = torch.full((1, t), recipe.AUDIO_TOKEN), torch.zeros(1, t, D)
        for projection in ("speech", "vision"):
            out[f"audio_{name}_{projection}"] = extend.audio_embed(
                slots, rows, features, torch.tensor([t]), None, projection
            )[0]
    return {name: array.numpy() for name, array in out.items()}


def inputs(mode: str) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass in a mode."""
    image = Image(*recipe.picture(), recipe.CROP, recipe.PATCH)
    found = {"input_ids": torch.tensor([recipe.prompt(mode)])}
    if "vision" in mode:
        found["image_pixel_values"] = torch.from_numpy(image.pixels).permute(0, 3, 1, 2)[None]
        found["image_attention_mask"] = torch.tensor(image.mask.tolist())[None].float()
        found["image_sizes"] = torch.tensor([image.size])
    if "speech" in mode:
        found["audio_input_features"] = torch.from_numpy(recipe.features("short"))[None]
        found["audio_embed_sizes"] = torch.tensor([-(-recipe.FRAMES["short"] // 8)])
    return found


def main() -> None:
    """Writes golden_multimodal.npz beside this file."""
    with torch.no_grad():
        golden = towers()
        for mode in recipe.MODES:
            adapter = None if mode == "language" else "speech" if mode == "speech" else "vision"
            model, given = reference(adapter), inputs(mode)
            golden[f"logits_{mode}"] = model(**given).logits[0].numpy()
            ids = given.pop("input_ids")
            for _ in range(recipe.GREEDY):
                logits = model(input_ids=ids, **given).logits[0, -1]
                ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
            golden[f"greedy_{mode}"] = ids[0, len(recipe.prompt(mode)) :].numpy().astype(np.int32)
            print(mode, ids.shape[1], golden[f"logits_{mode}"].std(), golden[f"greedy_{mode}"].tolist())
    golden["made_with"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    path = Path(__file__).with_name("golden_multimodal.npz")
    np.savez_compressed(path, **golden)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
