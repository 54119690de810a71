"""Writes golden_peft.npz and peft/: logits of PEFT adapters on transformers' Phi3ForCausalLM, fp32, eager, on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    PYTHONPATH=. python tests/conformance/make_golden_peft.py

For `THEIRS`, PEFT saves the adapters (peft/<case>) and computes their logits. For `OURS`, this project exports the
adapters and PEFT computes the logits; the exported files are stored too, so that the test can check that today's export
writes the same bytes. The tolerance of the comparison is 1e-4 at unit scale (test_peft.py).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import peft
import recipe
import recipe_adapters as adapters
import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.lora.export import to_peft
from phi4_mlx.models.text import Model
from tests.adapters import save_adapter

HERE = Path(__file__).parent


def base() -> Phi3ForCausalLM:
    """The tiny base, in torch."""
    model = Phi3ForCausalLM(Phi3Config(**recipe.config(adapters.BASE), attn_implementation="eager")).eval()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    made = recipe.weights(adapters.BASE, shapes)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in made.items()}, strict=False)
    return model


def logits(case: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Logits at each length, by the name that the test looks up."""
    ids = torch.from_numpy(recipe.tokens(adapters.BASE))[None]
    with torch.no_grad():
        return {f"{case}/logits{T}": model(ids[:, :T]).logits[0].numpy() for T in adapters.LENGTHS}


def theirs(case: str) -> dict[str, np.ndarray]:
    """Saves an adapter of PEFT; returns its logits."""
    model = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **adapters.THEIRS[case])).eval()
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    made = adapters.tensors(case, {name: tuple(p.shape) for name, p in trained.items()})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.from_numpy(made[name]))
    folder = HERE / "peft" / case
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return logits(case, model)


def ours(case: str) -> dict[str, np.ndarray]:
    """Exports an adapter of this project; returns the files and PEFT's logits for them."""
    model = Model(ModelConfig.from_dict(recipe.config(adapters.BASE)))
    add_adapter(model, **adapters.OURS[case])
    made = adapters.tensors(case, {name: tuple(a.shape) for name, a in adapter_parameters(model).items()})
    for path, layer in adapter_layers(model).items():
        layer.update({name.rpartition(".")[2]: mx.array(a) for name, a in made.items() if name.startswith(path)})
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(model, Path(scratch, "ours"), {})
        to_peft(Path(scratch, "ours"), Path(scratch, "peft"))
        files = {
            f"{case}/{path.name}": np.frombuffer(path.read_bytes(), np.uint8)
            for path in Path(scratch, "peft").iterdir()
        }
        return files | logits(case, peft.PeftModel.from_pretrained(base(), Path(scratch, "peft")).eval())


def main() -> None:
    """Writes golden_peft.npz and peft/ beside this file."""
    golden: dict[str, np.ndarray] = {}
    for case in adapters.THEIRS:
        golden |= theirs(case)
    for case in adapters.OURS:
        golden |= ours(case)
    for T in adapters.LENGTHS:
        plain = logits("base", base())[f"base/logits{T}"]
        print(
            T,
            {
                case: float(np.abs(golden[f"{case}/logits{T}"] - plain).mean().round(3))
                for case in [*adapters.THEIRS, *adapters.OURS]
            },
        )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    golden["made_with"] = np.array(versions)
    path = HERE / "golden_peft.npz"
    np.savez_compressed(path, **golden)
    print(f"{path.name}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
