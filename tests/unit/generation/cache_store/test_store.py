"""The cache store: what it finds equals what was stored, to the bit, and nothing else is ever found."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.checkpoint import share_weights
from phi4_mlx.generation.cache_store import fingerprints, reading
from phi4_mlx.generation.cache_store import writer as writer_module
from phi4_mlx.generation.cache_store.catalogue import Catalogue
from phi4_mlx.generation.cache_store.folder import StoreFolder
from phi4_mlx.generation.cache_store.store import CacheStore
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import prefix_of
from tests.adapters import adapted, save_adapter
from tests.char_tokenizer import CharTokenizer
from tests.conftest import BOUNDARY, make_tiny_model
from tests.kinds import MAKERS
from tests.media import clip, picture, prompt_of
from tests.model_runs import decoded
from tests.stores import SOON_S, files, found, keep, next_logits, opened, prefilled
from tests.tiny_multimodal import make_tiny_multimodal

IDS = [n % 500 + 3 for n in range(100)]
WIDE = {"num_attention_heads": 3, "num_key_value_heads": 1}  # head_dim 32, which can be quantised


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return MAKERS[request.param](seed=3)


BRANCH = [*IDS[:90], 7, *range(10, 30)]


@pytest.mark.parametrize("prompt", [IDS, [*IDS, 7, 8, 9], BRANCH], ids=["same", "longer", "branch"])
def test_a_stored_cache_continues_as_the_one_in_memory_to_the_bit(
    model: LanguageModel, tmp_path: Path, prompt: list[int]
) -> None:
    kept = keep(tmp_path / "s", model, IDS)
    with opened(tmp_path / "s", model) as store:
        best = store.find(model, prompt)
        assert best is not None
        longest = kept.reusable(90 if prompt is BRANCH else min(len(IDS), len(prompt) - 1))
        assert best.length == longest >= 79
        loaded = store.load(best, model, prompt)
        assert loaded is not None and loaded.offset == longest and loaded.ids[0].tolist() == prompt[:longest]
    memory = prefix_of(kept, prompt, longest)
    assert [each.length for each in loaded.snapshots] == [each.length for each in memory.snapshots]
    assert mx.array_equal(next_logits(model, loaded, prompt), next_logits(model, memory, prompt))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_options_and_rope_tables_are_kept_apart(tmp_path: Path, bits: int | None) -> None:
    model, folder = make_tiny_model(seed=1, **WIDE), tmp_path / "s"
    short = IDS[: BOUNDARY - 1]
    keep(folder, model, short, kv_bits=bits)
    for options in ({"kv_bits": None}, {"kv_bits": 4}, {"kv_bits": 8}, {"max_kv_size": 512}, {"regime": "long"}):
        served = options == {"kv_bits": bits}
        assert found(folder, model, short, **options) == (len(short) - 1 if served else 0), options
    assert found(folder, model, [*short, *range(9)], kv_bits=bits) == 0  # needs the other table


def test_another_model_tokenizer_or_version_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = make_tiny_model(seed=1), tmp_path / "s"
    keep(folder, model, IDS)
    assert found(folder, make_tiny_model(seed=1), IDS) == 99
    assert found(folder, make_tiny_model(seed=2), IDS) == 0
    other = CharTokenizer()
    monkeypatch.setattr(other, "fingerprint", lambda: "f" * 64)
    assert found(folder, model, IDS, tokenizer=other) == 0
    monkeypatch.setattr(fingerprints, "MADE_BY", "phi4_mlx 9.9.9")
    assert found(folder, model, IDS) == 0


def test_adapters_are_told_apart_by_their_tensors_and_not_by_their_names(tmp_path: Path) -> None:
    model, folder = make_tiny_multimodal(seed=1), tmp_path / "s"
    vision = prompt_of(IDS[:10], picture(), IDS[10:30])
    speech = prompt_of(IDS[:10], clip(), IDS[10:30])
    for prompt in (vision, speech):
        keep(folder, model, prompt)
    assert found(folder, model, vision) == len(vision) - 1 and found(folder, model, speech) == len(speech) - 1
    assert found(folder, model, prompt_of(IDS[:10], picture(1), IDS[10:30])) == 0  # 10 tokens are too few
    assert found(folder, model, [*IDS[:60], 1]) == 0


def test_media_are_known_by_their_content_and_come_back_with_the_prompt(tmp_path: Path) -> None:
    model = make_tiny_multimodal(seed=1)
    one, other = (prompt_of(IDS[:40], picture(seed), IDS[:20]) for seed in (0, 1))
    keep(tmp_path / "s", model, one)
    with opened(tmp_path / "s", model) as store:
        for prompt, length in ((one, len(one) - 1), (other, 40)):
            best = store.find(model, prompt)
            assert best is not None and best.length == length
            cache = store.load(best, model, prompt)
            assert cache is not None
            assert decoded(model, cache.reuse(prompt), 4, cache=cache) == decoded(model, prompt, 4)


def test_only_what_saves_enough_is_read(tmp_path: Path) -> None:
    model = make_tiny_model(seed=1)
    long = [n % 7 + 20 for n in range(600)]
    keep(tmp_path / "s", model, long)
    with opened(tmp_path / "s", model) as store:
        prompt = [*long, 9]
        assert store.find(model, prompt, beyond=600 - 37) is not None  # a sixteenth of the file's tokens
        assert store.find(model, prompt, beyond=600 - 36) is None
        assert store.find(model, [*long[:30], 9]) is None


def test_a_conversation_has_one_file(tmp_path: Path, model: LanguageModel) -> None:
    folder, prompt = tmp_path / "s", [n % 400 + 70 for n in range(70)]
    with opened(folder, model) as store:
        cache = model.make_cache()
        for turn in range(4):
            decoded(model, prompt[cache.offset :], 1, cache=cache, prefill_step_size=20)
            cache.compact()
            store.offer(model, cache.fork(cache.offset))
            assert store.flush(SOON_S)
            prompt = [*prompt, *(n + turn for n in range(40))]
        assert len(files(folder)) == 1
        assert store.find(model, prompt).length >= len(prompt) - 60  # type: ignore[union-attr]


def test_little_more_than_is_stored_is_written_only_when_it_leaves_memory(tmp_path: Path) -> None:
    model, folder = make_tiny_model(seed=1), tmp_path / "s"
    long = [n % 300 + 20 for n in range(500)]
    with opened(folder, model) as store:
        store.offer(model, prefilled(model, long))
        assert store.flush(SOON_S)
        before = files(folder)
        store.offer(model, prefilled(model, [*long, *range(40)]))
        assert store.flush(SOON_S) and files(folder) == before
        store.offer(model, prefilled(model, [*long, *range(40)]), leaving=True)
        assert store.flush(SOON_S) and files(folder) != before and len(files(folder)) == 1


def test_an_offer_waits_for_no_disk_and_what_replaces_it_is_written_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = make_tiny_model(seed=1), tmp_path / "s"
    gate, written = threading.Event(), []

    def slow(path: Path, *content: Any) -> int:
        assert gate.wait(SOON_S)
        written.append(path)
        return whole(path, *content)

    whole = writer_module.write_content
    monkeypatch.setattr(writer_module, "write_content", slow)
    with opened(folder, model) as store:
        store.offer(model, prefilled(model, IDS[::-1]), leaving=True)  # the disk is busy with this one
        for length in (40, 60, 63):
            store.offer(model, prefilled(model, IDS[:length]))
        assert not written
        gate.set()
    assert len(written) == 2 and found(folder, model, IDS[:64]) == 63


@pytest.mark.parametrize("offers", [(True,), (False, True)], ids=["leaving", "hastened"])
def test_memory_that_waits_to_be_written_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offers: tuple[bool, ...]
) -> None:
    model, folder = make_tiny_model(seed=1), tmp_path / "s"
    gate = threading.Event()
    monkeypatch.setattr(writer_module, "MAX_LEAVING_BYTES", 100_000)
    whole = writer_module.write_content
    monkeypatch.setattr(writer_module, "write_content", lambda *content: gate.wait(SOON_S) and whole(*content))
    with opened(folder, model) as store:
        caches = [prefilled(model, [n] * 90) for n in range(8)]  # 46 KB each
        for leaving in offers:
            for cache in caches:
                store.offer(model, cache, leaving=leaving)
        lost = store.gauges()["prefix_cache_disk_failures_total"]
        assert 4 <= lost <= 6
        gate.set()
        assert store.flush(SOON_S)
        assert len(files(folder)) == 8 - lost


def test_a_failure_of_the_writer_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines = make_tiny_model(seed=1), []

    def broken(*content: Any) -> int:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(writer_module, "write_content", broken)
    with opened(tmp_path / "s", model, warn=lines.append) as store:
        store.offer(model, prefilled(model, IDS))
        assert store.flush(SOON_S)
        assert store.gauges()["prefix_cache_disk_failures_total"] == 1 and not lines


def test_a_file_that_was_read_once_is_restored_once_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = make_tiny_model(seed=1), tmp_path / "s"
    keep(folder, model, IDS)
    with opened(folder, model, warn=pytest.fail) as store:
        best = store.find(model, IDS)
        assert best is not None
        for fails in (False, True):
            read = store.read(best)
            assert read is not None
            if fails:
                with monkeypatch.context() as patch, pytest.raises(MemoryError):
                    patch.setattr(reading, "mlx_dtype", lambda name: (_ for _ in ()).throw(MemoryError))
                    store.restore(read, model)
            else:
                assert store.restore(read, model) is not None
            assert store.restore(read, model) is None
            assert len(files(folder)) == 1


@pytest.mark.parametrize("name", ["read", "restore"])
def test_a_load_that_fails_in_any_way_costs_a_prefill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    model = make_tiny_model(seed=1)
    keep(tmp_path / "s", model, IDS)
    with opened(tmp_path / "s", model, warn=pytest.fail) as store:
        best = store.find(model, IDS)
        assert best is not None
        with monkeypatch.context() as patch:
            patch.setattr(CacheStore, name, broken)
            assert store.load(best, model, IDS) is None
        assert store.gauges()["prefix_cache_disk_failures_total"] == 1
        assert store.load(best, model, IDS) is not None


def test_a_file_whose_ids_are_not_first_is_dropped(tmp_path: Path) -> None:
    model, lines = make_tiny_model(seed=1), []
    keep(tmp_path / "s", model, IDS)
    (path,) = files(tmp_path / "s")
    data = path.read_bytes()
    assert data.count(b"[0,400]") == 1
    path.write_bytes(data.replace(b"[0,400]", b"[4,404]"))
    with opened(tmp_path / "s", model, warn=lines.append) as store:
        assert store.find(model, IDS) is None
    assert len(lines) == 1 and "its ids are at bytes 4 to 404, not first" in lines[0]


def test_a_file_that_another_process_has_written_anew_is_read_anew(tmp_path: Path) -> None:
    model, lines = make_tiny_model(seed=1), []
    keep(tmp_path / "s", model, IDS)
    (path,) = files(tmp_path / "s")
    folder = StoreFolder(tmp_path / "s", 2**30)
    catalogue = Catalogue(folder, lines.append)
    catalogue.take(folder.files())
    assert len(catalogue) == 1 and not lines
    path.write_bytes(path.read_bytes() + b"more")
    catalogue.take(folder.files())
    assert len(lines) == 1 and "its tensors end at byte" in lines[0] and not files(tmp_path / "s")


def test_the_names_of_adapters_may_change(tmp_path: Path) -> None:
    save_adapter(adapted(make_tiny_model(seed=1)), tmp_path / "a", {})
    save_adapter(adapted(make_tiny_model(seed=1), seed=7), tmp_path / "b", {})

    def named(**folders: str) -> LanguageModel:
        model = share_weights(make_tiny_model(seed=1))
        for name, folder in folders.items():
            model.adapters.add(name, read_adapter(tmp_path / folder))
            model.adapters.load(name)
        return model

    kept = keep(tmp_path / "s", named(one="a"), IDS, "one")
    model = named(two="a", one="b")
    assert [found(tmp_path / "s", model, IDS, name) for name in ("one", "two", None)] == [0, 99, 0]
    with opened(tmp_path / "s", model) as store:
        best = store.find(model, IDS, "two")
        assert best is not None
        loaded = store.load(best, model, IDS, "two")
    assert loaded is not None and loaded.adapter == "two"
    assert mx.array_equal(next_logits(model, loaded, IDS), next_logits(named(one="a"), kept.fork(99), IDS))


def test_gauges(tmp_path: Path) -> None:
    model = make_tiny_model(seed=1)
    keep(tmp_path / "s", model, IDS)
    with opened(tmp_path / "s", model, limit_bytes=12345678) as store:
        assert store.find(model, IDS) is not None
        (file,) = files(tmp_path / "s")
        assert store.gauges() == {
            "prefix_cache_disk_bytes": file.stat().st_size,
            "prefix_cache_disk_limit_bytes": 12345678,
            "prefix_cache_disk_entries": 1,
            "prefix_cache_disk_hits_total": 0,
            "prefix_cache_disk_failures_total": 0,
        }
