"""Layer caches and the prompt cache: append, trim, reuse, RoPE regimes, and mlx-lm's duck type."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.cached_tokens import MAX_PIECES
from phi4_mlx.models.prompt_cache import PromptCache
from tests.conftest import BOUNDARY, TinyModel
from tests.model_runs import close, decoded, filled_cache, greedy_without_cache, random_ids


def test_keys_and_values_are_returned_in_order() -> None:
    cache, parts = KVCache(), [mx.random.normal((1, 2, T, 8)) for T in (3, 1, 300, 1, 256)]
    for part in parts:
        keys, values = cache.update_and_fetch(part, -part)
    expected = mx.concatenate(parts, axis=2)
    assert mx.array_equal(keys, expected) and mx.array_equal(values, -expected)
    assert cache.offset == cache.size() == 561
    assert cache.nbytes >= 2 * expected.nbytes


def test_trim_undoes_append() -> None:
    cache, first, second = KVCache(), mx.random.normal((1, 2, 5, 8)), mx.random.normal((1, 2, 7, 8))
    cache.update_and_fetch(first, first)
    cache.update_and_fetch(second, second)
    assert cache.trim(7) == 7
    keys, _ = cache.update_and_fetch(second[:, :, :2], second[:, :, :2])
    assert mx.array_equal(keys, mx.concatenate([first, second[:, :, :2]], axis=2))
    assert cache.trim(100) == 7


def test_state_is_the_filled_part_of_the_buffers() -> None:
    cache, other, keys = KVCache(), KVCache(), mx.random.normal((1, 2, 5, 8))
    assert cache.empty() and list(cache.state) == []
    cache.update_and_fetch(keys, keys)
    other.state = cache.state
    assert other.offset == 5 and mx.array_equal(other.state[0], keys) and not other.empty()


def test_the_mask_array_equals_the_causal_mask() -> None:
    cache = KVCache()
    assert cache.make_mask(1) is None and cache.make_mask(4) == "causal"
    keys = mx.random.normal((1, 2, 6, 16))
    cache.update_and_fetch(keys[:, :, :2], keys[:, :, :2])
    mask = cache.make_mask(4, return_array=True)
    a = mx.fast.scaled_dot_product_attention(keys[:, :, 2:], keys, keys, scale=1.0, mask=mask)
    b = mx.fast.scaled_dot_product_attention(keys[:, :, 2:], keys, keys, scale=1.0, mask="causal")
    assert close(a, b)


@pytest.mark.parametrize("length", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 2 * BOUNDARY])
def test_decoding_equals_a_prefill_of_the_whole_sequence(tiny_model: TinyModel, length: int) -> None:
    model, prompt = tiny_model(), random_ids(length)
    cache = model.make_cache()
    model(prompt[:, : BOUNDARY - 4], cache)
    for at in range(BOUNDARY - 4, length):
        logits = model(prompt[:, at : at + 1], cache)
    assert close(logits[:, -1], model(prompt)[:, -1])
    assert cache.regime == ("long" if length > BOUNDARY else "short")
    assert cache.rerun_tokens == (BOUNDARY if length > BOUNDARY else 0)
    assert mx.array_equal(cache.ids, prompt) and cache.offset == length


def test_several_sequences_cross_the_boundary_together(tiny_model: TinyModel) -> None:
    model, prompts = tiny_model(), random_ids(90, B=3)
    cache = filled_cache(model, prompts[:, :60])
    assert close(model(prompts[:, 60:], cache), model(prompts)[:, 60:])


def test_a_trim_below_the_boundary_returns_to_the_short_table(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), random_ids(BOUNDARY + 20)
    cache = filled_cache(model, prompt)
    assert cache.trim(30) == 30
    logits = model(prompt[:, -30:-25], cache)
    assert cache.regime == "short"
    assert close(logits, model(prompt[:, :-25])[:, -5:])


def test_the_ids_follow_layers_that_are_trimmed_one_by_one(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), random_ids(BOUNDARY)
    cache = filled_cache(model, prompt)
    for layer in cache:  # as mlx-lm's trim_prompt_cache does
        layer.trim(10)
    other = mx.concatenate([prompt[:, :-10], random_ids(20, 5)], axis=1)
    assert close(model(other[:, -20:], cache)[:, -1], model(other)[:, -1])
    assert mx.array_equal(cache.ids, other)


def test_a_pinned_regime_never_changes(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), random_ids(BOUNDARY + 6)
    cache = filled_cache(model, prompt[:, :5], regime="long")
    assert cache.regime == "long"
    logits = model(prompt[:, 5:], cache)
    assert cache.rerun_tokens == 0
    assert close(logits, model(prompt)[:, 5:])


def test_reuse_keeps_the_shared_prefix(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), random_ids(40)[0].tolist()
    cache = model.make_cache()
    assert cache.reuse(prompt) == prompt
    model(mx.array([prompt]), cache)
    changed = [*prompt[:30], 511 - prompt[30], *prompt[31:]]
    rest = cache.reuse(changed)
    assert rest == changed[30:] and cache.offset == 30
    assert close(model(mx.array([rest]), cache)[:, -1], model(mx.array([changed]))[:, -1])
    assert cache.reuse(changed) == changed[-1:]  # the last token must run again, for its logits
    assert cache.reuse([*changed[:-1], *prompt]) == prompt


def test_a_short_prompt_after_an_interrupted_long_prefill_uses_the_short_table(tiny_model: TinyModel) -> None:
    """The interrupted prefill leaves a prefix computed under the long table."""
    model, short = tiny_model(), random_ids(40)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done:
            raise Stop

    cache, long = model.make_cache(), mx.concatenate([short[:, :20], random_ids(BOUNDARY, 5)], axis=1)
    with pytest.raises(Stop):
        list(generate_step(long[0], model, cache=cache, prefill_step_size=16, prompt_progress_callback=stop))
    assert cache.regime == "long" and cache.offset == 16
    assert close(model(short[:, 16:20], copy.deepcopy(cache)), model(short[:, :20])[:, 16:])
    rest = cache.reuse(short[0].tolist())
    assert decoded(model, rest, 8, cache=cache) == decoded(model, short[0].tolist(), 8)
    assert cache.regime == "short"


def test_a_deep_copy_is_independent(tiny_model: TinyModel) -> None:
    model = tiny_model()
    cache = filled_cache(model, random_ids(30))
    twin = copy.deepcopy(cache)
    logits = model(random_ids(BOUNDARY, 5), twin)  # crosses the boundary, which needs the ids
    assert cache.offset == 30 and twin.offset == 30 + BOUNDARY
    assert close(logits, model(random_ids(BOUNDARY, 5), cache))


def test_a_negative_trim_changes_nothing(tiny_model: TinyModel) -> None:
    model = tiny_model()
    cache = filled_cache(model, random_ids(30))
    assert cache.trim(-5) == 0 and cache[0].trim(-5) == 0 and cache.offset == 30


def test_ids_appended_one_by_one_are_joined_from_time_to_time(tiny_model: TinyModel) -> None:
    model = tiny_model(num_hidden_layers=1)
    cache, prompt = model.make_cache("long"), random_ids(600)
    for at in range(600):
        model(prompt[:, at : at + 1], cache)
    assert len(cache.tokens._pieces) <= MAX_PIECES
    assert mx.array_equal(cache.ids, prompt)


def test_a_list_of_layer_caches_works_on_one_side_of_the_boundary(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), random_ids(BOUNDARY + 1)
    layers = [KVCache() for _ in model.layers]
    logits = [model(prompt[:, :30], layers), model(prompt[:, 30:BOUNDARY], layers)]
    assert close(mx.concatenate(logits, axis=1), model(prompt[:, :BOUNDARY]))
    with pytest.raises(RequestError, match="make_cache"):
        model(prompt[:, BOUNDARY:], layers)


def test_mlx_lm_generates_with_the_right_table_and_trims_the_cache(tiny_model: TinyModel) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, prompt = tiny_model(), random_ids(BOUNDARY - 8)[0]
    cache = make_prompt_cache(model)
    assert isinstance(cache, PromptCache)
    steps = generate_step(prompt, model, max_tokens=20, prompt_cache=cache, prefill_step_size=10)
    assert [token for token, _ in steps] == greedy_without_cache(model, prompt.tolist(), 20)
    trim_prompt_cache(cache, 5)
    assert cache.ids.shape[1] == cache.offset


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_cache_has_the_expected_size_and_error(bits: int) -> None:
    cache, keys = KVCache(bits), mx.random.normal((1, 2, 512, 128))
    packed, _ = cache.update_and_fetch(keys, keys)
    assert cache.nbytes == 2 * 2 * 768 * 128 * (bits / 8 + 2 * 4 / 64)  # a float32 scale and bias per group of 64
    step = float(mx.abs(packed[1]).max())  # the largest scale
    assert mx.abs(mx.dequantize(*packed, 64, bits) - keys).max() <= 1.01 * step


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_decoding_equals_a_prefill_of_the_whole_sequence(tiny_model: TinyModel, bits: int) -> None:
    model = tiny_model(hidden_size=192, original_max_position_embeddings=40)
    cache, sequence = model.make_cache(kv_bits=bits), random_ids(60)
    model(sequence[:, :30], cache)
    logits = [model(sequence[:, at : at + 1], cache) for at in range(30, 60)]  # across the RoPE boundary
    whole = model(sequence, model.make_cache(kv_bits=bits))
    assert close(logits[-1][:, -1], whole[:, -1], 2e-3)
    cache.trim(12)
    logits_after_trim = model(sequence[:, 48:], cache)
    assert close(logits_after_trim[:, -1], whole[:, -1], 2e-3)


def test_the_error_of_logits_from_a_quantised_cache_is_bounded(tiny_model: TinyModel) -> None:
    model, sequence = tiny_model(hidden_size=192), random_ids(100)
    exact = model(sequence)
    spread = float(mx.sqrt(mx.var(exact)))
    for bits, most in ((8, 0.05), (4, 0.5)):
        error = model(sequence, model.make_cache(kv_bits=bits)) - exact
        assert float(mx.sqrt(mx.mean(error.square()))) < most * spread


def test_a_bounded_cache_drops_the_oldest_tokens_except_the_attention_sinks() -> None:
    cache = KVCache(max_size=1024)
    numbers = mx.arange(3000, dtype=mx.float32).reshape(1, 1, 3000, 1)
    for at in range(3000):
        keys, _ = cache.update_and_fetch(numbers[:, :, at : at + 1], numbers[:, :, at : at + 1])
        assert keys.shape[2] <= 1024
    kept = [int(each) for each in keys.reshape(-1).tolist()]
    assert kept[:4] == [0, 1, 2, 3] and kept[4:] == list(range(3000 - len(kept) + 4, 3000))
    assert 768 <= len(kept) == cache.size() and cache.offset == 3000
    assert cache.nbytes <= 2 * 4 * (1024 + KVCache.STEP)
    assert not cache.is_trimmable() and cache.trim(5) == 0 and cache.trim(3000) == 3000 and cache.is_trimmable()


def test_a_bounded_cache_is_exact_until_it_is_full(tiny_model: TinyModel) -> None:
    model, sequence = tiny_model(), random_ids(500)
    cache = filled_cache(model, sequence[:, :400], max_kv_size=512)
    logits = [model(sequence[:, at : at + 1], cache) for at in range(400, 500)]
    assert close(logits[-1][:, -1], model(sequence)[:, -1])


def test_a_bounded_cache_continues_across_the_rope_boundary(tiny_model: TinyModel) -> None:
    model = tiny_model(original_max_position_embeddings=600)
    cache = model.make_cache(max_kv_size=512)
    sequence = random_ids(1500)
    for start in range(0, 1500, 100):
        logits = model(sequence[:, start : start + 100], cache)
    assert cache.offset == 1500 and cache[0].size() <= 512 and cache.regime == "long"
    # From 800 tokens on, both caches hold the same ones: the crossing reruns 700 at once, and the next chunk drops 444.
    other = model.make_cache(max_kv_size=512, regime="long")
    for start in range(0, 1500, 100):
        expected = model(sequence[:, start : start + 100], other)
    assert close(logits, expected)
    assert cache.reuse(sequence[0, :700].tolist()) == sequence[0, :700].tolist() and cache.offset == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits 3.*4 or 8"),
        ({"kv_bits": 4.0}, r"kv_bits 4\.0.*4 or 8"),
        ({"kv_bits": 4}, "multiple of 32.*16"),
        ({"max_kv_size": 511}, "512.*511"),
        ({"max_kv_size": 600.5}, r"whole number from 512.*600\.5"),
        ({"regime": "middle"}, "'middle'.*short or long"),
    ],
)
def test_invalid_cache_options_are_refused(tiny_model: TinyModel, options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_model(hidden_size=96).make_cache(**options)
