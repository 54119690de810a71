"""`load`: Hugging Face folders, mlx-lm packages, the check of every tensor, and the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import checkpoint, load
from phi4_mlx.checkpoint import check_tensors, empty_model
from phi4_mlx.convert.package import convert
from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error, RequestError, TokenizerError
from phi4_mlx.files.safetensors import TensorInfo
from phi4_mlx.hub import DEFAULT_MODEL, NEEDED_FILES, resolve
from phi4_mlx.models.text import Model
from tests.conftest import TinyCheckpoint, TinyModel
from tests.presets import PRESETS

IDS = mx.array([[5, 6, 7, 8]])


def rewrite(folder: Path, **changes: mx.array | None) -> Path:
    """Replaces tensors of a checkpoint: name (with __ for each dot) -> array, or None to remove it."""
    path = folder / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    for name, array in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if array is not None:
            tensors[name.replace("__", ".")] = array
    mx.save_safetensors(str(path), tensors)
    return folder


def reconfigure(folder: Path, **fields: Any) -> Path:
    """Changes fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_hugging_face_folder_loads(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, dtype: mx.Dtype, shards: int
) -> None:
    model, tokenizer = load(tiny_checkpoint(seed=3, dtype=dtype, shards=shards))
    expected = tiny_model(seed=3)
    expected.set_dtype(dtype)
    assert mx.array_equal(model(IDS), expected(IDS))
    assert model(IDS).dtype == dtype
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_an_untied_model_loads(tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel) -> None:
    model, _ = load(tiny_checkpoint(tie_word_embeddings=False))
    assert mx.array_equal(model(IDS), tiny_model(tie_word_embeddings=False)(IDS))


def test_lazy_loading_gives_the_same_model(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    assert mx.array_equal(load(folder, lazy=True)[0](IDS), load(str(folder))[0](IDS))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_package_of_mlx_lm_loads(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, mixed: bool) -> None:
    """Also with quantisation settings per layer, and with some layers unquantised."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    folder, out = tiny_checkpoint("source", max_position_embeddings=1024), tmp_path / "package"
    theirs, config = load_model(folder)

    def recipe(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return {"group_size": 32, "bits": 8} if "o_proj" in path else "down_proj" not in path

    theirs, config = quantize_model(theirs, config, 32, 4, quant_predicate=recipe if mixed else None)
    save_model(out, theirs)
    save_config(config, out / "config.json")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((folder / file).read_bytes())
    ours, _ = load(out)
    ids = mx.random.randint(0, 512, (1, 70))  # past the boundary, where mlx-lm's single RoPE table is the right one
    assert mx.allclose(ours(ids), theirs(ids), atol=1e-4)
    layer = ours.layers[0]
    assert layer.self_attn.o_proj.bits == (8 if mixed else 4)
    assert isinstance(layer.mlp.down_proj, nn.Linear if mixed else nn.QuantizedLinear)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_packages_in_other_quantisation_modes_load(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, mode: str
) -> None:
    settings = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    model = tiny_model()
    nn.quantize(model, *settings, mode=mode)
    folder = tiny_checkpoint(quantization={"group_size": settings[0], "bits": settings[1], "mode": mode})
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    assert mx.array_equal(load(folder)[0](IDS), model(IDS))


def test_phi_4_mini_has_452_quantised_tensors() -> None:
    """129 matrices with weight, scales and biases, and 65 norms."""
    infos: dict[str, TensorInfo] = {}
    for name, array in tree_flatten(Model(PRESETS["phi-4-mini"]).parameters()):
        if "norm" not in name:
            rows, columns = array.shape
            infos[name] = TensorInfo("U32", (rows, columns // 8), 0, 0)
            infos[name.replace(".weight", ".scales")] = TensorInfo("BF16", (rows, columns // 64), 0, 0)
    raw = PRESETS["phi-4-mini"].to_dict() | {"quantization": {"group_size": 64, "bits": 4}}
    config = type(PRESETS["phi-4-mini"]).from_dict(raw)
    shapes = {n: tuple(a.shape) for n, a in tree_flatten(empty_model(config, infos).parameters())}
    assert len(shapes) == 452
    assert shapes["model.embed_tokens.weight"] == (200064, 384)
    assert shapes["model.embed_tokens.scales"] == shapes["model.embed_tokens.biases"] == (200064, 48)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (3072, 1024)


def test_tensors_that_can_be_derived_from_others_are_ignored(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel
) -> None:
    folder = rewrite(
        tiny_checkpoint(), lm_head__weight=mx.zeros((512, 96)),
        model__layers__0__self_attn__rotary_emb__inv_freq=mx.zeros(6),
    )  # fmt: skip
    assert mx.array_equal(load(folder)[0](IDS), tiny_model()(IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"model\.norm\.weight is missing"),
        ({"model__layers__0__mlp__down_proj__bias": mx.zeros(96)}, r"down_proj\.bias is unexpected"),
        ({"a": mx.zeros(1), "b": mx.zeros(1)}, r"2 tensors \(a, b\) are unexpected"),
        ({"model__layers__0__mlp__down_proj__lora_A__vision__weight": mx.zeros(4)}, r"lora_A.* is unexpected"),
        ({"model__norm__weight": mx.zeros(95)}, r"model\.norm\.weight has shape \[95\].*\[96\]"),
        ({"model__norm__weight": mx.zeros(96, mx.int32)}, r"model\.norm\.weight has dtype I32"),
        ({"model__norm__scales": mx.zeros(96)}, r"quantised, but config.json has no 'quantization'"),
    ],
)
def test_missing_unexpected_and_unfitting_tensors_are_refused_by_name(
    tiny_checkpoint: TinyCheckpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(rewrite(tiny_checkpoint(), **changes))
    assert "\n" not in str(caught.value)


def test_layers_beyond_the_config_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"6 tensors \(model\.layers\.1\.input_layernorm"):
        load(reconfigure(tiny_checkpoint(), num_hidden_layers=1))


def test_a_missing_shard_is_named(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(folder)


def test_an_invalid_quantisation_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = rewrite(tiny_checkpoint(), model__layers__0__mlp__down_proj__scales=mx.zeros((96, 5)))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(reconfigure(folder, quantization={"group_size": 33, "bits": 4}))


@pytest.mark.parametrize("own", [True, {"group_size": 32, "bits": 4}])
def test_the_quantisation_of_a_layer_may_be_true_or_settings(tiny_checkpoint: TinyCheckpoint, own: Any) -> None:
    source = tiny_checkpoint()
    convert(source, source.parent / "out", quantize=True, q_group_size=32)
    raw = json.loads((source.parent / "out" / "config.json").read_text())["quantization"]
    plain = load(source.parent / "out")[0](IDS)
    folder = reconfigure(source.parent / "out", quantization=raw | {"model.layers.0.mlp.down_proj": own})
    assert mx.array_equal(load(folder)[0](IDS), plain)


def test_a_folder_without_config_is_named(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load(folder)


def test_a_chat_format_can_be_chosen(tiny_checkpoint: TinyCheckpoint) -> None:
    assert load(tiny_checkpoint(), chat_format="phi4")[1].chat_format.name == "phi4"
    with pytest.raises(RequestError, match=r"'phi5' is unknown; known are .*phi4-mini"):
        load(tiny_checkpoint(), chat_format="phi5")


def test_a_folder_without_an_adapter_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(Phi4Error, match=r"adapter_config\.json"):
        load(tiny_checkpoint(), adapter_path=tmp_path)


@pytest.mark.parametrize(
    "name", ["nothing-here", "~nobody/here", "./nothing/here", "../x/y", "/nothing/here", "a/b/c", "", "a b/c"]
)
def test_an_unknown_name_suggests_the_demo(name: str) -> None:
    with pytest.raises(CheckpointError, match="--model demo"):
        resolve(name)


def test_the_name_demo_is_the_embedded_package() -> None:
    assert resolve("demo") == Path(checkpoint.__file__).parent / "demo"


def test_the_needed_files_are_downloaded_at_a_pinned_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    downloads: list[tuple[str | None, list[str], bool]] = []  # revision, patterns, cached files only

    def snapshot_download(
        repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool, tqdm_class: type
    ) -> str:
        downloads.append((revision, allow_patterns, local_files_only))
        return str(tmp_path)

    names = ("config.json", "model-1.safetensors", "x.py", "x/config.json")
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha="c" * 40)
    single: list[tuple[str, str]] = []  # file, commit

    def unreachable(*_: Any, **options: Any) -> None:
        raise RuntimeError("no route to the Hub")  # any exception

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, revision: single.append((name, revision)))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **options: info)
    assert resolve(DEFAULT_MODEL) == tmp_path
    assert single == [("config.json", "c" * 40), ("model-1.safetensors", "c" * 40)]
    resolve(DEFAULT_MODEL, "main")
    resolve("owner/name")
    pinned, patterns = "ac1c269cb4222a4e136a3d09edad301056c1f36a", list(NEEDED_FILES)
    assert downloads == [(pinned, patterns, False), ("main", patterns, False), (None, patterns, False)]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    resolve("owner/name")
    assert downloads[-1] == (None, patterns, True)  # falls back to the cached files
    assert not any("py" in pattern.rpartition(".")[2] for pattern in NEEDED_FILES)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_suggests_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    reason = "HF_HUB_OFFLINE is set" if offline else "cannot be reached"
    with pytest.raises(CheckpointError, match=f"{reason}; --model demo") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_tensors_can_be_checked_from_the_headers_alone(tiny_model: TinyModel) -> None:
    model = tiny_model()
    infos = {name: TensorInfo("F32", tuple(a.shape), 0, 0) for name, a in tree_flatten(model.parameters())}
    assert check_tensors(model, infos) == set(infos)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(TokenizerError, match=r"the tokenizer has \d+ ids and the embedding 256 rows; get both"):
        load(tiny_checkpoint(vocab_size=256))
