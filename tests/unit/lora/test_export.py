"""Adapters to and from PEFT: refusals; equality of logits is tested in tests/conformance/test_peft.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.adapters.layers import adapter_layers, adapter_parameters, add_adapter, load_adapter, read_adapter
from phi4_mlx.adapters.peft import PEFT_FILE, scale_of
from phi4_mlx.checkpoint import load_model
from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError
from phi4_mlx.files.safetensors import read_header
from phi4_mlx.lora.export import FORMATS, from_peft, main, to_peft
from phi4_mlx.models.text import Model
from tests.adapters import adapted, save_adapter
from tests.counting_run import same
from tests.tiny_sambay import write_tiny_sambay

TinyModel = Callable[..., Model]


@pytest.fixture
def adapter(tiny_model: TinyModel, tmp_path: Path) -> Path:
    model = tiny_model()
    add_adapter(model, rank=4, scale=2.0)
    save_adapter(model, tmp_path / "adapter", {"model": "owner/name"})
    return tmp_path / "adapter"


@pytest.fixture
def peft(adapter: Path, tmp_path: Path) -> Path:
    to_peft(adapter, tmp_path / "peft")
    return tmp_path / "peft"


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def reconfigure(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config(folder) | fields))
    return folder


def rename(folder: Path, old: str, new: str) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace(old, new): array for name, array in mx.load(str(path)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    return folder


def test_the_layout_is_pefts(peft: Path) -> None:
    tensors = {name: info.shape for name, info in read_header(peft / "adapter_model.safetensors").items()}
    assert len(tensors) == 16
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (4, 160)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (96, 4)
    written = config(peft)
    assert written["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert (written["r"], written["lora_alpha"], written["layers_to_transform"]) == (4, 8, None)
    assert written["base_model_name_or_path"] == "owner/name"


def test_the_last_layers_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=3)
    add_adapter(model, num_layers=2, scale=0.3)
    save_adapter(model, tmp_path / "adapter", {})
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    assert config(tmp_path / "peft")["layers_to_transform"] == [1, 2]
    assert config(tmp_path / "peft")["lora_alpha"] == pytest.approx(2.4)


def test_places_that_differ_from_layer_to_layer_are_named_one_by_one(
    tiny_model: TinyModel, tiny_checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    to_peft(adapter, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {name: array for name, array in mx.load(str(path)).items() if "0.mlp.down" not in name}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    from_peft(tmp_path / "peft", tmp_path / "back")
    to_peft(tmp_path / "back", tmp_path / "again")
    written = config(tmp_path / "again")
    assert written["layers_to_transform"] is None and len(written["target_modules"]) == 7
    assert "model.layers.1.mlp.down_proj" in written["target_modules"]
    model = tiny_model()
    load_adapter(model, tmp_path / "again")
    assert len(adapter_parameters(model)) == 14


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"keys": ["attn.x_proj"]}, {"kind": "dora"}])
def test_blocks_that_differ_come_back_as_they_were(tmp_path: Path, options: dict[str, Any]) -> None:
    base = write_tiny_sambay(tmp_path / "hybrid")
    model = adapted(load_model(base), **options)
    before, ids = model(mx.array([[5, 6, 7]])), mx.array([[5, 6, 7]])
    save_adapter(model, tmp_path / "adapter", {})
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    names = {name.removesuffix(".lora_A.weight") for name in read_header(tmp_path / "peft" / PEFT_FILE) if "_A" in name}
    assert names == {f"base_model.model.{path}" for path in adapter_layers(model)}
    from_peft(tmp_path / "peft", tmp_path / "back", base)
    for folder in ("peft", "back"):
        other = load_model(base)
        load_adapter(other, tmp_path / folder)
        assert mx.array_equal(other(ids), before)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_an_adapter_of_pefts_names_places_that_some_blocks_lack(tmp_path: Path) -> None:
    base = write_tiny_sambay(tmp_path / "hybrid")
    model = adapted(load_model(base))
    save_adapter(model, tmp_path / "adapter", {})
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    assert config(tmp_path / "peft")["target_modules"] == [*adapter_layers(model)]
    reconfigure(tmp_path / "peft", target_modules=["in_proj", "out_proj", "Wqkv", "fc1", "fc2"])
    other = load_model(base)
    load_adapter(other, tmp_path / "peft")
    assert same(adapter_parameters(other), adapter_parameters(model))


def test_rslora_is_a_scale(peft: Path) -> None:
    assert scale_of(8, 4) == 2 and scale_of(8, 4, use_rslora=True) == 4
    assert read_adapter(peft).scale == 2
    assert read_adapter(reconfigure(peft, use_rslora=True)).scale == 4


def test_names_of_older_versions_are_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    add_adapter(model, kind="dora")
    save_adapter(model, tmp_path / "adapter", {})
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    rename(tmp_path / "peft", "lora_magnitude_vector", "lora_magnitude_vector.weight")
    load_adapter(model, tmp_path / "peft")
    assert len(adapter_parameters(model)) == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'; only 'LORA'"),
        ({"bias": "all"}, "bias = 'all' asks for maths"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"rank_pattern": {"qkv(proj": 8}}, r"rank_pattern has the key 'qkv\(proj': missing \)"),
        ({"alpha_pattern": {"(a+)+b": 8}}, r"alpha_pattern has the key '\(a\+\)\+b': it repeats too much"),
        ({"alpha_pattern": {".*.*.*.*.*x": 8}}, "it repeats too much"),
        ({"use_rslora": "false"}, "use_rslora = 'false'"),
        ({"use_dora": 1.5}, "use_dora = 1.5"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["a"]}, "target_parameters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_field_of_tomorrow": 3}, "some_field_of_tomorrow = 3"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(
    tiny_model: TinyModel, peft: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load_adapter(tiny_model(), reconfigure(peft, **fields))
    assert "\n" not in str(caught.value)


def test_fields_that_change_nothing_are_no_obstacle(tiny_model: TinyModel, peft: Path) -> None:
    harmless = {
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "task_type": None,
        "init_lora_weights": "gaussian",
        "runtime_config": {"ephemeral_gpu_offload": True},
    }
    load_adapter(tiny_model(), reconfigure(peft, **harmless, modules_to_save=[], lora_bias=False, some_field=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "has rank 4.*rank is 8"),
        ({"r": 0}, "r 0 and lora_alpha 8"),
        ({"r": None}, "r None"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_dropout": "0.1"}, "lora_dropout '0.1'"),
        ({"rank_pattern": {"qkv_proj": 8}}, "qkv_proj has rank 4.*rank is 8"),
        ({"rank_pattern": {"qkv_proj": 0}}, r"rank_pattern \{'qkv_proj': 0\}"),
        ({"rank_pattern": ["qkv_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"qkv_proj": float("nan")}}, "alpha_pattern"),
        ({"alpha_pattern": {"qkv_proj": True}}, "alpha_pattern"),
        ({"target_modules": ["qkv_proj"]}, r"layers\.0\.mlp\.down_proj is left over: target_modules"),
        ({"exclude_modules": ["layers.1.mlp.down_proj"]}, r"layers\.1\.mlp\.down_proj is left over"),
        ({"layers_to_transform": [1]}, r"layers\.0\..* is left over"),
        ({"layers_to_transform": "all"}, "layers_to_transform 'all'"),
        ({"layers_to_transform": []}, r"layers_to_transform \[\]"),
        ({"use_dora": True}, "lacks m"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tiny_model: TinyModel, peft: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tiny_model(), reconfigure(peft, **fields))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.mlp.down_proj.lora_A", "1.mlp.down_proj.lora_C", r"lora_C\.weight is left over"),
        ("1.mlp.down_proj.lora_A.weight", "1.mlp.down_proj.lora_A.default.weight", "is left over"),
        ("base_model.model.model.layers.1.mlp.down_proj.lora_A", "layers.1.lora_A", "is left over"),
        ("mlp.down_proj", "mlp.fc2.down_proj", r"layers\.0\.mlp\.fc2\.down_proj is not a linear layer"),
        ("mlp.down_proj", "mlp.fc2", r"layers\.0\.mlp\.fc2 is left over"),
    ],
)
def test_every_tensor_is_accounted_for(tiny_model: TinyModel, peft: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tiny_model(), rename(peft, old, new))


def test_pickle_is_never_read(tiny_model: TinyModel, peft: Path) -> None:
    (peft / "adapter_model.safetensors").rename(peft / "adapter_model.bin")
    with pytest.raises(RequestError, match=r"pickle, which is never read.*safe_serialization"):
        load_adapter(tiny_model(), peft)


def test_an_adapter_that_leaves_out_layers_needs_the_model(
    tiny_checkpoint: Callable[..., Path], peft: Path, tmp_path: Path
) -> None:
    for named in ([0, 1], [0, 1, 2]):
        with pytest.raises(RequestError, match="name the model with --model"):
            from_peft(reconfigure(peft, layers_to_transform=named), tmp_path / "back")
    from_peft(peft, tmp_path / "back", tiny_checkpoint(num_hidden_layers=3))
    written = config(tmp_path / "back")
    assert (written["num_layers"], written["layers_to_transform"]) == (3, [0, 1])
    to_peft(tmp_path / "back", tmp_path / "forth")
    assert config(tmp_path / "forth")["layers_to_transform"] == [0, 1]
    rename(peft, "layers.0", "layers.2")
    reconfigure(peft, layers_to_transform=[1, 2])
    with pytest.raises(CheckpointError, match=r"layers\.2.*is not a linear layer of this model"):
        from_peft(peft, tmp_path / "other", tiny_checkpoint("two"))
    with pytest.raises(RequestError, match="name the model with --model"):
        from_peft(reconfigure(peft, layers_to_transform=None), tmp_path / "other")


def test_the_command_does_both_ways(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter-path", str(adapter), "--peft", str(tmp_path / "p")]) == 0
    assert main(["--from-peft", str(tmp_path / "p"), "--adapter-path", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.count("ready for") == 2
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("way", FORMATS)
def test_a_format_is_written_and_the_way_on_is_told(
    way: str, adapter: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_checkpoint(original_max_position_embeddings=600), tmp_path / "my out"
    assert main(["--format", way, "--model", str(base), "--adapter-path", str(adapter), "--output", str(out)]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    names = {path.name for path in out.iterdir()}
    if way == "gguf":
        assert names == {"model.gguf", "Modelfile"}
        assert f"ollama create my-out -f '{out}/Modelfile'" in told.out
        assert "with num_ctx 512 or less, as in the Modelfile, answers are exact below 512 tokens" in told.out
    elif way == "peft":
        to_peft(adapter, tmp_path / "again")
        for name in ("adapter_config.json", PEFT_FILE):
            assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    else:
        assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
        other = load_model(out)
        model = load_model(base)
        load_adapter(model, adapter)
        ids = mx.array([[5, 6, 7]])
        assert mx.abs(other(ids) - model(ids)).max().item() < 1e-4
        assert ("chat with it" if way == "mlx" else "--max-model-len 600") in told.out


@pytest.mark.parametrize(("folder", "name"), [("-v", "v"), ("Größe", "gr-e"), ("模型", "model")])
def test_ollama_gets_a_name_that_it_takes(
    folder: str, name: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / folder
    assert main(["--format", "gguf", "--model", str(tiny_checkpoint()), "--output", str(out)]) == 0
    assert f"ollama create {name} -f " in capfd.readouterr().out


def test_a_type_has_no_effect_on_other_formats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "hf", "--model", "demo", "--output", str(tmp_path / "out"), "--type", "Q8_0"]) == 0
    assert "--type has no effect without --format gguf" in capfd.readouterr().err
    assert "quantization" not in config_of(tmp_path / "out")


def test_a_model_without_an_adapter_as_a_package(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "mlx", "--model", "demo", "--output", str(tmp_path / "out")]) == 0
    assert "quantization" in config_of(tmp_path / "out")


def config_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --peft --from-peft --format is required"),
        (["--peft", "{out}", "--from-peft", "{peft}"], "not allowed with"),
        (["--peft", "{out}", "--model", "m"], "--model m needs --from-peft"),
        (["--peft", "{out}", "--output", "o"], "--output o needs --format; choose one of gguf, hf, peft, mlx"),
        (["--format", "gguf", "--model", "demo"], "--format gguf needs --output, the new folder"),
        (["--format", "hf", "--output", "{out}"], "--format hf needs --model"),
        (["--format", "peft", "--output", "{out}"], "--format peft needs --adapter-path"),
        (["--format", "ggfu", "--output", "{out}"], "'ggfu' is not one of gguf, hf, peft, mlx; did you mean gguf?"),
        (["--format", "gguf", "--type", "Q4_0"], "'Q4_0' is not one of F16, BF16, Q8_0"),
        (["--format", "gguf", "--model", "demo", "--output", "{adapter}"], "already exists; remove it"),
        (["--format", "hf", "--model", "demo", "--output", "{adapter}"], "already exists; remove it"),
        (["--format", "hf", "--model", "demo-flash", "--output", "{out}"], "type phi4flash, which transformers and"),
        (["--format", "hf", "--model", "demo-multimodal", "--output", "{out}"], "--format mlx writes a package"),
        (["--format", "gguf", "--model", "demo-multimodal", "--output", "{out}"], "llama.cpp cannot run exactly"),
        *(
            (["--format", way, "--model", "demo", "--adapter-path", "{adapter}", "--output", "{out}"], "another model")
            for way in FORMATS
        ),
        (["--adapter-path", "{adapter}", "--peft", "{adapter}"], "already exists"),
        (["--adapter-path", "{peft}", "--peft", "{out}"], "has no lora_parameters"),
        (["--adapter-path", "nowhere", "--peft", "{out}"], "nowhere holds no adapter_config.json"),
        (["--from-peft", "{adapter}", "--adapter-path", "{out}"], "holds no adapter_model.safetensors"),
        (["--from-peft", "{peft}", "--adapter-path", "{peft}"], "already exists"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    adapter: Path, peft: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {"adapter": adapter, "peft": peft, "out": tmp_path / "out"}
    assert main([word.format(**places) for word in argv]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_fault_while_writing_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi4_mlx.adapters import folder as files

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_config", full)
    with pytest.raises(Phi4Error, match="No space left on device; nothing was left there"):
        to_peft(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_whole_weights_are_no_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_adapter(tiny_model().unfreeze(), tmp_path / "full", {})
    with pytest.raises(RequestError, match="holds full weights, not an adapter; convert it with `phi4-mlx fuse`"):
        to_peft(tmp_path / "full", tmp_path / "out")
    shutil.rmtree(tmp_path / "full")


def test_the_types_are_those_of_the_writer() -> None:
    from phi4_mlx.export import gguf_file
    from phi4_mlx.lora import export

    assert export.TYPES == gguf_file.TYPES
