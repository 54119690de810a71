"""Jobs with media, with users' adapters and with neither, in one engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.checkpoint import load, share_weights
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.cache_store.store import store_settings
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.text import Decoder
from phi4_mlx.server.engine import engine as engine_module
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.protocol import Event, Failure, Finish, Job
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.tokens.prompt import Prompt
from tests.adapters import adapted, save_adapter
from tests.media import clip, picture, prompt_of
from tests.model_runs import decoded
from tests.stores import SOON_S
from tests.tiny_multimodal import write_tiny_multimodal
from tests.unit.server.engine.harness import GREEDY, finish, run, text

TEXT = [490, 5, 6]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any]:
    return load(write_tiny_multimodal(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapters(loaded: tuple[LanguageModel, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of a LoRA, a DoRA, and whole weights."""
    root, model = tmp_path_factory.mktemp("adapters"), loaded[0]
    for seed, kind in enumerate(["lora", "dora"]):
        save_adapter(adapted(share_weights(model), kind, seed, scale=6.0), root / kind, {})
    tuned: Any = share_weights(model)
    tuned.freeze()
    norm = tuned.model.norm
    norm.weight = -1.5 * norm.weight
    norm.unfreeze()
    save_adapter(tuned, root / "whole", {})
    return {name: str(root / name) for name in ("lora", "dora", "whole")}


def make(loaded: tuple[LanguageModel, Any], adapters: dict[str, str], **settings: Any) -> Engine:
    limits = {"kv_limit_bytes": 10**8, "prefix_limit_bytes": 10**8}
    return Engine(*loaded, Settings("any", adapters=adapters, **(limits | settings)))


def jobs() -> list[Job]:
    asked: list[tuple[Prompt, str | None]] = [
        (prompt_of(TEXT, [7, 8]), None),
        (prompt_of(TEXT, picture(1), [9]), None),
        (prompt_of(TEXT, picture(2), [9]), None),  # the same ids
        (prompt_of(TEXT, clip(1), [9, 10]), None),
        (prompt_of(TEXT, picture(1), clip(1), [11]), None),
        (prompt_of(TEXT, [7, 8]), "lora"),
        (prompt_of(TEXT, [7, 8]), "dora"),
        (prompt_of(TEXT, [7, 8]), "whole"),
    ]
    return [Job(n, ids, 12, GREEDY, adapter=adapter) for n, (ids, adapter) in enumerate(asked)]


def test_jobs_of_all_kinds_share_an_engine_and_a_prefix_cache(
    loaded: tuple[LanguageModel, Any], adapters: dict[str, str]
) -> None:
    model, tokenizer = loaded
    engine = make(loaded, adapters)
    first, again = run(engine, *jobs()), run(engine, *jobs())
    answers = []
    for job in jobs():
        alone = share_weights(model)
        if job.adapter:
            load_adapter(alone, Path(adapters[job.adapter]))
        answers.append(decoded(alone, job.prompt, 12))
        drawn = [token for token in answers[-1] if token not in tokenizer.eos_ids]
        assert text(first[job.id]) == text(again[job.id]) == tokenizer.decode(drawn), job.id
        end = again[job.id][-1]
        assert isinstance(end, Finish)
        assert end.cached_tokens == (len(job.prompt) - 1 if len(job.prompt) > 8 else 0)
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_jobs_of_all_kinds_find_their_own_caches_on_the_disk(
    loaded: tuple[LanguageModel, Any], adapters: dict[str, str], tmp_path: Path
) -> None:
    settings = {"store": store_settings(str(tmp_path / "s"), 10**8)}
    asked = [replace(job, prompt=prompt_of([*range(20, 60)], job.prompt)) for job in jobs()]
    engine = make(loaded, adapters, **settings)
    first = run(engine, *asked)
    engine.close(SOON_S)
    assert len({text(first[job.id]) for job in asked}) == len(asked)
    engine = make(loaded, adapters, **settings)
    again = run(engine, *asked)
    for job in asked:
        assert text(again[job.id]) == text(first[job.id]) and finish(again[job.id]).cached_tokens == len(job.prompt) - 1
    engine.close(SOON_S)
    for name, by_name in (("lora", asked[5]), ("dora", asked[6])):  # always on, and without a name
        engine = make(loaded, {}, adapter_path=adapters[name], **settings)
        assert text(run(engine, asked[0])[0]) == text(first[by_name.id])
        engine.close(SOON_S)


@pytest.mark.parametrize("name", ["lora", "whole"])
@pytest.mark.parametrize("always_on", [False, True])
def test_a_users_adapter_with_media_is_refused_in_one_line_and_others_go_on(
    loaded: tuple[LanguageModel, Any], adapters: dict[str, str], name: str, always_on: bool
) -> None:
    engine = make(loaded, {} if always_on else adapters, adapter_path=adapters[name] if always_on else None)
    words, seen, *_ = jobs()
    adapter = None if always_on else name
    events: dict[int, list[Event]] = run(engine, replace(words, adapter=adapter), replace(seen, adapter=adapter))
    assert text(events[0])
    (failure,) = events[1]
    assert isinstance(failure, Failure) and failure.status == 400 and "\n" not in failure.message
    assert "adapter" in failure.message and "cannot be used" in failure.message


def test_a_name_of_the_models_own_adapters_is_refused_at_the_start(
    loaded: tuple[LanguageModel, Any], adapters: dict[str, str]
) -> None:
    with pytest.raises(RequestError, match="'vision' has the name of one of the model's own; choose another name"):
        make(loaded, {"vision": adapters["lora"]})
    job = replace(jobs()[0], adapter="vision")  # one of the model's own is chosen by media alone
    (failure,) = run(make(loaded, adapters), job)[0]
    assert isinstance(failure, Failure)
    assert failure.message == "adapter 'vision' is unknown; known are lora, dora, whole"


def test_text_reads_neither_towers_nor_adapters_and_memory_is_kept_for_them(
    tmp_path: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(write_tiny_multimodal(tmp_path))
    model = loaded[0]
    before, calls = mx.get_active_memory(), []
    forward = Decoder.__call__

    def counting(self: Any, *arguments: Any, **options: Any) -> mx.array:
        calls.append(1)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__call__", counting)
    engine = make(loaded, adapters, kv_limit_bytes=None, prefix_limit_bytes=None)
    run(engine, jobs()[0])
    towers = sum(array.nbytes for name, array in tree_flatten(model.parameters()) if model.on_demand(name))
    assert model.adapters is not None
    on_demand = towers + sum(model.adapters.nbytes[name] for name in ("vision", "speech"))
    mx.clear_cache()
    assert mx.get_active_memory() - before < on_demand // 2 and calls
    monkeypatch.setattr(engine_module, "memory_limit", lambda: 2 * (engine_module.ACTIVATION_BYTES + 10**8))
    free = 10**8 - mx.get_active_memory() - on_demand
    assert abs(make(loaded, {}, kv_limit_bytes=None).kv_limit_bytes - free // 2) < 10**6
