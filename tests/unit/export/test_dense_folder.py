"""Dense folders for transformers and vLLM; tests/conformance/test_export.py compares logits with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx.convert import package
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import RequestError
from phi4_mlx.export.dense_folder import write_dense
from phi4_mlx.files.safetensors import read_header, weight_files
from tests.conftest import TinyCheckpoint
from tests.kinds import WRITERS


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_quantised_package_becomes_dense_in_the_dtype_of_its_scales(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, dtype: mx.Dtype
) -> None:
    convert(tiny_checkpoint(dtype=dtype), tmp_path / "packed", quantize=True, q_group_size=32)
    assert write_dense(tmp_path / "packed", tmp_path / "out") == 64
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [key for key in config if "quantization" in key]
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["pad_token_id"] == 0
    name = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}[dtype]
    assert {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()} == {name}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()


def test_a_weight_is_rounded_once(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """In bf16, scale times number plus bias would be rounded twice."""
    convert(tiny_checkpoint(dtype=mx.bfloat16), tmp_path / "packed", quantize=True, q_group_size=32)
    write_dense(tmp_path / "packed", tmp_path / "out")
    packed, path = mx.load(str(tmp_path / "packed" / "model.safetensors")), "model.layers.0.mlp.down_proj"
    scales, biases = (packed[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    exact = mx.dequantize(packed[f"{path}.weight"], scales, biases, group_size=32, bits=4)
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))[f"{path}.weight"]
    assert mx.array_equal(found, exact.astype(mx.bfloat16))


def test_a_large_model_has_an_index(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "SHARD_BYTES", 200_000)
    write_dense(tiny_checkpoint(), tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 1
    assert listed == {name: path.name for name, path in weight_files(tmp_path / "out").items()}


def test_the_card_is_for_transformers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_dense(tiny_checkpoint(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "vllm serve" in card and "mlx_lm" not in card and "MLX" not in card


@pytest.mark.parametrize("model_type", ["phi4flash", "phi4mm"])
def test_other_kinds_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    folder = WRITERS[model_type](tmp_path / "model")
    with pytest.raises(RequestError, match=rf"type {model_type}, which transformers and vLLM read in another layout"):
        write_dense(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
