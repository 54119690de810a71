"""The content of a package, and that it is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.convert import package
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error, RequestError, TokenizerError
from phi4_mlx.files.manifest import read_manifest, verify_manifest
from phi4_mlx.files.safetensors import TensorWriter, read_header, weight_files
from tests.conftest import DATA, ROOT
from tests.packages import left_beside

Checkpoint = Callable[..., Path]
FOUR_BITS: dict[str, Any] = {"quantize": True, "q_group_size": 32}


@pytest.fixture
def source(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("source", dtype=mx.bfloat16)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- its content ---


def test_a_package_has_these_files_and_no_others(source: Path, tmp_path: Path) -> None:
    for name in ("modeling_phi3.py", "README.md", "training_args.bin", "notes.txt", "manifest.json"):
        (source / name).write_text("{}")
    for name in ("LICENSE", "merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json"):
        (source / name).write_text("{}\n")
    convert(source, tmp_path / "out", **FOUR_BITS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE", "README.md", "added_tokens.json", "config.json", "generation_config.json", "manifest.json",
        "merges.txt", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.json",
    ]  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "vocab.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert left_beside(tmp_path / "out") == ["out"]
    verify_manifest(tmp_path / "out")


def test_config_has_the_keys_that_the_swift_loader_and_mlx_lm_require(source: Path, tmp_path: Path) -> None:
    """mlx-swift-lm: Phi3Configuration, BaseConfiguration, Load.swift; mlx-lm: models/phi3.py ModelArgs, load_model."""
    convert(source, tmp_path / "out", **FOUR_BITS, embed_bits=8)
    config = read(tmp_path / "out" / "config.json")
    required_by_swift = {
        "hidden_size": int, "num_hidden_layers": int, "intermediate_size": int, "num_attention_heads": int,
        "rms_norm_eps": float, "vocab_size": int, "num_key_value_heads": int, "max_position_embeddings": int,
        "original_max_position_embeddings": int,
    }  # fmt: skip
    # Optional in Swift, with defaults that are wrong for Phi-4-mini: full rotation, an untied head.
    needed_anyway = {
        "rope_theta": float, "rope_scaling": dict, "partial_rotary_factor": float, "tie_word_embeddings": bool,
        "model_type": str, "quantization": dict, "eos_token_id": list,
    }  # fmt: skip
    for key, kind in (required_by_swift | needed_anyway).items():
        assert type(config[key]) is kind, key
    assert config["model_type"] == "phi3"
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}  # `type`, not `rope_type`
    assert config["rope_scaling"]["type"] == "longrope"
    assert not {"auto_map", "rope_parameters", "model_file"} & set(config)
    # Swift takes every other key of `quantization` for a layer's path, with false or the same settings as value.
    quantization = config["quantization"]
    assert quantization == {
        "group_size": 32, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    assert config["quantization_config"] == quantization


def test_tensors_have_the_names_that_all_loaders_read(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", **FOUR_BITS)
    names = read_header(tmp_path / "out" / "model.safetensors").keys()
    layers = [
        f"model.layers.{n}.{layer}.{part}"
        for n in range(2)
        for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        for part in ("weight", "scales", "biases")
    ]
    kinds = ("input_layernorm", "post_attention_layernorm")
    norms = [f"model.layers.{n}.{kind}.weight" for n in range(2) for kind in kinds]
    embedding = [f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")]
    assert sorted(names) == sorted([*layers, *norms, *embedding, "model.norm.weight"])


def test_a_config_in_the_layout_of_transformers_5_is_written_in_the_one_that_all_read(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plain = read(tiny_checkpoint("a") / "config.json")
    rope = plain.pop("rope_scaling") | {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    source = tiny_checkpoint("b", rope_parameters=rope)
    raw = read(source / "config.json")
    del raw["rope_theta"]
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["rope_theta"] == 10000.0 and "rope_parameters" not in config
    assert config["torch_dtype"] == "float32"


def test_every_token_that_ends_an_answer_is_named_in_both_files(source: Path, tmp_path: Path) -> None:
    ends = read(source / "generation_config.json")["eos_token_id"]
    config = read(source / "config.json") | {"eos_token_id": ends[1]}  # a single id, as in Microsoft's file
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "stock")
    stock = (tmp_path / "stock" / "generation_config.json").read_bytes()
    assert stock == (source / "generation_config.json").read_bytes()
    assert read(tmp_path / "stock" / "config.json")["eos_token_id"] == ends

    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[1], "temperature": 0.5}))
    convert(source, tmp_path / "single")
    generation = read(tmp_path / "single" / "generation_config.json")
    assert generation == {"eos_token_id": ends[::-1], "temperature": 0.5, "bos_token_id": 1, "pad_token_id": 0}

    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "none")
    assert read(tmp_path / "none" / "generation_config.json")["eos_token_id"] == sorted(ends, reverse=True)


def test_tokenizer_config_is_corrected_only_where_loaders_would_differ(source: Path, tmp_path: Path) -> None:
    path = source / "tokenizer_config.json"
    given = read(path)
    template = given["chat_template"]

    (source / "chat_template.jinja").write_text(template)  # the same template twice is harmless
    convert(source, tmp_path / "same")
    assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()

    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(source, tmp_path / "other")
    assert "chat_template" not in read(tmp_path / "other" / path.name)
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "{{ messages }}"

    (source / "chat_template.jinja").unlink()
    del given["clean_up_tokenization_spaces"]  # true by default in Swift
    path.write_text(json.dumps(given))
    convert(source, tmp_path / "spaces")
    assert read(tmp_path / "spaces" / path.name) == given | {"clean_up_tokenization_spaces": False}


def test_the_manifest_records_that_the_merges_agree(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "yes")
    manifest = read_manifest(tmp_path / "yes")
    assert manifest["tokenizer_merges_agree"] == manifest["files"]["tokenizer.json"]["sha256"]
    monkeypatch.setattr("phi4_mlx.tokens.byte_bpe.merges_agree", lambda spec: pytest.fail("checked a second time"))
    load(tmp_path / "yes")
    monkeypatch.undo()
    shutil.copy(DATA / "disagreeing" / "tokenizer.json", source)
    convert(source, tmp_path / "no")
    assert "tokenizer_merges_agree" not in read_manifest(tmp_path / "no")


def test_more_than_one_shard_has_an_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "SHARD_BYTES", 40_000)
    convert(source, tmp_path / "out", **FOUR_BITS)
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    index = read(out / "model.safetensors.index.json")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    infos = {name: info for path in out.glob("*.safetensors") for name, info in read_header(path).items()}
    assert index["metadata"]["total_size"] == sum(info.end - info.start for info in infos.values())
    assert {name: path.name for name, path in weight_files(out).items()} == index["weight_map"]
    verify_manifest(out)
    load(out, verify=True)


def test_load_verify_finds_a_flipped_bit(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", **FOUR_BITS)
    load(tmp_path / "out", verify=True)
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 4
    weights.write_bytes(data)
    load(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model.safetensors does not match its SHA-256"):
        load(tmp_path / "out", verify=True)


def test_a_package_of_ours_can_be_unpacked_and_packed_again(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(tiny_checkpoint(), tmp_path / "four", **FOUR_BITS)
    convert(tmp_path / "four", tmp_path / "copy")
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (tmp_path / "four" / "manifest.json").read_bytes()
    convert(tmp_path / "four", tmp_path / "plain", dequantize=True)
    assert "quantization" not in read(tmp_path / "plain" / "config.json")
    convert(tmp_path / "four", tmp_path / "eight", dequantize=True, quantize=True, q_bits=8, q_group_size=32)
    ids = mx.array([[5, 6, 7]])
    four, plain, eight = (load(tmp_path / name)[0](ids) for name in ("four", "plain", "eight"))
    assert mx.abs(plain - four).max() < 1e-4
    assert 1e-4 < mx.abs(eight - four).max() < 0.2


# --- bad input: one line, and nothing left ---


def _edit_config(**fields: Any) -> Callable[[Path], object]:
    return lambda f: (f / "config.json").write_text(json.dumps(read(f / "config.json") | fields))


def _extra_tensor(folder: Path) -> None:
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    tensors["model.layers.9.mlp.down_proj.weight"] = mx.zeros(3)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def _linked_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "tokenizer.json")


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], type[Phi4Error], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json is missing"),
    "wrong JSON": (lambda f: (f / "config.json").write_text("{"), ConfigError, "not JSON"),
    "other architecture": (_edit_config(model_type="llama"), ConfigError, "llama"),
    "unknown rope": (_edit_config(rope_scaling={"type": "ntk"}), ConfigError, "ntk"),
    "wrong shape": (_edit_config(intermediate_size=192), CheckpointError, "has shape"),
    "missing tensor": (_edit_config(num_hidden_layers=3), CheckpointError, "missing from the checkpoint"),
    "extra tensor": (_extra_tensor, CheckpointError, "is unexpected"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "holds no model"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), CheckpointError, "damaged"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), TokenizerError, "does not exist"),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("x"), TokenizerError, "not JSON"),
    "tokenizer elsewhere": (_linked_tokenizer, CheckpointError, "outside the folder"),
    "generation config not JSON": (lambda f: (f / "generation_config.json").write_text("["), ConfigError, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_checkpoint_gives_one_line_and_leaves_nothing(case: str, source: Path, tmp_path: Path) -> None:
    damage, kind, reason = BAD_SOURCES[case]
    damage(source)
    with pytest.raises(kind, match=reason) as caught:
        convert(source, tmp_path / "out", **FOUR_BITS)
    assert "\n" not in str(caught.value)
    assert left_beside(tmp_path / "out") == []


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint(vocab_size=100)
    with pytest.raises(TokenizerError, match="100 rows"):
        convert(source, tmp_path / "out")
    assert left_beside(tmp_path / "out") == []


def test_a_shard_cut_anywhere_gives_no_package(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    rng = random.Random(2)
    cuts = [*range(0, 40, 4), *(rng.randrange(len(whole)) for _ in range(190)), len(whole) - 1]
    assert len(cuts) > 200
    for cut in cuts:
        weights.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"damaged|is not a safetensors file"):
            convert(source, tmp_path / "out", **FOUR_BITS)
        assert left_beside(tmp_path / "out") == [], f"cut at {cut}"
    weights.write_bytes(whole)
    convert(source, tmp_path / "out", **FOUR_BITS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"embed_bits": 6}, "does nothing without -q"),
        ({"q_bits": 3, "q_mode": "mxfp4"}, "does nothing without -q"),
        ({"quantize": True, "q_bits": 4.0}, "--q-bits 4.0"),
        ({"quantize": True, "q_bits": 7}, "--q-bits 7"),
        ({"quantize": True, "q_mode": "gptq"}, "--q-mode 'gptq'"),
        ({"quantize": True, "q_group_size": 64}, "--q-group-size 32 would"),
        ({"dequantize": True}, "not quantised"),
    ],
)
def test_options_that_contradict_are_refused(
    options: dict[str, Any], reason: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=reason):
        convert(source, tmp_path / "out", **options)
    assert left_beside(tmp_path / "out") == []


@pytest.mark.parametrize("named", [None, [2, 2], 2])
def test_every_end_of_turn_is_named_once(named: Any, source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    convert(source, tmp_path / "out", **FOUR_BITS)
    listed = read(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert sorted(listed) == sorted(load(tmp_path / "out")[1].eos_ids)


# --- whole or absent ---


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_target_is_refused_before_any_work(
    make: Callable[[Path], object], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "resolve", lambda *_: pytest.fail("resolved before checking the target"))
    make(tmp_path / "out")
    with pytest.raises(RequestError, match="already exists"):
        convert(source, tmp_path / "out")
    assert left_beside(tmp_path / "out") == ["out"]


def test_an_unwritable_target_is_reported_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "resolve", lambda *_: pytest.fail("resolved before checking the target"))
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out")


def test_too_little_room_is_reported_before_any_weight_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(package, "write_shard", lambda *_: pytest.fail("wrote"))
    with pytest.raises(RequestError, match=r"1\.00 KB free"):
        convert(source, tmp_path / "out")
    assert left_beside(tmp_path / "out") == []


class Fault:
    """Fails at the n-th fsync, write of a tensor or a file, or rename, as on a full disk or by Ctrl-C."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException):
        self.calls = 0
        self.at, self.error = at, error
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_bytes"), (TensorWriter, "append")):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            return function(*args)

        return call


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_a_fault_at_any_step_leaves_nothing_and_the_rerun_works(
    error: BaseException, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        steps = Fault(patch, 0, error)
        convert(source, out, **FOUR_BITS)
        shutil.rmtree(out)
    assert steps.calls > 40
    for at in range(1, steps.calls):  # at the last step, the fsync of the parent, the package is complete
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, error)
            with pytest.raises((RequestError, KeyboardInterrupt)) as caught:
                convert(source, out, **FOUR_BITS)
            if isinstance(error, OSError):
                assert str(caught.value) == f"{out} cannot be written: No space left on device; nothing was left there"
        assert left_beside(out) == [], f"step {at}"
    convert(source, out, **FOUR_BITS)
    load(out, verify=True)


def test_the_converter_is_imported_from_a_checkout() -> None:
    code = "import phi4_mlx.convert, phi4_mlx.convert.package as p; print(p.__name__, phi4_mlx.convert.__path__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("phi4_mlx.convert.package"), done.stderr
