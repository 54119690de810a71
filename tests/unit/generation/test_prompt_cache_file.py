"""Prompt cache files: decoding continues bit-exactly; damaged files and those of another model are refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx import load_prompt_cache, save_prompt_cache
from phi4_mlx.adapters.layers import adapter_off, add_adapter
from phi4_mlx.checkpoint import load_model
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.files.dtypes import name_of
from phi4_mlx.files.safetensors import TensorWriter, read_whole_header
from phi4_mlx.models.cache import CacheOptions, KVCache
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.sambay import Model as SambaY
from phi4_mlx.models.text import Model
from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.char_tokenizer import CharTokenizer
from tests.conftest import BOUNDARY, TinyCheckpoint, TinyModel
from tests.conftest import TOKENIZER as TOKENIZER_FILES
from tests.damage import flipped_bits
from tests.model_runs import close, decoded, filled_cache, random_ids
from tests.tiny_sambay import make_tiny_sambay

TOKENIZER = CharTokenizer()
WIDE = {"num_attention_heads": 3, "num_key_value_heads": 1}  # head_dim 32, which can be quantised


def filled(model: Model, n: int = 40, **options: Any) -> PromptCache:
    return filled_cache(model, random_ids(n), **options)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("length", [1, 40, BOUNDARY, BOUNDARY + 1, 300])
def test_a_loaded_cache_continues_bit_exactly(
    tiny_model: TinyModel, tmp_path: Path, bits: int | None, length: int
) -> None:
    model = tiny_model(**WIDE)
    cache = filled(model, length, kv_bits=bits)
    size = save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER)
    assert size == (tmp_path / "kept").stat().st_size
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    assert (loaded.offset, loaded.regime) == (length, "short" if length <= BOUNDARY else "long")
    assert mx.array_equal(loaded.ids, cache.ids) and [layer.bits for layer in loaded] == [bits] * 2
    for seed, n in enumerate((1, 3, 30, 1)):  # the third chunk takes 40 and 64 cached tokens past the boundary
        assert mx.array_equal(model(random_ids(n, seed), loaded), model(random_ids(n, seed), cache))
    assert loaded.regime == cache.regime and loaded.rerun_tokens == cache.rerun_tokens


def test_a_crossing_after_loading_equals_a_prefill_of_the_whole_sequence(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    save_prompt_cache(tmp_path / "kept", filled(model, BOUNDARY), model, TOKENIZER)
    loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
    new = random_ids(10, 1)
    whole = model(mx.concatenate([random_ids(BOUNDARY), new], axis=1))[:, -10:]
    assert close(model(new, loaded), whole)
    assert loaded.rerun_tokens == BOUNDARY and loaded.regime == "long"


def test_the_options_and_the_metadata_of_a_cache_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    cache = filled(model, 20, regime="long", max_kv_size=512)
    cache.trim(5)
    save_prompt_cache(tmp_path / "kept", cache, model, TOKENIZER, {"title": "é\n", "text": ""})
    loaded, metadata = load_prompt_cache(tmp_path / "kept", model, TOKENIZER, return_metadata=True)
    assert metadata == {"title": "é\n", "text": ""}
    assert (loaded.offset, loaded.regime, loaded.options) == (15, "long", CacheOptions("long", None, 512))
    for n in (1, 505, 1):
        assert mx.array_equal(model(random_ids(n, n), loaded), model(random_ids(n, n), cache))
    assert not loaded.is_trimmable() and loaded.rerun_tokens == 0


def test_a_loaded_cache_is_reused_up_to_the_first_new_token(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    save_prompt_cache(tmp_path / "kept", filled(model, 40), model, TOKENIZER)
    history = random_ids(40)[0].tolist()
    for shared, new in ((40, [1, 2, 3]), (17, [511 - history[17]]), (0, [511 - history[0], 5])):
        loaded = load_prompt_cache(tmp_path / "kept", model, TOKENIZER)
        assert loaded.reuse([*history[:shared], *new]) == new and loaded.offset == shared


@pytest.mark.slow
def test_every_flipped_bit_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, path = tiny_model(**WIDE), tmp_path / "kept"
    for bits in (None, 4):
        save_prompt_cache(path, filled(model, 7, kv_bits=bits), model, TOKENIZER, {"text": "A text with é in it"})
        whole, header = path.read_bytes(), len(read_whole_header(path).raw)
        draw = random.Random(bits)
        end = len(whole) - 32  # where the checksum starts
        places = [*range(header), *draw.sample(range(header, end), 300), *range(end, len(whole))]
        for place in flipped_bits(path, places, draw):
            with pytest.raises(CheckpointError, match=r"cache-prompt|is no prompt cache") as refused:
                load_prompt_cache(path, model, TOKENIZER)
            assert "\n" not in str(refused.value), place
        load_prompt_cache(path, model, TOKENIZER)


def test_truncated_reordered_and_extended_files_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    whole, header = path.read_bytes(), len(read_whole_header(path).raw)
    a = header + 40 * 4  # after the ids
    b, c = a + 16 * 4, a + 2 * 16 * 4  # one and two tokens further
    swapped = whole[:a] + whole[b:c] + whole[a:b] + whole[c:]
    ids = whole[:header] + whole[header + 4 : header + 8] + whole[header : header + 4] + whole[header + 8 :]
    zeroed = whole[:a] + bytes(4096) + whole[a + 4096 :]
    for damaged in (b"", whole[:7], whole[:100], whole[:header], whole[:-1], whole + b"\0", swapped, ids, zeroed):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is (damaged: .*|not a prompt cache file); make one"):
            load_prompt_cache(path, model, TOKENIZER)


def forged(path: Path, change: Callable[[dict[str, mx.array], dict[str, str]], Any]) -> None:
    """Writes a cache again with another content and a checksum that is right."""
    header = read_whole_header(path)
    tensors, about = dict(mx.load(str(path), format="safetensors")), dict(header.metadata)
    mx.eval(tensors)
    del tensors["checksum"], about["format"]
    change(tensors, about)
    layout = {name: (name_of(array.dtype), array.shape) for name, array in tensors.items()}
    path.unlink()
    with TensorWriter(path, layout | {"checksum": ("U8", (32,))}, about) as writer:
        digest = hashlib.sha256(writer.header)
        for name, array in tensors.items():
            data = bytes(memoryview(mx.contiguous(array).view(mx.uint8))) if array.size else b""
            digest.update(data)
            writer.append(name, data)
        writer.append("checksum", digest.digest())


KEYS = "layers.0.keys"
SIZES = {"phi4_mlx.pinned", "phi4_mlx.kv_bits", "phi4_mlx.max_kv_size", "phi4_mlx.regime"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t, m: t.update(ids=mx.array([512] * 40, mx.int32)), "token 512 of the prompt is outside"),
        (lambda t, m: t.update(ids=mx.array([-1] * 40, mx.int32)), "token -1 of the prompt is outside"),
        (lambda t, m: t.update(ids=t["ids"][:39]), r"layers.0.keys is .* of shape \[1, 2, 40, 16\], not"),
        (lambda t, m: t.update(ids=t["ids"][:0]), "0 tokens"),
        (lambda t, m: t.update(ids=t["ids"][None]), r"ids are mlx.core.int32 of shape \[1, 40\]"),
        (lambda t, m: t.update(ids=t["ids"].astype(mx.float32)), "ids are mlx.core.float32"),
        (lambda t, m: t.pop("ids"), "it lacks 'ids'"),
        (lambda t, m: t.update({KEYS: t[KEYS][:, :1]}), r"of shape \[1, 1, 40, 16\], not"),
        (lambda t, m: t.update({KEYS: t[KEYS].reshape(-1)}), "of shape"),
        (lambda t, m: t.update({KEYS: t[KEYS].astype(mx.float16)}), "is mlx.core.float16"),
        (lambda t, m: t.update({KEYS: t[KEYS] * mx.nan}), f"{KEYS} contains NaN or inf"),
        (lambda t, m: t.update({KEYS: t[KEYS] * mx.inf}), f"{KEYS} contains NaN or inf"),
        (lambda t, m: t.pop(KEYS), f"it lacks '{KEYS}'"),
        (lambda t, m: t.update({"layers.9.keys": t[KEYS]}), "'layers.9.keys' is left over"),
        (lambda t, m: m.update({"phi4_mlx.kv_bits": "4"}), "head_dim"),
        (lambda t, m: m.update({"phi4_mlx.kv_bits": "1" * 6000}), "Exceeds the limit"),
        (lambda t, m: m.update({"phi4_mlx.max_kv_size": "[]"}), "max_kv_size must be a whole number"),
        (lambda t, m: m.update({"phi4_mlx.pinned": '"medium"'}), "regime 'medium' is unknown"),
        (lambda t, m: m.update({"phi4_mlx.pinned": '"long"'}), "its options do not allow"),
        (lambda t, m: m.update({"phi4_mlx.pinned": "[" * 10**5}), "recursion"),
        (lambda t, m: m.update({"phi4_mlx.regime": "null"}), "cannot be under the RoPE table None"),
        (lambda t, m: m.update({"phi4_mlx.regime": "{"}), "Expecting"),
        (lambda t, m: m.pop("phi4_mlx.regime"), "it lacks 'phi4_mlx.regime'|it lacks 'regime'"),
    ],
)
def test_a_forged_cache_is_one_line(tiny_model: TinyModel, tmp_path: Path, change: Any, complaint: str) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    forged(path, lambda tensors, about: None)
    assert load_prompt_cache(path, model, TOKENIZER).offset == 40
    forged(path, change)
    expected = rf"is not a prompt cache of this model: .*({complaint}).*; make one"
    with pytest.raises(CheckpointError, match=expected) as refused:
        load_prompt_cache(path, model, TOKENIZER)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_any_forged_cache_is_refused_or_harmless(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Seeded mutations of content and metadata under a right checksum: a Phi4Error, or a cache that continues."""
    model, path, draw = tiny_model(), tmp_path / "kept", random.Random(5)
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    whole = path.read_bytes()

    values = ["null", "-1", "0", "4", "8", "1e999", "NaN", '"long"', '"short"', "512", "[]", "true", str(2**70), ""]
    arrays: list[Callable[[mx.array], mx.array]] = [
        lambda array: mx.concatenate([array, array], axis=-1),
        lambda array: array[:1],
        lambda array: array[..., :1],
        lambda array: array[None],
        lambda array: array.reshape(-1),
        lambda array: array.view(mx.uint8),
        lambda array: array * 0,
        lambda array: (array.astype(mx.float32) * mx.nan).astype(array.dtype),
        lambda array: (array.astype(mx.float32) * 1e38).astype(array.dtype),
        lambda array: mx.zeros((0,), array.dtype),
        lambda array: mx.swapaxes(array, 0, -1),
    ]

    def change(tensors: dict[str, mx.array], about: dict[str, str]) -> None:
        for _ in range(draw.randint(1, 2)):
            if draw.random() < 0.5:
                about[draw.choice(sorted(SIZES))] = draw.choice(values)
            else:
                name = draw.choice(sorted(tensors))
                tensors[name] = draw.choice(arrays)(tensors[name])

    taken = 0
    for _ in range(150):
        path.write_bytes(whole)
        forged(path, change)
        try:
            loaded = load_prompt_cache(path, model, TOKENIZER)
        except CheckpointError as refused:
            assert "\n" not in str(refused)
        else:
            mx.eval(model(random_ids(3), loaded))
            assert loaded.offset == 43
            taken += 1
    assert taken < 50


def test_other_files_are_refused(tiny_model: TinyModel, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    with pytest.raises(CheckpointError, match="No such file"):
        load_prompt_cache(path, model, TOKENIZER)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_prompt_cache(tmp_path, model, TOKENIZER)
    with pytest.raises(CheckpointError, match="is not a prompt cache file"):
        load_prompt_cache(tiny_checkpoint() / "model.safetensors", model, TOKENIZER)
    for other in (b"", b'{"a": 1}', b"a text of some length, and no prompt cache", b"PK\3\4" + bytes(100)):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match="kept is not a prompt cache file; make one with"):
            load_prompt_cache(path, model, TOKENIZER)
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    old = b'"phi4_mlx_prompt_cache":"2"'
    path.write_bytes(path.read_bytes().replace(old, old.replace(b"2", b"9")))
    with pytest.raises(CheckpointError, match="has format '9'; only 2, 3 and 4 are supported"):
        load_prompt_cache(path, model, TOKENIZER)


def test_another_model_or_tokenizer_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    load_prompt_cache(path, tiny_model(), TOKENIZER)  # an equal model
    nearly = tiny_model()
    weight = nearly.layers[1].mlp.down_proj.weight
    weight[17, 5] = weight[17, 5] * 1.0000002  # everything except one number is the same
    for other in (tiny_model(seed=1), tiny_model(rms_norm_eps=1e-6), nearly):
        with pytest.raises(CheckpointError, match="was made with another model, and fits no other"):
            load_prompt_cache(path, other, TOKENIZER)
    renamed = CharTokenizer()
    renamed.fingerprint = lambda: "others"  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="was made with another tokenizer"):
        load_prompt_cache(path, model, renamed)


def test_another_adapter_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    add_adapter(model, scale=2.0)
    with pytest.raises(CheckpointError, match="was made without an adapter, and fits no other"):
        load_prompt_cache(path, model, TOKENIZER)
    with adapter_off(model):  # computes as the base alone, bit for bit
        assert load_prompt_cache(path, model, TOKENIZER).offset == 40
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    add_adapter(model, scale=2.0)
    load_prompt_cache(path, model, TOKENIZER)
    for seed, scale in ((1, 2.0), (0, 3.0)):
        add_adapter(model, scale=scale, seed=seed)
        with pytest.raises(CheckpointError, match="was made with another adapter"):
            load_prompt_cache(path, model, TOKENIZER)
    with adapter_off(model), pytest.raises(CheckpointError, match="was made with an adapter, and fits no other"):
        load_prompt_cache(path, model, TOKENIZER)


def test_caches_that_cannot_be_saved_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    full = filled(model, 500, max_kv_size=512)
    model(random_ids(100), full)
    two = filled_cache(model, random_ids(5, B=2))
    unknown = model.make_cache()
    for layer in unknown:
        layer.update_and_fetch(mx.zeros((1, 2, 3, 16)), mx.zeros((1, 2, 3, 16)))
    for cache, complaint in (
        (model.make_cache(), "it has 0 tokens; prefill a prompt first"),
        (full, "it has dropped its oldest tokens"),
        (two, "it has 2 sequences"),
        (unknown, "the ids of all its tokens, only of 0 of 3;"),
        ([KVCache()], "a list cannot be saved"),
    ):
        with pytest.raises(RequestError, match=complaint):
            save_prompt_cache(path, cache, model, TOKENIZER)  # type: ignore[arg-type]
        assert not [*tmp_path.iterdir()]


def test_only_a_regular_file_is_replaced(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, pipe, link = tiny_model(), tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "kept")
    for path in (pipe, tmp_path, ""):
        with pytest.raises(RequestError, match="is not a regular file, so it is not replaced; name another file"):
            save_prompt_cache(path, filled(model), model, TOKENIZER)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and {*tmp_path.iterdir()} == {pipe, link}
    save_prompt_cache(link, filled(model), model, TOKENIZER)
    assert load_prompt_cache(link, model, TOKENIZER).offset == 40


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"phi4_mlx_prompt_cache": "9"}, "name 'phi4_mlx_prompt_cache' is reserved by the format"),
        ({"phi4_mlx.model": "x"}, "is reserved by the format"),
        ({"format": "x"}, "name 'format' is reserved"),
        ({"a": 9}, "'a': 9 must be two texts in UTF-8"),
        ({9: 9}, "must be two texts in UTF-8"),
        ({"a": b"b"}, "must be two texts in UTF-8"),
        ({"a": "\ud800"}, "must be two texts in UTF-8"),
    ],
)
def test_metadata_that_the_format_cannot_keep_is_refused(
    tiny_model: TinyModel, tmp_path: Path, metadata: Any, complaint: str
) -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match=complaint):
        save_prompt_cache(tmp_path / "kept", filled(model), model, TOKENIZER, metadata)
    assert not [*tmp_path.iterdir()]


def test_a_failed_save_leaves_the_older_file(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny_model(), tmp_path / "kept"
    save_prompt_cache(path, filled(model), model, TOKENIZER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi4_mlx.generation.prompt_cache_content.hashlib.sha256", full)
    with pytest.raises(OSError, match="No space left"):
        save_prompt_cache(path, filled(model, 50), model, TOKENIZER)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_checkpoint_loaded_a_second_time_is_accepted(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(dtype=mx.bfloat16)
    model = load_model(folder)
    save_prompt_cache(tmp_path / "kept", filled(model), model, TOKENIZER)
    assert load_prompt_cache(tmp_path / "kept", load_model(folder), TOKENIZER).offset == 40


def test_the_fingerprint_of_a_tokenizer_depends_on_the_meaning_of_its_ids(tmp_path: Path) -> None:
    spec = json.loads((TOKENIZER_FILES / "tokenizer.json").read_text())

    def fingerprint(edit: Callable[[dict[str, Any]], Any] = lambda spec: None) -> str:
        changed = json.loads(json.dumps(spec))
        edit(changed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        return load_tokenizer(tmp_path).fingerprint()

    added = spec["added_tokens"]
    last = added[-1]["content"]
    assert fingerprint() == fingerprint(lambda spec: spec.update(truncation=None))
    others = [
        fingerprint(lambda spec: spec["added_tokens"].pop()),
        fingerprint(lambda spec: spec["added_tokens"][-1].update(content="x" * len(last))),
        fingerprint(lambda spec: spec["model"]["vocab"].update({"qqq": added[-1]["id"] + 1})),
    ]
    ending = load_tokenizer(tmp_path)
    ending.eos_ids |= {5}
    assert len({fingerprint(), *others, ending.fingerprint()}) == 5


LENGTH = "layers.0.snapshots.40.length"


@pytest.fixture(scope="module")
def sambay() -> SambaY:
    return make_tiny_sambay(seed=5)


def snapped(model: SambaY) -> PromptCache:
    """A cache of 100 tokens with snapshots after 40, 80 and 99 of them."""
    cache = model.make_cache()
    decoded(model, random_ids(100)[0].tolist(), 1, cache=cache, prefill_step_size=40)
    assert [each.length for each in cache.snapshots] == [40, 80, 99]
    return cache


@pytest.mark.parametrize("shared", [100, 99, 90, 50, 40, 39])
def test_a_loaded_cache_returns_to_the_snapshots_of_the_saved_one(sambay: SambaY, tmp_path: Path, shared: int) -> None:
    cache, history = snapped(sambay), random_ids(100)[0].tolist()
    save_prompt_cache(tmp_path / "kept", cache, sambay, TOKENIZER)
    loaded = load_prompt_cache(tmp_path / "kept", sambay, TOKENIZER)
    prompt = [*history[:shared], 511 - history[shared - 1], 7]
    rest, expected = loaded.reuse(prompt), cache.reuse(prompt)
    assert rest == expected and len(rest) == len(prompt) - max(n for n in (0, 40, 80, 99, 100) if n <= shared)
    assert mx.array_equal(sambay(mx.array([rest]), loaded), sambay(mx.array([rest]), cache))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t, m: m.update({"phi4_mlx.snapshots": "[40, 80]"}), r"'layers.\d+.snapshots.99.\w+' is left over"),
        (lambda t, m: m.update({"phi4_mlx.snapshots": "[40, 80, 99, 101]"}), "it lacks 'layers.0.snapshots.101"),
        (lambda t, m: m.update({"phi4_mlx.snapshots": "[80, 40, 99]"}), "are not the lengths of at most 8 snapshots"),
        (lambda t, m: m.update({"phi4_mlx.snapshots": '{"a": 1}'}), "are not the lengths of at most 8 snapshots"),
        (lambda t, m: m.update({"phi4_mlx.snapshots": "[true]"}), "are not the lengths of at most 8 snapshots"),
        (lambda t, m: m.update({"phi4_mlx.snapshots": "["}), "Expecting value"),
        (lambda t, m: m.pop("phi4_mlx.snapshots"), "is left over"),
        (lambda t, m: t.update({LENGTH: t[LENGTH] + 1}), "its snapshot after 40 tokens holds another number of them"),
        (lambda t, m: t.pop(LENGTH), f"it lacks '{LENGTH}'"),
        (lambda t, m: t.update({LENGTH.replace("length", "conv"): mx.zeros((1, 1))}), "of shape"),
    ],
)
def test_forged_snapshots_are_one_line(sambay: SambaY, tmp_path: Path, change: Any, complaint: str) -> None:
    path = tmp_path / "kept"
    save_prompt_cache(path, snapped(sambay), sambay, TOKENIZER)
    forged(path, lambda tensors, about: None)
    assert load_prompt_cache(path, sambay, TOKENIZER).offset == 100
    forged(path, change)
    with pytest.raises(CheckpointError, match=rf"is not a prompt cache of this model: .*({complaint})") as refused:
        load_prompt_cache(path, sambay, TOKENIZER)
    assert "\n" not in str(refused.value)
