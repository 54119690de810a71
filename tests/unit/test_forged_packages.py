"""Numbers and names in packages and adapters that would end in a panic, an OverflowError or endless memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load
from phi4_mlx.adapters.folder import CHECKSUMS_FILE, TENSORS_FILE
from phi4_mlx.errors import CheckpointError, ConfigError, Phi4Error, RequestError, TokenizerError
from phi4_mlx.generation.stream import generate
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.hub import resolve
from tests.adapters import adapted, save_adapter
from tests.conftest import TinyCheckpoint, TinyModel
from tests.unit.test_checkpoint import reconfigure, rewrite

DIGITS = "9" * 6000  # Python refuses to convert so many
DOWN = "model.layers.1.mlp.down_proj"


def retokenize(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes tokenizer.json."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("number", [-1, 2**24, 2**32, 2**32 + 5, 2**64, 10**400, 1.5, "7", None, True])
def test_an_id_that_is_no_id_is_refused_by_name(tiny_checkpoint: TinyCheckpoint, number: Any) -> None:
    folder = retokenize(tiny_checkpoint(), lambda spec: spec["model"]["vocab"].update(forged=number))
    with pytest.raises(TokenizerError, match=r"'forged' has id .*; ids are whole numbers below 16,777,216"):
        load(folder)
    folder = retokenize(tiny_checkpoint(), lambda spec: spec["added_tokens"][-1].update(id=number))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: added token"):
        load(folder)


@pytest.mark.parametrize("setting", ["continuing_subword_prefix", "end_of_word_suffix"])
@pytest.mark.parametrize("text", ["##", "a" * 100_000, "é" * 1000])
def test_pieces_that_mark_words_are_refused_by_name(tiny_checkpoint: TinyCheckpoint, setting: str, text: str) -> None:
    folder = retokenize(tiny_checkpoint(), lambda spec: spec["model"].update({setting: text}))
    with pytest.raises(TokenizerError, match=f"{setting} .* is not of this family"):
        load(folder)


def test_a_panic_of_the_library_is_an_error_in_one_line(tiny_checkpoint: TinyCheckpoint) -> None:
    forged = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    folder = retokenize(tiny_checkpoint(), lambda spec: spec.update(normalizer=forged))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used: Precompiled"):
        load(folder)


@pytest.mark.parametrize("text", ["a" * 100_000, "", 7, None])
def test_the_text_of_a_control_token_has_a_limit(tiny_checkpoint: TinyCheckpoint, text: Any) -> None:
    folder = retokenize(tiny_checkpoint(), lambda spec: spec["added_tokens"][-1].update(content=text))
    with pytest.raises(TokenizerError, match="added token"):
        load(folder)


@pytest.mark.parametrize("end", [511, 1024, 2**24 - 1])
def test_an_end_marker_beyond_the_vocabulary_is_no_obstacle(tiny_checkpoint: TinyCheckpoint, end: int) -> None:
    """Also under a grammar, where only the others can end the answer."""
    model, tokenizer = load(reconfigure(tiny_checkpoint(), eos_token_id=end))
    assert end in tokenizer.eos_ids
    constraint = Constraint(json_schema({"enum": [True]}), tokenizer, 512)
    assert generate(model, tokenizer, [1, 2], max_tokens=9, logits_mask=constraint).strip() == "true"


def test_a_grammar_needs_an_end_marker_within_the_vocabulary(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = retokenize(tiny_checkpoint(), lambda spec: spec.update(added_tokens=[]))
    (folder / "generation_config.json").unlink()
    _, tokenizer = load(reconfigure(folder, eos_token_id=1024), chat_format="phi4-mini")
    with pytest.raises(RequestError, match="has no token that ends a turn"):
        Constraint(json_schema({"enum": [True]}), tokenizer, 512)


@pytest.mark.parametrize("end", [-1, 2**24, 2**40, 10**400, 1.5, "2", True, [2, None], {}])
def test_an_end_marker_that_is_no_id_is_refused(tiny_checkpoint: TinyCheckpoint, end: Any) -> None:
    with pytest.raises(TokenizerError, match=r"eos_token_id .* is neither a token id nor a list of ids") as caught:
        load(reconfigure(tiny_checkpoint(), eos_token_id=end))
    assert "\n" not in str(caught.value)


def test_a_layer_number_of_thousands_of_digits_is_a_name_like_any_other(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, tmp_path: Path
) -> None:
    name = f"model.layers.{DIGITS}.mlp.down_proj"
    with pytest.raises(CheckpointError, match=r"model\.layers\.9+") as caught:
        load(rewrite(tiny_checkpoint(), **{f"{name}.weight": mx.zeros(1)}))
    assert len(str(caught.value)) <= 1500 and str(caught.value).endswith("does not have them")
    save_adapter(adapted(tiny_model()), tmp_path / "adapter", {})
    path = tmp_path / "adapter" / TENSORS_FILE
    tensors = {each.replace(DOWN, name): array for each, array in mx.load(str(path)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    (tmp_path / "adapter" / CHECKSUMS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"is not a linear layer of this model") as caught:
        load(tiny_checkpoint(), adapter_path=tmp_path / "adapter")
    assert len(str(caught.value)) <= 1500


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", ".", "..", "a\0b", "sub/model.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    folder = tiny_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    for shard in folder.glob("model-*"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"is not the name|is missing|not a regular file|outside the"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": ' + "[" * 150 + "]" * 150 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_deep_nesting_is_refused(tiny_checkpoint: TinyCheckpoint, name: str, text: str) -> None:
    folder = tiny_checkpoint()
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name} (is not JSON|is nested more than 100 levels deep)"):
        load(folder)


@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "head_dim"]
)
@pytest.mark.parametrize("value", [10**18, 2**24 + 1, -1, 0, 96.5, True, float("nan"), "96", [96]])
def test_sizes_that_are_no_sizes_are_refused_before_anything_is_made(
    tiny_checkpoint: TinyCheckpoint, field: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a whole number from 1 to"):
        load(reconfigure(tiny_checkpoint(), **{field: value}))


def test_a_message_is_one_line_of_limited_length() -> None:
    error = Phi4Error("begin\n" + "x" * 10**6 + " the way out")
    assert str(error).startswith("begin x") and str(error).endswith(" the way out") and len(str(error)) <= 1500
    assert str(Phi4Error(str(error))) == str(error)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "/" + "b" * 300, "x\0y"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        resolve(name)


@pytest.mark.parametrize("rank", [{}, [], "4", 4.0, True, 5, 0, -1, 10**400])
def test_a_rank_that_is_none_is_refused(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, tmp_path: Path, rank: Any
) -> None:
    save_adapter(adapted(tiny_model()), tmp_path / "adapter", {})
    path = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["lora_parameters"]["rank"] = rank
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="rank"):
        load(tiny_checkpoint(), adapter_path=tmp_path / "adapter")
