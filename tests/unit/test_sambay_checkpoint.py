"""Checkpoints of Phi-4-mini-flash-reasoning: two dtypes, other layouts, damaged numbers, and the packages of them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import load
from phi4_mlx.checkpoint import load_model
from phi4_mlx.convert.package import convert
from phi4_mlx.convert.quantize import make_recipe
from phi4_mlx.convert.weights import plan
from phi4_mlx.errors import CheckpointError, ConfigError
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.files.safetensors import read_header, weight_files
from tests.conftest import TinyCheckpoint
from tests.tiny_sambay import make_tiny_sambay, write_tiny_sambay
from tests.unit.config.test_sambay import CONFIG, PUBLISHED, expected_shapes
from tests.unit.test_checkpoint import reconfigure, rewrite

IDS = mx.array([[5, 6, 7, 8] * 8])
A_LOG, LAMBDA = "model.layers.0.attn.A_log", "model.layers.1.attn.inner_cross_attn.lambda_q1"
HUGGING_FACE = "get the folder that is published on Hugging Face$"
CONV = "model.layers.0.attn.conv1d.weight"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """In bfloat16, A_log and the lambdas in float32."""
    return write_tiny_sambay(tmp_path / "tiny", dtype=mx.bfloat16)


def stored(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in set(weight_files(folder).values()) for name, array in mx.load(str(path)).items()}


def error(logits: mx.array, expected: mx.array) -> float:
    """RMS error in deviations of the logits."""
    logits, expected = logits.astype(mx.float32), expected.astype(mx.float32)
    return float((mx.square(logits - expected).mean() / mx.var(expected)).item()) ** 0.5


def in_float32(name: str) -> bool:
    return name.endswith("A_log") or "lambda_" in name


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    path = folder / "model.safetensors"
    tensors = {change(name): array for name, array in mx.load(str(path)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    return folder


# --- loading ---


def test_a_checkpoint_of_two_dtypes_keeps_both(published: Path) -> None:
    model, _ = load(published)
    found = stored(published)
    assert {in_float32(name) for name in found} == {True, False}
    assert model.dtype == mx.bfloat16
    parameters = dict(tree_flatten(model.parameters()))
    assert all(each.dtype == (mx.float32 if in_float32(name) else mx.bfloat16) for name, each in parameters.items())
    assert mx.array_equal(parameters[A_LOG], found[A_LOG])


@pytest.mark.parametrize(
    "dtype", [{A_LOG: mx.bfloat16}, {"model.layers.0.attn.D": mx.float32}, {LAMBDA: mx.float16, A_LOG: mx.float16}]
)
def test_a_tensor_in_another_dtype_is_as_good(published: Path, dtype: dict[str, mx.Dtype]) -> None:
    before = load(published)[0](IDS)
    tensors = stored(published)
    mx.eval(before, tensors)
    folder = rewrite(published, **{name: tensors[name].astype(other) for name, other in dtype.items()})
    assert error(load(folder)[0](IDS), before) < 0.05


def test_shards_and_a_copy_of_the_tied_head_are_read(published: Path) -> None:
    expected = load(published)[0](IDS)
    tensors = stored(published)
    mx.eval(expected)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    mx.eval(tensors)
    (published / "model.safetensors").unlink()
    listed = {}
    for n in range(3):
        file = f"model-{n + 1:05}-of-00003.safetensors"
        part = dict(list(tensors.items())[n::3])
        mx.save_safetensors(str(published / file), part)
        listed |= dict.fromkeys(part, file)
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert mx.array_equal(load_model(published)(IDS), expected)


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    folder = write_tiny_sambay(tmp_path / "tiny", tie_word_embeddings=False)
    assert mx.allclose(load_model(folder)(IDS), make_tiny_sambay(tie_word_embeddings=False)(IDS), atol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [A_LOG, LAMBDA, "model.layers.4.attn.conv1d.weight", "model.layers.2.attn.D"])
def test_numbers_that_are_not_finite_are_refused_by_name(published: Path, name: str, value: float, lazy: bool) -> None:
    """An infinite A_log computes logits that are numbers."""
    array = stored(published)[name]
    mx.eval(array)
    array[-1] = value
    rewrite(published, **{name: array})
    with pytest.raises(CheckpointError, match=rf"{name} contains NaN or infinity; the checkpoint is damaged"):
        load(published, lazy=lazy)
    with pytest.raises(CheckpointError, match=rf"{name} contains NaN or infinity"):
        convert(published, published.parent / "out", quantize=True, q_group_size=32)


def without(infix: str) -> Callable[[str], str]:
    return lambda name: name.replace(infix, "")


LAYOUTS: dict[str, tuple[Callable[[str], str], str]] = {
    "A for A_log": (lambda name: name.replace("A_log", "A"), "vLLM or SGLang"),
    "lambdas of the layer": (without("inner_cross_attn."), "vLLM or SGLang"),
    "mamba": (lambda name: name.replace("0.attn.", "0.mamba."), "vLLM or SGLang"),
    "queries": (lambda name: name.replace("Wqkv", "qkv_proj"), "vLLM or SGLang"),
    "gate and up": (lambda name: name.replace("fc1", "gate_up_proj"), "vLLM or SGLang"),
    "attention": (lambda name: name.replace(".attn.", ".self_attn."), "vLLM or SGLang"),
    "transformer": (lambda name: name.replace("model.", "transformer."), "TensorRT-LLM"),
    "mixer": (lambda name: name.replace("model.layers", "backbone.layers").replace("attn", "mixer"), "mamba_ssm"),
    "blocks": (lambda name: name.replace("model.layers", "blk"), "llama.cpp"),
    "no prefix": (without("model."), "another program or architecture"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tensors_of_another_program_are_named_with_the_program(published: Path, layout: str) -> None:
    change, program = LAYOUTS[layout]
    pattern = rf"^(.+ is|\d+ tensors \(.+\) are) missing .* unexpected: it has the tensors of {program}; {HUGGING_FACE}"
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(rename(published, change))
    assert "\n" not in str(caught.value)


def test_a_model_that_has_such_names_itself_names_no_program(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = rename(tiny_checkpoint(), lambda name: name.replace("self_attn.qkv", "self_attn.q"))
    with pytest.raises(CheckpointError, match="has the tensors of another program or architecture; get the folder"):
        load(folder)


def test_a_checkpoint_without_an_a_log_is_refused_by_name(published: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{A_LOG} is missing from the checkpoint; it is incomplete"):
        load(rewrite(published, **{A_LOG: None}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (CONV, lambda a: a.transpose(0, 2, 1), rf"\[128, 4, 1\].*order.*{HUGGING_FACE}"),
        (CONV, lambda a: a.squeeze(1), r"shape \[128, 4\]; config.json asks .*\[128, 1, 4"),
        (A_LOG, lambda a: a.mean(axis=1), r"shape \[128\]; config\.json asks for \[128, 4\]$"),
        (A_LOG, lambda a: a.T, rf"shape \[4, 128\].*in the order of another program; {HUGGING_FACE}"),
        (A_LOG, lambda a: a.astype(mx.int32), "dtype I32; it must be F16 or BF16 or F32"),
    ],
)
def test_a_tensor_in_another_shape_is_refused_by_name(
    published: Path, name: str, change: Callable[[mx.array], mx.array], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^{name} has .*{message}"):
        load(rewrite(published, **{name: mx.contiguous(change(stored(published)[name]))}))


def test_a_folder_of_tensorrt_llm_is_named(published: Path) -> None:
    (published / "model.safetensors").rename(published / "rank0.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no model\*.safetensors \(rank.* are TensorRT-LLM's\)"):
        load(published)
    (published / "config.json").write_text(json.dumps({"architecture": "Phi4FlashForCausalLM", "mapping": {}}))
    with pytest.raises(ConfigError, match=f"no model_type, as those of TensorRT-LLM; {HUGGING_FACE}"):
        load(published)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 12}, {"hidden_size": 128}, {"mamba_d_state": 8}])
def test_a_config_of_another_size_is_refused(published: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^[^\n]*(missing from the checkpoint|config\.json asks for)[^\n]*$"):
        load(reconfigure(published, **fields))


# --- converting ---

DENSE = (".A_log", ".D", "conv1d.", "x_proj.", "dt_proj.", "lambda_", "norm", "subln", ".bias")


def converted(folder: Path, **options: Any) -> dict[str, mx.array]:
    """The tensors of a package, which is verified; it stands beside the checkpoint."""
    out = folder.parent / f"out{len(list(folder.parent.iterdir()))}"
    convert(folder, out, **options)
    verify_manifest(out)
    load(out, verify=True)
    return stored(out)


@pytest.mark.parametrize("source", [mx.bfloat16, mx.float32, mx.float16])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", [{}, {"quantize": True, "q_group_size": 32}])
def test_a_cast_leaves_the_numbers_that_stay_in_float32(
    tmp_path: Path, source: mx.Dtype, dtype: str | None, options: dict[str, Any]
) -> None:
    folder = write_tiny_sambay(tmp_path / "tiny", dtype=source)
    before, after = stored(folder), converted(folder, dtype=dtype, **options)
    for name, array in before.items():
        if in_float32(name):
            assert after[name].dtype == mx.float32 and mx.array_equal(after[name], array)
        elif after[name].dtype != mx.uint32:
            assert after[name].dtype == (source if dtype is None else getattr(mx, dtype))
            assert mx.array_equal(after[name], array.astype(after[name].dtype))


def test_a_cast_of_a_narrow_a_log_does_not_narrow_it_further(published: Path) -> None:
    narrow = stored(published)[A_LOG].astype(mx.bfloat16)
    mx.eval(narrow)
    rewrite(published, **{A_LOG: narrow})
    assert converted(published)[A_LOG].dtype == mx.bfloat16
    cast = converted(published, dtype="float16")[A_LOG]
    assert cast.dtype == mx.float32 and mx.array_equal(cast, narrow.astype(mx.float32))


def test_four_bits_leave_dense_what_the_scan_and_the_lambdas_need(published: Path) -> None:
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "do_sample": True}))
    expected = load(published)[0](IDS)
    before, after = stored(published), converted(published, quantize=True, q_group_size=32, embed_bits=8)
    matrices = {name for name in before if f"{name.removesuffix('.weight')}.scales" in after}
    assert matrices == {name for name in before if not any(part in name for part in DENSE)}
    out = published.parent / "out1"
    assert json.loads((out / "generation_config.json").read_text())["do_sample"] is True
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["model_type"]) == ("bfloat16", "phi4flash")
    four = {"bits": 4, "group_size": 32, "mode": "affine"}
    assert config["quantization"] == four | {"model.embed_tokens": four | {"bits": 8}}
    assert error(load(out)[0](IDS), expected) < 0.6


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_package_is_copied_dequantised_and_quantised_again(published: Path, mode: str) -> None:
    convert(published, published.parent / "small", quantize=True, q_mode=mode, q_group_size=32)
    small = published.parent / "small"
    copy, dense = converted(small), converted(small, dequantize=True)
    again = converted(small, dequantize=True, quantize=True, q_bits=8, q_group_size=32)
    for name, array in stored(small).items():
        assert mx.array_equal(copy[name], array)
        if any(part in name for part in DENSE) and not name.endswith(".biases"):
            assert mx.array_equal(dense[name], array) and mx.array_equal(again[name], array)
    assert not any(name.endswith(".scales") for name in dense)
    assert error(load(published.parent / "out3")[0](IDS), load(small)[0](IDS)) < 0.1  # matrices rounded to bfloat16


# --- full size, from the headers ---


def write_header(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with path.open("r+b") as file:
        file.truncate(8 + len(raw) + end)


def test_the_published_checkpoint_loads_and_converts_from_its_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    kinds = {name: ("F32" if in_float32(name) else "BF16", shape) for name, shape in expected_shapes().items()}
    first = {name: kind for name, kind in kinds.items() if "layers.1" in name or "layers.2" not in name}
    index = {}
    for n, part in enumerate((first, {name: kind for name, kind in kinds.items() if name not in first}), 1):
        write_header(tmp_path / f"model-{n:05}-of-00002.safetensors", part)
        index |= dict.fromkeys(part, f"model-{n:05}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load_model(tmp_path)
    assert model.weights_bytes == 7_706_608_640
    assert mx.get_peak_memory() - before < 200 * 2**20  # what is checked as it is loaded
    assert model.config == CONFIG

    parameters = plan(tmp_path, CONFIG, make_recipe("affine", None, None, None), None, False)
    assert sum(each.input_bytes for each in parameters) == 7_706_608_640
    quantised = [each for each in parameters if each.target]
    assert len(quantised) == 1 + 32 * 4 and not any(part in each.path for each in quantised for part in DENSE)
    dense = sum(each.output_bytes for each in parameters if not each.target)
    assert dense == 2 * sum(math.prod(shape) for name, (_, shape) in kinds.items() if any(p in name for p in DENSE)) + (
        2 * sum(math.prod(shape) for kind, shape in kinds.values() if kind == "F32")
    )
    total = sum(each.output_bytes for each in parameters)
    assert 8 * total / 3_852_562_944 == pytest.approx(4.55, abs=0.02)  # bits a parameter
    assert read_header(tmp_path / "model-00001-of-00002.safetensors")[A_LOG].dtype == "F32"
