"""An engine with a store: what memory loses is read again, and no step waits for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.generation.cache_store import store as store_module
from phi4_mlx.generation.cache_store import writer as writer_module
from phi4_mlx.generation.cache_store.folder import StoreFolder, private_folder
from phi4_mlx.generation.cache_store.store import CacheStore, store_settings
from phi4_mlx.generation.memory_pressure import Reading
from phi4_mlx.models.text import Model
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.loop import turn
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import Job
from phi4_mlx.server.engine.settings import Settings
from tests.conftest import Demo, make_tiny_model
from tests.stores import SOON_S, TOKENIZER, files, next_logits, opened, prefilled
from tests.unit.server.engine.harness import GREEDY, MakeEngine, alone, finish, run, run_to_the_end, text

IDS = [n % 500 + 3 for n in range(100)]
PLENTY, LITTLE = Reading(2**40, 2**40), Reading(0, 2**40)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=5)


@pytest.fixture
def make_stored(make_engine: MakeEngine, tmp_path: Path) -> Callable[..., Engine]:
    """`make_stored(**settings)` -> an engine of the demo with a store."""
    return lambda **settings: make_engine(store=store_settings(str(tmp_path / "s"), 2**30), **settings)


def prompt_of(start: int) -> tuple[int, ...]:
    return tuple((start + 7 * n) % 900 + 3 for n in range(60))


def test_a_prompt_on_the_disk_is_answered_as_one_in_memory(
    demo: Demo, make_stored: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, job = make_stored(), Job(1, prompt_of(1), 20, GREEDY)
    said = text(run(engine, job)[1])
    assert said == alone(demo, job)
    engine.close(SOON_S)
    assert len(files(tmp_path / "s")) == 1
    engine = make_stored()
    jobs = [Job(n, prompt_of(1), 20, GREEDY) for n in range(3)]
    events = run(engine, *jobs)  # three jobs, one read
    assert [text(events[n]) for n in range(3)] == [said] * 3
    assert [finish(events[n]).cached_tokens for n in range(3)] == [59] * 3
    assert engine.gauges()["prefix_cache_disk_hits_total"] == 1 and engine.prefilled_tokens == 3
    engine.close(SOON_S)


def test_a_quantised_cache_on_the_disk_serves_engines_of_its_kind(
    demo: Demo, make_stored: Callable[..., Engine]
) -> None:
    job, said = Job(1, prompt_of(1), 20, GREEDY), {}
    for kv_bits, cached in ((4, 0), (8, 0), (None, 0), (4, 59), (8, 59), (None, 59)):
        engine = make_stored(kv_bits=kv_bits)
        events = run(engine, job)[1]
        assert finish(events).cached_tokens == cached
        assert text(events) == said.setdefault(kv_bits, text(events))
        engine.close(SOON_S)
    assert said[None] == alone(demo, job)


def test_an_engine_without_room_in_memory_works_from_the_disk(demo: Demo, make_stored: Callable[..., Engine]) -> None:
    engine = make_stored(prefix_limit_bytes=0)
    for n, cached in ((1, 0), (2, 59)):
        job = Job(n, prompt_of(1), 10, GREEDY)
        events = run(engine, job)[n]
        assert text(events) == alone(demo, job) and finish(events).cached_tokens == cached
        assert engine.prefixes.store is not None and engine.prefixes.store.flush(SOON_S)
    assert engine.gauges()["prefix_cache_entries"] == 0
    engine.close(SOON_S)


def test_running_answers_wait_neither_for_a_read_nor_for_a_write(
    make_stored: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_stored()
    run(engine, Job(1, prompt_of(1), 4, GREEDY))
    engine.close(SOON_S)
    gate = threading.Event()
    read, write = CacheStore.read, writer_module.write_content
    monkeypatch.setattr(CacheStore, "read", lambda store, found: gate.wait(SOON_S) and read(store, found))
    monkeypatch.setattr(writer_module, "write_content", lambda *content: gate.wait(SOON_S) and write(*content))
    engine = make_stored()
    turn(engine, [Job(2, prompt_of(1), 4, GREEDY), Job(3, prompt_of(2), 30, GREEDY)])
    for _ in range(20):  # the one that is not on the disk goes on
        turn(engine, [])
    assert engine.drawn_tokens >= 20
    engine.cancel(2)
    turn(engine, [Job(4, prompt_of(1), 4, GREEDY)])
    gate.set()
    run_to_the_end(engine)
    engine.close(SOON_S)


def test_a_job_whose_client_leaves_while_its_file_is_read_is_gone(
    make_stored: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_stored()
    run(engine, Job(1, prompt_of(1), 4, GREEDY))
    engine.close(SOON_S)
    gate, read = threading.Event(), CacheStore.read
    monkeypatch.setattr(CacheStore, "read", lambda store, found: gate.wait(SOON_S) and read(store, found))
    engine = make_stored()
    turn(engine, [Job(2, prompt_of(1), 4, GREEDY)])
    assert engine.busy
    engine.cancel(2)
    assert not engine.busy
    gate.set()
    events = run(engine, Job(3, prompt_of(1), 4, GREEDY))
    assert finish(events[3]).cached_tokens == 59
    engine.close(SOON_S)


def test_a_damaged_file_costs_a_prefill(make_stored: Callable[..., Engine], demo: Demo, tmp_path: Path) -> None:
    engine, job = make_stored(), Job(1, prompt_of(1), 10, GREEDY)
    run(engine, job)
    engine.close(SOON_S)
    (path,) = files(tmp_path / "s")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    engine = make_stored()
    events = run(engine, job)[1]
    assert text(events) == alone(demo, job) and finish(events).cached_tokens == 0
    assert engine.gauges()["prefix_cache_disk_failures_total"] == 1
    engine.close(SOON_S)


def test_a_store_that_is_lost_costs_a_line_and_not_the_engine(
    demo: Demo, make_engine: MakeEngine, tmp_path: Path
) -> None:
    settings, lines = store_settings(str(tmp_path / "s"), 2**30), []
    (tmp_path / "s").rmdir()
    (tmp_path / "s").write_text("")
    engine = Engine(*demo, Settings("demo", store=settings), warn=lines.append)
    assert len(lines) == 1 and "exists and is not a folder" in lines[0]
    assert text(run(engine, Job(1, prompt_of(1), 4, GREEDY))[1])
    engine.close(SOON_S)


def test_the_end_stores_what_was_used_last_and_keeps_to_its_time(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_LEAVING_BYTES", 1)  # what stays in memory does not count
    monkeypatch.setattr(writer_module, "SETTLE_S", 1000.0)
    monkeypatch.setattr(store_module, "SETTLE_S", 1000.0)
    gate, write, written = threading.Event(), writer_module.write_content, []

    def slow(path: Path, *content: Any) -> int:
        written.append(path)
        assert len(written) < 4 or gate.wait(SOON_S)
        return write(path, *content)

    monkeypatch.setattr(writer_module, "write_content", slow)
    store = CacheStore(StoreFolder(private_folder(tmp_path / "s"), 2**30), model, TOKENIZER, pytest.fail)
    prefixes = PrefixCache(2**20)
    for n in range(6):
        prefixes.put(model, None, prefilled(model, [n] * 60))
    prefixes.store = store
    prefixes.close(1.0)
    assert len(files(tmp_path / "s")) == 3  # the disk is busy with a fourth
    gate.set()
    with opened(tmp_path / "s", model) as again:
        assert [n for n in range(6) if again.find(model, [n] * 60)][-3:] == [3, 4, 5]


def test_running_answers_are_stored_at_the_end(make_stored: Callable[..., Engine]) -> None:
    engine = make_stored()
    turn(engine, [Job(1, prompt_of(1), 200, GREEDY)])
    for _ in range(50):
        turn(engine, [])
    assert engine.busy
    engine.close(SOON_S)
    engine = make_stored()
    assert finish(run(engine, Job(1, prompt_of(1), 1, GREEDY))[1]).cached_tokens == 59
    engine.close(SOON_S)


def test_what_pressure_evicts_goes_to_the_disk_and_the_share_grows_back(model: Model, tmp_path: Path) -> None:
    with opened(tmp_path / "s", model) as store:
        prefixes = PrefixCache(2**20, store)
        prompts = [[n] * 60 for n in range(5)]
        kept = [prefilled(model, prompt) for prompt in prompts]
        for cache in kept:
            prefixes.put(model, None, cache)
        assert (len(prefixes), prefixes.limit_bytes) == (5, 2**20)
        prefixes.follow(PLENTY)
        assert len(prefixes) == 5
        prefixes.follow(LITTLE)
        assert (len(prefixes), prefixes.nbytes, prefixes.limit_bytes) == (0, 0, 0)
        assert store.flush(SOON_S) and len(files(tmp_path / "s")) == 5
        prefixes.put(model, None, prefilled(model, [9] * 60))  # no room in memory: to the disk alone
        assert len(prefixes) == 0 and store.flush(SOON_S) and len(files(tmp_path / "s")) == 6
        prefixes.follow(PLENTY)
        assert prefixes.limit_bytes == 2**20
        prompt = [*prompts[2], 1, 2]
        found = store.find(model, prompt)
        assert found is not None
        loaded = store.load(found, model, prompt)
        assert loaded is not None
        expected = next_logits(model, kept[2].fork(60), prompt)
        assert mx.array_equal(next_logits(model, loaded, prompt), expected)


def test_without_a_store_pressure_drops_entries(model: Model) -> None:
    prefixes = PrefixCache(2**20)
    for n in range(5):
        prefixes.put(model, None, prefilled(model, [n] * 60))
    used = prefixes.nbytes
    prefixes.follow(Reading(2**36 - used // 2, 2**40))  # half of it is missing from the reserve
    assert 0 < prefixes.nbytes <= used // 2 and prefixes.find(model, None, [4] * 60) is not None


def test_what_a_limit_evicts_is_found_on_the_disk(make_stored: Callable[..., Engine], demo: Demo) -> None:
    engine: Any = make_stored(prefix_limit_bytes=200_000)  # two prompts
    jobs = [Job(n, prompt_of(100 * n), 2, GREEDY) for n in range(4)]
    for job in jobs:
        run(engine, job)
    assert engine.gauges()["prefix_cache_entries"] < 3 and engine.prefixes.store.flush(SOON_S)
    for job in jobs:
        events = run(engine, job)[job.id]
        assert finish(events).cached_tokens == 59 and text(events) == alone(demo, job)
    assert engine.gauges()["prefix_cache_bytes"] <= 200_000
    engine.close(SOON_S)


def test_a_store_that_fails_in_any_way_costs_a_prefill(
    make_stored: Callable[..., Engine], demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, job = make_stored(), Job(1, prompt_of(1), 10, GREEDY)
    run(engine, job)
    engine.close(SOON_S)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    for name in ("find", "read", "restore", "offer"):
        with monkeypatch.context() as patch:
            patch.setattr(CacheStore, name, broken)
            engine = make_stored()
            assert text(run(engine, job)[1]) == alone(demo, job)
            assert engine.gauges()["prefix_cache_failures_total"] > 0
            engine.close(SOON_S)


def test_an_eviction_that_the_store_fails_frees_memory_all_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    with opened(tmp_path / "s", model) as store:
        prefixes = PrefixCache(2**20, store)
        for n in range(3):
            prefixes.put(model, None, prefilled(model, [n] * 60))
        monkeypatch.setattr(CacheStore, "offer", broken)
        prefixes.follow(LITTLE)
        assert (len(prefixes), prefixes.nbytes, prefixes.failures) == (0, 0, 3)


def test_jobs_without_room_in_memory_share_one_read(make_stored: Callable[..., Engine], demo: Demo) -> None:
    engine = make_stored()
    run(engine, Job(1, prompt_of(1), 4, GREEDY))
    engine.close(SOON_S)
    engine = make_stored(prefix_limit_bytes=0)
    jobs = [Job(n, prompt_of(1), 4, GREEDY) for n in range(3)]
    events = run(engine, *jobs)
    assert [finish(events[n]).cached_tokens for n in range(3)] == [59] * 3
    assert {text(events[n]) for n in range(3)} == {alone(demo, jobs[0])}
    assert engine.gauges()["prefix_cache_disk_hits_total"] == 1
    engine.close(SOON_S)


def test_quantised_caches_are_found_by_engines_that_quantise_alike(make_stored: Callable[..., Engine]) -> None:
    for bits, cached in ((8, 0), (None, 0), (8, 59), (None, 59), (4, 0)):
        engine = make_stored(kv_bits=bits)
        assert finish(run(engine, Job(1, prompt_of(1), 4, GREEDY))[1]).cached_tokens == cached, bits
        engine.close(SOON_S)
