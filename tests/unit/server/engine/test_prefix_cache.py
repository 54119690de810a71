"""The prefix cache: it finds the longest prefix, keeps its limit, and separates adapters and RoPE tables."""

from __future__ import annotations

import gc
import random
import weakref

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.models.multimodal import Model as Multimodal
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.sambay import Model as SambaY
from phi4_mlx.models.snapshot import MAX_SNAPSHOTS
from phi4_mlx.models.text import Model
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.tokens.prompt import Prompt
from tests.conftest import BOUNDARY, make_tiny_model
from tests.media import picture, prompt_of
from tests.model_runs import decoded, filled_cache
from tests.tiny_multimodal import make_tiny_multimodal
from tests.tiny_sambay import make_tiny_sambay

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4 + 8  # keys and values: layers, heads, width, fp32; and the key


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=5)


def put(
    prefixes: PrefixCache, model: Model, ids: list[int], adapter: str | None = None, regime: Regime | None = None
) -> None:
    prefixes.put(model, adapter, filled_cache(model, mx.array([ids]), regime=regime))


def found(prefixes: PrefixCache, model: Model, ids: list[int], adapter: str | None = None) -> int:
    """The length of the cache that is found; 0 if there is none."""
    cache = prefixes.find(model, adapter, ids)
    return cache.offset if cache else 0


def test_the_longest_prefix_is_found_and_equals_a_new_prefill(model: Model) -> None:
    prefixes = PrefixCache(2**20)
    put(prefixes, model, list(range(20)))
    put(prefixes, model, [*range(30), 7, 7])
    ids = [*range(30), 9, 8, 7]
    cache = prefixes.find(model, None, ids)
    assert cache is not None and cache.offset == 30 and cache.ids[0].tolist() == ids[:30]
    warm = model(mx.array([ids[30:]]), cache)[:, -1]
    cold = model(mx.array([ids]))[:, -1]
    np.testing.assert_allclose(np.array(warm), np.array(cold), atol=2e-5)
    # Tokens appended to the found cache do not change the entry.
    second = prefixes.find(model, None, ids)
    assert second is not None and second.offset == 30
    np.testing.assert_array_equal(np.array(model(mx.array([ids[30:]]), second)[:, -1]), np.array(warm))


def test_at_least_one_token_is_left_to_prefill(model: Model) -> None:
    prefixes = PrefixCache(2**20)
    put(prefixes, model, list(range(20)))
    assert found(prefixes, model, list(range(20))) == 19
    assert found(prefixes, model, list(range(21))) == 20


def test_prefixes_shorter_than_the_minimum_are_neither_stored_nor_found(model: Model) -> None:
    prefixes = PrefixCache(2**20)
    put(prefixes, model, list(range(7)))
    assert len(prefixes) == 0
    put(prefixes, model, list(range(20)))
    assert found(prefixes, model, [*range(7), 99, 99]) == 0
    assert found(prefixes, model, [*range(8), 99, 99]) == 8


def test_another_adapter_or_rope_table_finds_nothing(model: Model) -> None:
    prefixes, ids = PrefixCache(2**20), list(range(30))
    put(prefixes, model, ids, "one")
    assert [found(prefixes, model, ids, adapter) for adapter in ("one", "two", None)] == [29, 0, 0]
    longer = [*ids, *[1] * BOUNDARY]  # needs the long table
    assert found(prefixes, model, longer, "one") == 0
    put(prefixes, model, longer, "one")
    assert found(prefixes, model, longer, "one") == len(longer) - 1
    assert found(prefixes, model, ids, "one") == 29  # the entry under the short table
    put(prefixes, model, ids, "two", regime="long")  # stored under the table that it was computed under
    assert found(prefixes, model, ids, "two") == 0


def test_an_entry_replaces_the_entries_that_it_extends(model: Model) -> None:
    prefixes = PrefixCache(2**20)
    put(prefixes, model, list(range(20)))
    put(prefixes, model, list(range(25)))
    assert len(prefixes) == 1
    put(prefixes, model, list(range(12)))  # covered by the longer entry
    assert len(prefixes) == 1 and prefixes.nbytes == 25 * TOKEN_BYTES
    put(prefixes, model, list(range(25)))
    assert len(prefixes) == 1 and prefixes.nbytes == 25 * TOKEN_BYTES
    put(prefixes, model, list(range(25)), "one")
    assert len(prefixes) == 2


def test_the_limit_in_bytes_is_never_exceeded(model: Model) -> None:
    draw, limit = random.Random(1), 150 * TOKEN_BYTES
    prefixes = PrefixCache(limit)
    for _ in range(300):
        start = draw.randrange(4)
        ids = [start] * draw.randint(1, 30) + [draw.randrange(512) for _ in range(draw.randint(1, 60))]
        if draw.random() < 0.3:
            found(prefixes, model, ids)
        else:
            put(prefixes, model, ids, draw.choice([None, "one"]))
        assert prefixes.nbytes <= limit
        assert prefixes.nbytes == sum(entry.nbytes for entry in prefixes._entries)
    assert len(prefixes) > 1
    before = prefixes.nbytes
    put(prefixes, model, [1] * 151)  # larger than the limit: no entry is evicted for it
    assert prefixes.nbytes == before
    prefixes.clear()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_entries_keep_no_more_memory_alive_than_they_report(model: Model) -> None:
    """A slice would keep its whole source array alive."""
    prefixes = PrefixCache(2**30)
    mx.eval(model(mx.array([[1] * 10])))
    before = mx.get_active_memory()
    for n in range(10):
        put(prefixes, model, [n] * 10)  # from buffers of 256 columns
    grown = mx.get_active_memory() - before
    assert grown < 3 * prefixes.nbytes  # allocations are whole pages; the buffers would be 25 times as large


def test_the_least_recently_used_entry_is_evicted(model: Model) -> None:
    prefixes = PrefixCache(3 * 20 * TOKEN_BYTES)
    for n in range(3):
        put(prefixes, model, [n] * 20)
    assert found(prefixes, model, [0] * 20)  # used again
    put(prefixes, model, [3] * 20)
    assert [found(prefixes, model, [n] * 20) > 0 for n in range(4)] == [True, False, True, True]


def test_the_number_of_entries_is_limited(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "MAX_ENTRIES", 3)
    prefixes = PrefixCache(2**30)
    for n in range(5):
        put(prefixes, model, [n] * 10)
    assert len(prefixes) == 3 and [found(prefixes, model, [n] * 10) for n in range(5)] == [0, 0, 9, 9, 9]


@pytest.fixture(scope="module")
def sambay() -> SambaY:
    return make_tiny_sambay(seed=5)


def answered(prefixes: PrefixCache, model: SambaY, prompt: list[int], count: int = 9) -> list[int]:
    """Stores a prompt, then the prompt with its answer, as the engine does; returns both."""
    cache = prefixes.find(model, None, prompt) or model.make_cache()
    answer = decoded(model, prompt[cache.offset :], count, cache=cache, prefill_step_size=64)
    whole, row = [*prompt, *answer], model.make_cache()
    row.restore(whole[: cache.offset], [layer.state for layer in cache], cache.regime)  # a row has no snapshots
    prompt_cache = filled(model, prompt)
    prefixes.put(model, None, prompt_cache)
    prefixes.put(model, None, row)
    return whole


def filled(model: SambaY, prompt: list[int]) -> PromptCache:
    cache = model.make_cache()
    decoded(model, prompt, 1, cache=cache, prefill_step_size=64)
    return cache


def test_a_conversation_has_one_entry_that_serves_its_earlier_turns_too(sambay: SambaY) -> None:
    prefixes, prompt = PrefixCache(2**24), [n % 500 + 3 for n in range(400)]
    prompts = []
    for turn in range(4):
        prompts.append(prompt)
        prompt = [*answered(prefixes, sambay, prompt), *range(10 + turn, 40)]
    assert len(prefixes) <= 2
    for earlier in prompts:  # asked again, and with another end
        assert prefixes.find(sambay, None, earlier).offset >= 0.8 * len(earlier)  # type: ignore[union-attr]
        edited = [*earlier[:-5], 7, 8, 9]
        found = prefixes.find(sambay, None, edited)
        assert found is not None and 0.7 * len(edited) <= found.offset <= len(edited) - 3
        warm = sambay(mx.array([edited[found.offset :]]), found)[:, -1]
        np.testing.assert_allclose(np.array(warm), np.array(sambay(mx.array([edited]))[:, -1]), atol=1e-4)


def test_a_snapshot_that_two_entries_share_counts_once(sambay: SambaY) -> None:
    prefixes, prompt = PrefixCache(2**24), [n % 500 + 3 for n in range(200)]
    prefixes.put(sambay, None, filled(sambay, prompt))
    before, fixed = prefixes.nbytes, sambay.context_cost().fixed_bytes
    branch = prefixes.find(sambay, None, [*prompt[:-1], 9, 9])
    assert branch is not None and branch.offset == len(prompt) - 1
    decoded(sambay, [9, 9], 1, cache=branch)
    prefixes.put(sambay, None, branch)
    length = len(prompt) + 1
    assert len(prefixes) == 2
    assert prefixes.nbytes - before <= 2 * fixed + length * (sambay.context_cost().token_bytes + 4)


def test_an_entry_too_large_for_the_limit_loses_snapshots_before_it_is_refused(sambay: SambaY) -> None:
    cost, prompt = sambay.context_cost(), [n % 500 + 3 for n in range(300)]
    least = len(prompt) * (cost.token_bytes + 4) + cost.fixed_bytes
    for limit, served in ((least // 2, 0), (least, 0), (least + 3 * cost.fixed_bytes, len(prompt) - 1)):
        prefixes = PrefixCache(limit)
        prefixes.put(sambay, None, filled(sambay, prompt))
        found = prefixes.find(sambay, None, prompt)
        assert (found.offset if found else 0) == served and prefixes.nbytes <= limit
        assert len(prefixes) == (limit >= least)


def test_the_snapshots_that_are_kept_save_the_most_tokens(sambay: SambaY) -> None:
    cache = sambay.make_cache()
    for count in [100] * 6 + [3, 97] * 3 + [5]:
        decoded(sambay, [7] * count, 1, cache=cache)
    lengths = [each.length for each in cache.snapshots]
    assert len(lengths) == MAX_SNAPSHOTS and lengths[-1] >= cache.offset - 1
    assert max(b - a for a, b in zip([0, *lengths], lengths, strict=False)) <= 250


@pytest.fixture(scope="module")
def multimodal() -> Multimodal:
    return make_tiny_multimodal()


def keep(prefixes: PrefixCache, model: Multimodal, prompt: Prompt) -> None:
    cache = model.make_cache()
    decoded(model, prompt, 1, cache=cache)
    prefixes.put(model, None, cache)


def test_two_pictures_of_one_size_with_the_same_words_are_never_confused(multimodal: Multimodal) -> None:
    text, prefixes = list(range(10)), PrefixCache(2**20)
    one, other = (prompt_of(text, picture(seed), [20, 21, 22]) for seed in (0, 1))
    keep(prefixes, multimodal, one)
    for prompt, length in ((one, len(one) - 1), (other, 10), (Prompt([*text, 9]), 0)):  # 0: under another adapter
        cache = prefixes.find(multimodal, None, prompt)
        assert (cache.offset if cache else 0) == length
        if cache:
            rest = cache.reuse(prompt)
            assert len(rest) == len(prompt) - length
            assert decoded(multimodal, rest, 6, cache=cache) == decoded(multimodal, prompt, 6)


@pytest.mark.parametrize("length", [15, 30, 51, 53])
def test_a_prefix_may_end_within_a_picture(multimodal: Multimodal, length: int) -> None:
    prompt, prefixes = prompt_of(list(range(10)), picture(), [20, 21, 22]), PrefixCache(2**20)
    keep(prefixes, multimodal, prompt[:length])
    cache = prefixes.find(multimodal, None, prompt)
    assert cache is not None and cache.offset == length and cache.keys == prompt.keys[:length]
    hidden = multimodal.hidden(mx.array([prompt[length:]]), cache)  # as a batch runs it: the cache knows the rest
    expected = multimodal.hidden(mx.array([prompt]), _admitted(multimodal, prompt))
    np.testing.assert_allclose(np.array(hidden[:, -1]), np.array(expected[:, -1]), atol=1e-4)


def _admitted(model: Multimodal, prompt: Prompt) -> PromptCache:
    cache = model.make_cache()
    cache.admit(mx.array([prompt]), prompt.places)
    return cache


def test_entries_keep_no_pixels_and_the_prompt_gives_them_back(multimodal: Multimodal) -> None:
    prompt, prefixes = prompt_of(list(range(10)), picture(), [20, 21]), PrefixCache(2**20)
    keep(prefixes, multimodal, prompt)
    pixels = weakref.ref(prompt.media[0])
    del prompt
    gc.collect()
    assert pixels() is None
    prompt = prompt_of(list(range(10)), picture(), [20, 21])
    longer = prompt + [7] * 20  # past the RoPE boundary later
    found = prefixes.find(multimodal, None, longer[:60])
    assert found is not None and found.places[0].medium is prompt.media[0]
    assert decoded(multimodal, found.reuse(longer), 4, cache=found) == decoded(multimodal, longer, 4)
