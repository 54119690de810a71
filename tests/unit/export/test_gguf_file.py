"""GGUF files as the gguf package reads them, and refusals; tests/e2e/test_llama_cpp.py runs them in llama.cpp."""

from __future__ import annotations

import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, dequantize
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import load_model
from phi4_mlx.convert.exact import ExactParameter
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError, TokenizerError
from phi4_mlx.export import gguf_file
from phi4_mlx.export.gguf_file import Exported, write_gguf
from tests.adapters import adapted, save_adapter
from tests.conftest import DATA, TinyCheckpoint, TinyModel, write_tiny_checkpoint
from tests.kinds import WRITERS

LONG = {"original_max_position_embeddings": 300, "max_position_embeddings": 4096}


def tensors(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> type and numbers in fp32."""
    reader = GGUFReader(folder / "model.gguf")
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()}


def weight(model: Any, path: str) -> np.ndarray:
    return np.array(dict(tree_flatten(model.parameters()))[path].astype(mx.float32))


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)])
@pytest.mark.parametrize("tied", [True, False])
def test_each_tensor_has_its_type_and_its_numbers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str, tolerance: float, tied: bool
) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=tied, **LONG)
    assert write_gguf(folder, tmp_path / "out", kind=kind) == Exported(
        (tmp_path / "out" / "model.gguf").stat().st_size, 256
    )
    model, found = load_model(folder), tensors(tmp_path / "out")
    assert ("output.weight" in found) is not tied
    assert len(found) == 2 * 6 + 2 + (not tied) + 2
    for name, path in {
        "token_embd": "embed_tokens", "output_norm": "norm", "blk.1.attn_norm": "layers.1.input_layernorm",
        "blk.0.ffn_norm": "layers.0.post_attention_layernorm", "blk.0.attn_qkv": "layers.0.self_attn.qkv_proj",
        "blk.1.attn_output": "layers.1.self_attn.o_proj", "blk.0.ffn_up": "layers.0.mlp.gate_up_proj",
        "blk.1.ffn_down": "layers.1.mlp.down_proj",
    }.items():  # fmt: skip
        own, numbers = found[f"{name}.weight"]
        expected = weight(model, f"model.{path}.weight")
        sensitive = kind == "Q8_0" and name.endswith(("embd", "qkv"))
        assert own == ("F32" if numbers.ndim == 1 else "F16" if sensitive else kind), name
        assert np.abs(numbers - expected).max() < (1e-7 if own == "F32" else tolerance * 0.5), name
    rope = model.config.rope_scaling
    for name, table in (("long", rope.long_factor), ("short", rope.short_factor)):
        assert found[f"rope_factors_{name}.weight"][0] == "F32"
        np.testing.assert_allclose(found[f"rope_factors_{name}.weight"][1], table, rtol=1e-6)


def test_the_metadata_is_the_models(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_gguf(tiny_checkpoint(**LONG), tmp_path / "out")
    found = fields(tmp_path / "out")
    expected = {
        "general.architecture": "phi3", "general.file_type": 1, "phi3.context_length": 4096, "phi3.block_count": 2,
        "phi3.embedding_length": 96, "phi3.feed_forward_length": 160, "phi3.attention.head_count": 6,
        "phi3.attention.head_count_kv": 2, "phi3.rope.dimension_count": 12, "phi3.rope.freq_base": 10000.0,
        "phi3.rope.scaling.original_context_length": 300, "phi3.attention.sliding_window": 0, "phi3.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o", "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["phi3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    factor = (1 + np.log(4096 / 300) / np.log(300)) ** 0.5
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(factor, rel=1e-6)
    spec = json.loads((DATA / "tiny_tokenizer" / "tokenizer.json").read_text())
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 512 and tokens[511] == "[PAD511]" and types[511] == 5
    for text, token in spec["model"]["vocab"].items():
        assert (tokens[token], types[token]) == (text, 1)
    for each in spec["added_tokens"]:
        assert (tokens[each["id"]], types[each["id"]]) == (each["content"], 3 if each["special"] else 4)
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert tokens[found["tokenizer.ggml.eot_token_id"]] == "<|end|>"
    assert "tool_call" in found["tokenizer.chat_template"]


def test_a_name_does_not_change_how_llama_cpp_reads_texts(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("my-Phi-3.5-and-phi3")
    write_gguf(folder, tmp_path / "out")
    assert fields(tmp_path / "out")["general.name"] == "my-Phi 3.5-and-phi 3"


def test_the_modelfile_beside_it(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_gguf(tiny_checkpoint(**LONG), tmp_path / "out")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and lines[1].startswith('TEMPLATE """')
    assert 'PARAMETER stop "<|end|>"' in lines and "PARAMETER num_ctx 256" in lines
    assert write_gguf(tiny_checkpoint("one-table", rope_scaling=None), tmp_path / "plain").exact_context is None
    assert write_gguf(tiny_checkpoint("small"), tmp_path / "short").exact_context == 0  # 256 tokens exceed its table
    for name in ("plain", "short"):
        assert "num_ctx" not in (tmp_path / name / "Modelfile").read_text()
    assert not [name for name in tensors(tmp_path / "plain") if "rope" in name]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("quantize", [False, True])
def test_an_adapter_is_merged_in_fp32(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str, quantize: bool
) -> None:
    folder = tiny_checkpoint()
    if quantize:
        convert(folder, tmp_path / "packed", quantize=True, q_group_size=32)
        folder = tmp_path / "packed"
    model = load_model(folder)
    if kind == "full":
        model.model.norm.unfreeze()
        model.freeze()
        model.model.norm.unfreeze()
        model.model.norm.weight = model.model.norm.weight + 1
    else:
        adapted(model, kind)
    save_adapter(model, tmp_path / "adapter", {})
    write_gguf(folder, tmp_path / "out", tmp_path / "adapter")
    found = tensors(tmp_path / "out")
    ids = mx.array([[5, 6, 7, 8]])
    plain = write_tiny_checkpoint(tmp_path / "plain")
    other = load_model(plain)
    names = {
        "model.layers.{}.self_attn.qkv_proj": "attn_qkv", "model.layers.{}.self_attn.o_proj": "attn_output",
        "model.layers.{}.mlp.gate_up_proj": "ffn_up", "model.layers.{}.mlp.down_proj": "ffn_down",
        "model.layers.{}.input_layernorm": "attn_norm", "model.layers.{}.post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    own = {path.format(n): f"blk.{n}.{name}" for n in (0, 1) for path, name in names.items()}
    own |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    other.load_weights([(f"{path}.weight", mx.array(found[f"{name}.weight"][1])) for path, name in own.items()])
    assert mx.abs(other(ids) - model(ids)).max().item() < 2e-2
    assert mx.abs(other(ids) - load_model(folder)(ids)).max().item() > 0.2


def test_a_tensor_is_read_and_written_in_blocks(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds one block of rows at a time, whatever the size of the tensor."""
    sizes: list[int] = []
    exact = ExactParameter.exact

    def counted(self: ExactParameter, first: int, last: int) -> mx.array:
        sizes.append((last - first) * (self.width if self.name.endswith("proj.weight") else 1))
        return exact(self, first, last)

    monkeypatch.setattr(ExactParameter, "exact", counted)
    monkeypatch.setattr("phi4_mlx.convert.weights.BLOCK_BYTES", 8192)
    write_gguf(tiny_checkpoint(), tmp_path / "out")
    assert max(sizes) * 4 <= 8192 and len(sizes) > 40
    monkeypatch.undo()
    write_gguf(tmp_path / "tiny", tmp_path / "whole")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()


def test_bytes_of_the_source_are_told(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_gguf(tiny_checkpoint(), tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1]


@pytest.mark.parametrize("model_type", ["phi4flash", "phi4mm"])
def test_other_kinds_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    folder = WRITERS[model_type](tmp_path / "model")
    with pytest.raises(RequestError, match=rf"type {model_type}, which llama\.cpp cannot run exactly.*--format mlx"):
        write_gguf(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24, "rope_scaling": None}, "head_dim 24 times 6 heads is not hidden_size 96"),
        ({"vocab_size": 480}, "the tokenizer has 500 ids and the embedding 480 rows"),
    ],
)
def test_shapes_that_llama_cpp_does_not_have(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Phi4Error, match=message):
        write_gguf(tiny_checkpoint(**change), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_pattern_that_llama_cpp_does_not_have(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tiny_checkpoint() / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    path.write_text(json.dumps(spec))
    with pytest.raises(RequestError, match=r"splits texts by the pattern .*which llama\.cpp does not have"):
        write_gguf(tmp_path / "tiny", tmp_path / "out")


def test_a_chat_format_by_name(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    write_gguf(folder, tmp_path / "out", chat_format="phi3.5-mini")
    assert "tool_call" not in fields(tmp_path / "out")["tokenizer.chat_template"]
    with pytest.raises(TokenizerError, match=r"lacks '<\|im_end\|>', which the chat format uses"):
        write_gguf(folder, tmp_path / "other", chat_format="phi4")


def test_sentencepiece_scores_follow_the_merges(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    for file in (DATA / "tiny_sentencepiece").glob("*.json"):
        shutil.copy(file, folder)
    write_gguf(folder, tmp_path / "out")
    found, spec = fields(tmp_path / "out"), json.loads((folder / "tokenizer.json").read_text())
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert found["general.name"] == "tiny + phi3"  # for this word llama.cpp removes white space after control tokens
    vocab, scores = spec["model"]["vocab"], found["tokenizer.ggml.scores"]
    made = [scores[vocab["".join(pair)]] for pair in spec["model"]["merges"]]
    first = [score for n, score in enumerate(made) if score not in made[:n]]
    assert first == sorted(first, reverse=True) and first[0] == -1
    types = found["tokenizer.ggml.token_type"]
    assert types[vocab["<0x0A>"]] == 6 and types[vocab["<unk>"]] == 2
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    spec["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RequestError, match=r"a space before the first text alone, which llama\.cpp does not have"):
        write_gguf(folder, tmp_path / "other")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_numbers_too_large_for_f16(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str) -> None:
    path = tiny_checkpoint() / "model.safetensors"
    weights = dict(mx.load(str(path)).items())
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + mx.array([1e7 if n == 3 else 0 for n in range(160)])
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    message = rf"{name} has numbers too large for {kind}, such as 1e\+07; use --type BF16"
    with pytest.raises(RequestError, match=message):
        write_gguf(tmp_path / "tiny", tmp_path / "out", kind=kind)
    write_gguf(tmp_path / "tiny", tmp_path / "out", kind="BF16")


def test_an_adapter_for_another_model(tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model(hidden_size=192)), tmp_path / "adapter", {})
    with pytest.raises(CheckpointError, match="the adapter is for another model"):
        write_gguf(tiny_checkpoint(), tmp_path / "out", tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_the_target_exists_or_is_a_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(RequestError, match="already exists; remove it"):
        write_gguf(folder, folder)
    with pytest.raises(RequestError, match=r"out\.gguf is the name of a file; name a folder, for model\.gguf and"):
        write_gguf(folder, tmp_path / "out.gguf")
    with pytest.raises(RequestError, match="type 'Q4_0' is not known; known are F16, BF16, Q8_0"):
        write_gguf(folder, tmp_path / "out", kind="Q4_0")


@pytest.mark.parametrize("found", [None, ModuleSpec("gguf", None, is_package=True)], ids=["nothing", "a folder"])
def test_without_the_gguf_package(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: ModuleSpec | None
) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: found)
    with pytest.raises(RequestError, match=r"which writes GGUF files, is not installed: .* -m pip install 'gguf>="):
        write_gguf(tiny_checkpoint(), tmp_path / "out")


@pytest.mark.parametrize("moment", ["before", "weights", "close"])
def test_a_full_disk_leaves_nothing(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tiny_checkpoint()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    message = "No space left on device; nothing was left there"
    if moment == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        message = r"has 1.00 KB free and the package needs .*; make room"
    else:
        monkeypatch.setattr(GGUFWriter, "write_tensor_data" if moment == "weights" else "close", full)
    with pytest.raises(RequestError, match=message):
        write_gguf(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_damaged_weight(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tiny_checkpoint() / "model.safetensors"
    weights = dict(mx.load(str(path)).items())
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight contains NaN"):
        write_gguf(tmp_path / "tiny", tmp_path / "out")


