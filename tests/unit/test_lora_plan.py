"""The plan: predicted peaks beside measured ones, and a refusal that names a way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.batches import Batch
from phi4_mlx.lora.layers import add_adapter
from phi4_mlx.lora.plan import Growth, Plan, check_memory, make_plan, memory_limit
from phi4_mlx.lora.trainer import sft_loss
from phi4_mlx.models.text import Model

WIDE = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("config", "checkpointing", "rows", "width"),
    [
        ({"num_hidden_layers": 4}, False, 4, 512),
        ({"num_hidden_layers": 8}, True, 2, 1024),
        ({"vocab_size": 50_000}, False, 2, 640),
        ({"vocab_size": 50_000, "num_hidden_layers": 8}, True, 8, 300),
        (WIDE, False, 1, 1024),
    ],
)
def test_the_predicted_peak_is_within_a_tenth(
    tiny_model: Callable[..., Model], config: dict[str, Any], checkpointing: bool, rows: int, width: int
) -> None:
    model = tiny_model(max_position_embeddings=4096, original_max_position_embeddings=4096, **config)
    add_adapter(model, rank=8)
    model.train()
    model.model.recompute = checkpointing
    predicted = make_plan(model, sft_loss, width).peak_bytes(rows, width)
    ids = mx.random.randint(0, 512, (rows, width), key=mx.random.key(1))
    ones = mx.ones((rows, width), mx.int32)
    mx.eval(ids, ones)
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, sft_loss)(model, Batch(ids, ids, ones > 0, ones)))
    assert predicted == pytest.approx(mx.get_peak_memory(), rel=0.1)


def test_growth_goes_through_its_measurements() -> None:
    true = Growth(1000.0, 20.0, 0.5)
    found = Growth.fit(2, 64, *(round(true.at(*shape)) for shape in ((2, 64), (4, 64), (4, 32))))
    assert (found.constant, found.token, found.pair) == pytest.approx((1000, 20, 0.5))


def test_what_cannot_fit_is_refused_with_a_setting_that_would() -> None:
    plan = Plan(10**9, Growth(0, 1e5, 0), Growth(0, 1e6, 0), 0)
    small = Plan(10**9, Growth(0, 1e4, 0), Growth(0, 1e5, 0), 0)

    def check(plan: Plan, rows: int, width: int, other: Plan | None, limit: int) -> None:
        batches = SimpleNamespace(shapes=[(rows, width)], rows=rows, world=1, samples_in_a_pair=1)
        check_memory(plan, batches, None if other is None else lambda: other, limit)  # type: ignore[arg-type]

    check(plan, 4, 1024, small, 6 * 10**9)
    with pytest.raises(RequestError, match=r"4 rows of 2,048 tokens need 9\.2 GB.* has 6\.0 GB") as caught:
        check(plan, 4, 2048, small, 6 * 10**9)
    message = str(caught.value)
    assert "--grad-checkpoint" in message and "--batch-size 2" in message and "--max-seq-length 1216" in message
    assert plan.peak_bytes(2, 2048) <= 6 * 10**9 and plan.peak_bytes(4, 1216) <= 6 * 10**9
    with pytest.raises(RequestError, match="a smaller model"):
        check(plan, 1, 64, None, 10**9)
    with pytest.raises(RequestError) as caught:
        check(plan, 4, 2048, plan, 6 * 10**9)  # running blocks again would not be enough
    assert "--grad-checkpoint" not in str(caught.value)
    assert memory_limit() > 10**9
