"""Rows of a batch cache: whatever is appended and taken back, each goes on as a cache of its own would."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from phi4_mlx.models import batch_cache as batch_cache_module
from tests.conftest import make_tiny_model
from tests.model_runs import close, filled_cache
from tests.tiny_multimodal import make_tiny_multimodal
from tests.tiny_sambay import make_tiny_sambay

LONG = {"original_max_position_embeddings": 4096, "hidden_size": 192}


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("slack", [0, 32, 10_000])
def test_rows_take_back_their_own_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, slack: int, kv_bits: int | None
) -> None:
    """Random passes, widths, trims, joins, departures and copies, with rows that are aligned always or hardly ever."""
    monkeypatch.setattr(batch_cache_module, "SLACK", slack)
    draw, model = random.Random(slack + (kv_bits or 0)), make_tiny_model(seed=3, **LONG)
    cache, rows, columns = model.make_batch_cache("short", kv_bits), list[list[int]](), []

    def check(row: list[int], logits: mx.array) -> None:
        whole = model(mx.array([row]), model.make_cache(kv_bits=kv_bits))[0, -len(logits) :]
        assert close(logits, whole, 2e-4)

    for step in range(40):
        if not rows or (step % 9 == 0 and len(rows) < 5):
            new = [[draw.randrange(512) for _ in range(draw.randint(1, 30))] for _ in range(2)]
            cache.join([filled_cache(model, mx.array([ids]), kv_bits=kv_bits) for ids in new])
            rows += new
        width = draw.choice([1, 1, 2, 5, 9])
        ids = [[draw.randrange(512) for _ in range(width)] for _ in rows]
        logits = model(mx.array(ids), cache)
        taken = [draw.randint(0, width - 1) if draw.random() < 0.7 else 0 for _ in rows]
        if width > 1:
            cache.take_back(taken)
        for n, (row, new_ids) in enumerate(zip(rows, ids, strict=True)):
            kept = width - (taken[n] if width > 1 else 0)
            row += new_ids[:kept]
            if step % 5 == 0:
                check(row, logits[n, :kept])
        assert cache.lengths == [len(row) for row in rows]
        columns.append(cache.columns)
        if step % 11 == 10:
            copied = cache.copy_row(0, rows[0], model.make_cache(kv_bits=kv_bits))
            assert copied.ids[0].tolist() == rows[0] and copied.offset == len(rows[0])
            kept_rows = sorted(draw.sample(range(len(rows)), draw.randint(1, len(rows))))
            cache.keep(kept_rows)
            rows = [rows[n] for n in kept_rows]
            assert cache.lengths == [len(row) for row in rows]
    longest = max(map(len, rows))
    assert (cache.columns <= longest + max(slack, cache.columns // 8) + 9) or slack == 10_000


def test_columns_that_all_rows_give_back_leave_no_gap() -> None:
    model = make_tiny_model(seed=3, **LONG)
    cache = model.make_batch_cache("short")
    cache.join([filled_cache(model, mx.array([[1, 2, 3]])) for _ in range(2)])
    model(mx.array([[4, 5, 6, 7]] * 2), cache)
    cache.take_back([3, 3])
    assert cache.columns == 4 and cache.lengths == [4, 4]
    assert cache.make_mask(1) is None and cache.make_mask(3) == "causal"


def test_a_model_whose_states_have_no_columns_says_so() -> None:
    assert make_tiny_model().make_batch_cache("short").rewindable
    assert make_tiny_multimodal().make_batch_cache("short").rewindable
    assert not make_tiny_sambay().make_batch_cache("short").rewindable
