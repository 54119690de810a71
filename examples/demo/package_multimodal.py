"""The package `demo-multimodal`: the weights of `demo`, two slots in its tokenizer, towers and LoRAs in 8 bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lessons import RANK, SCALE
from mlx.utils import tree_flatten

from phi4_mlx.adapters.folder import Adapter, write_folder, write_tensors
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.models.multimodal_names import EXTEND

BITS, GROUP_SIZE = 8, 64
SLOTS = {"<|endoftext10|>": 1012, "<|endoftext11|>": 1013}  # of pictures and of sound; rows of the embedding exist
IMAGE_TOKEN, AUDIO_TOKEN = SLOTS.values()
CONFIG: dict[str, Any] = {
    "architectures": ["Phi4MultimodalForCausalLM"],
    "model_type": "phi4_multimodal",
    "vision_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 84, "crop_size": 84, "patch_size": 14, "image_token_id": IMAGE_TOKEN, "feature_layer": -2,
    },
    "audio_config": {
        "hidden_size": 128, "intermediate_size": 128, "num_blocks": 3, "num_attention_heads": 4,
        "nemo_conv_channels": 32, "ext_pw_out_channel": 128, "depthwise_separable_out_channel": 128,
        "bias_max_distance": 50, "input_size": 80, "audio_token_id": AUDIO_TOKEN,
    },
}  # fmt: skip
PREPROCESSOR = {"dynamic_hd": 1}  # pictures of any size become one crop


def config() -> dict[str, Any]:
    """The config.json."""
    raw = json.loads((EMBEDDED["demo"] / "config.json").read_text(encoding="utf-8"))
    return {**raw, **CONFIG}


def write_package(
    output: Path, vision: nn.Module, speech: nn.Module, loras: Mapping[str, Mapping[str, mx.array]]
) -> None:
    """Writes the package, in place of an older one.

    Args:
        output: its folder.
        vision: the trained `ImageEmbedding`.
        speech: the trained `AudioEmbedding`.
        loras: "vision" and "speech" -> tensors by path: "model.layers.0.mlp.down_proj.lora_a" [in, R] and so on.
    """
    shutil.rmtree(output, ignore_errors=True)
    demo = EMBEDDED["demo"]
    output.mkdir(parents=True)
    for name in ("model.safetensors", "generation_config.json"):
        shutil.copyfile(demo / name, output / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        raw = json.loads((demo / name).read_text(encoding="utf-8"))
        _with_slots(raw)
        indent = None if name == "tokenizer.json" else 2
        (output / name).write_text(json.dumps(raw, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    tensors: dict[str, mx.array] = {}
    for name, tower in (("image_embed", vision), ("audio_embed", speech)):
        nn.quantize(tower, GROUP_SIZE, BITS)
        tensors |= {f"{EXTEND}{name}.{path}": array for path, array in tree_flatten(tower.parameters())}
    raw = config()
    scheme = {"bits": BITS, "group_size": GROUP_SIZE, "mode": "affine"}
    for name in tensors:
        if name.endswith(".scales"):
            raw["quantization"][name.removesuffix(".scales")] = scheme
    raw["quantization_config"] = raw["quantization"]
    for name, content in (("config.json", raw), ("preprocessor_config.json", PREPROCESSOR)):
        (output / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(output / "towers.safetensors", tensors)
    for name, lora in loras.items():
        _write_lora(output / f"{name}-lora", lora)
    _write_manifest(output)


def _with_slots(raw: dict[str, Any]) -> None:
    """Adds the slots to a parsed tokenizer.json or tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    for content, token in SLOTS.items():
        if "added_tokens" in raw:
            raw["added_tokens"].append({"id": token, "content": content, **flags})
        else:
            raw["added_tokens_decoder"][str(token)] = {"content": content, **flags}


def _write_lora(folder: Path, lora: Mapping[str, mx.array]) -> None:
    """A folder of a LoRA in 8 bits, the rank first in its matrices."""
    tensors = {}
    for path, array in lora.items():
        rank_first = array.T if path.endswith("lora_a") else array
        packed, *groups = mx.quantize(rank_first, GROUP_SIZE, BITS)
        tensors[path] = packed
        tensors |= {f"{path}_{name}": group for name, group in zip(("scales", "biases"), groups, strict=True)}
    adapter = Adapter("lora", SCALE, 0.0, tensors, str(folder))
    adapter = replace(adapter, scheme=(GROUP_SIZE, BITS))
    layers = 1 + max(int(path.split(".")[2]) for path in lora)
    write_folder(folder, adapter, layers, {"quantization": {"group_size": GROUP_SIZE, "bits": BITS}})
    assert adapter.rank == RANK


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[path.relative_to(folder).as_posix()] = entry
    manifest = {"files": files, "tokenizer_merges_agree": files["tokenizer.json"]["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
