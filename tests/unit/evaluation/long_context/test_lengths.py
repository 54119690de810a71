"""Lengths double, stand on both sides of the RoPE boundary, and fit context and memory."""

from __future__ import annotations

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.long_context.lengths import check_lengths, default_lengths, table
from phi4_mlx.generation import memory
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.rope import regime_of
from tests.conftest import TinyModel
from tests.tiny_sambay import make_tiny_sambay


def model_of(tiny_model: TinyModel, context: int, boundary: int) -> LanguageModel:
    return tiny_model(max_position_embeddings=context, original_max_position_embeddings=boundary)


def test_defaults_double_and_enclose_the_boundary(tiny_model: TinyModel) -> None:
    lengths, note = default_lengths(model_of(tiny_model, 131072, 4096), room=128)
    assert lengths == [512, 1024, 2048, 3968, 4224, 8192, 16384, 32768, 65536, 130944] and not note
    tables = [table(length, 128, 4096) for length in lengths]
    assert tables == ["short table"] * 4 + ["long table"] * 6


def test_each_default_is_answered_under_one_table(tiny_model: TinyModel) -> None:
    for boundary, room in ((256, 96), (1000, 100), (512, 512), (64, 128), (2048, 1)):
        lengths, note = default_lengths(model_of(tiny_model, 4096, boundary), room)
        for length in lengths:
            assert regime_of(length, boundary) == regime_of(length + room, boundary)
        assert any(length > boundary for length in lengths)
        assert any(length < boundary for length in lengths) == (boundary > room)
        assert ("under the short RoPE table" in note) == (boundary <= room)


def test_memory_cuts_lengths_and_says_so(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_model, 131072, 4096)
    limit = memory.plan_context(model).peak_bytes(20000)
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)
    lengths, note = default_lengths(model, 128)
    assert lengths[-1] == 16384 and note == "not asked, for lack of memory: 32,768, 65,536, 130,944 tokens"
    with pytest.raises(RequestError, match=r"32,896 tokens takes .* this machine allows"):
        check_lengths(model, [1000, 32768], 128)


def test_a_length_beyond_the_context_is_one_line(tiny_model: TinyModel) -> None:
    model = model_of(tiny_model, 4096, 256)
    assert check_lengths(model, [3996, 300, 300], 100) == [300, 3996]
    for wrong in (3997, 200_000, 0, -5):
        with pytest.raises(RequestError, match=f"--lengths {wrong:,}: the context holds 4,096 tokens.*from 1 to 3,996"):
            check_lengths(model, [wrong], 100)
    for given in ([], [300]):
        with pytest.raises(RequestError, match=r"may take 5,000 tokens.*4,096 tokens: lower --max-tokens"):
            check_lengths(model, given, 5000) if given else default_lengths(model, 5000)


def test_a_model_with_one_table_has_no_boundary() -> None:
    model = make_tiny_sambay()
    lengths, _ = default_lengths(model, 64)
    assert model.boundary is None and {table(length, 64, None) for length in lengths} == {"one table"}


def test_a_length_between_the_tables_is_told_apart() -> None:
    assert [table(length, 10, 100) for length in (90, 91, 100, 101)] == [
        "short table", "both tables", "both tables", "long table",
    ]  # fmt: skip
