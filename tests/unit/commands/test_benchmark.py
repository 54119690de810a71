"""The counts and the table of `phi4-mlx benchmark`; speeds depend on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.checkpoint import load_model
from phi4_mlx.commands import benchmark
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.text import Model
from phi4_mlx.terminal.amount import size
from tests.conftest import BOUNDARY
from tests.kinds import MAKERS
from tests.tiny_sambay import write_tiny_sambay

TinyModel = Callable[..., Model]


def caches_made(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[PromptCache]:
    """Notes every cache that the model makes."""
    made: list[PromptCache] = []
    make = model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda *given: made.append(make(*given)) or made[-1])
    return made


@pytest.mark.parametrize(("length", "regime"), [(20, "short"), (BOUNDARY - 5, "long")])
def test_an_answer_that_crosses_the_boundary_is_of_one_table(
    length: int, regime: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    made = caches_made(model, monkeypatch)
    first_s, decode_s, kv_bytes_per_token = benchmark.measure(model, length, 10)
    (cache,) = made
    assert (cache.regime, cache.rerun_tokens) == (regime, 0)
    assert cache.offset == length + 9  # the last token is drawn and not run
    assert first_s > 0 and decode_s > 0
    assert kv_bytes_per_token == model.context_cost().token_bytes


def test_quantised_keys_and_values_are_counted_as_they_are_kept(tiny_model: TinyModel) -> None:
    model = tiny_model(hidden_size=192)  # heads of 32
    packed = benchmark.measure(model, 20, 2, kv_bits=4)[2]
    assert packed == model.context_cost(4).token_bytes
    # 6 of 32 bits: 4, and 2 for a scale and a bias of 32 bits each per 32 numbers
    assert packed == model.context_cost().token_bytes * (4 + 2) / 32


@pytest.mark.parametrize("layers", [8, 12])
def test_states_are_fixed_and_shared_keys_are_read_by_each_layer(
    layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_tiny_sambay(tmp_path / "flash", num_hidden_layers=layers))
    options = ["--model", folder, "--prompt-tokens", "40", "90", "--generation-tokens", "4", "--repeats", "1"]
    assert benchmark.main([*options, "--bandwidth", "1", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    model = load_model(Path(folder))
    cost, half = model.context_cost(), layers // 2
    states = (half // 2 + 1) * 128 * 4 * (4 + 3)  # of 128 channels, each 4 states and 3 inputs of float32
    windows = half // 2 * 15 * cost.token_bytes
    for row, length in zip(read["lengths"], (40, 90), strict=True):
        assert row["kv_bytes_per_token"] == cost.token_bytes == 2 * 4 * 8 * 4
        assert 0 <= row["fixed_bytes"] - states - windows <= 4 * layers  # and the number of tokens in each layer
        kv_bytes = layers // 4 * cost.token_bytes * (length + 2)  # the full attention and the cross-attentions
        per_token = model.weights_bytes + row["fixed_bytes"] + kv_bytes
        assert row["ceiling_tokens_per_s"] == pytest.approx(1e9 / per_token)
    sizes = f"{size(cost.token_bytes)} of keys and values a token, {size(row['fixed_bytes'])} of states and windows"
    assert sizes in benchmark.table(read)
    assert benchmark.main([*options, "--kv-bits", "4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_reads_the_embedding_only_where_it_is_the_head(kind: str) -> None:
    tied, apart = (MAKERS[kind](tie_word_embeddings=tie) for tie in (True, False))
    assert tied.step_bytes == apart.step_bytes


def test_the_ceiling_of_phi_4_mini() -> None:
    bandwidth = benchmark.BANDWIDTHS["Apple M4 Max"]
    assert benchmark.ceiling_tokens_per_s(2.158e9, bandwidth) == pytest.approx(253, abs=0.5)
    assert benchmark.ceiling_tokens_per_s(2.158e9 + 131_072 * 16_464, bandwidth) == pytest.approx(126.5, abs=0.5)
    assert benchmark.ceiling_tokens_per_s(2.158e9, None) is None


def report(share: float | None) -> dict[str, Any]:
    row = {
        "prompt_tokens": 2048, "prefill_tokens_per_s": 2100.0, "time_to_first_token_s": 0.975,
        "decode_tokens_per_s": 95.25, "kv_bytes_per_token": 131072.0, "share_of_ceiling": share, "peak_bytes": 3.5e9,
    }  # fmt: skip
    bandwidth = None if share is None else 400
    return {
        "model": "some/model", "device": "Apple M2 Max", "mlx": "1.0", "bandwidth_gb_per_s": bandwidth,
        "weights_bytes": 2_158_000_000, "lengths": [row, row],
    }  # fmt: skip


def test_the_table() -> None:
    head, sizes, _, *columns, first, second = benchmark.table(report(0.625)).splitlines()
    assert head == "some/model on Apple M2 Max (400 GB/s), mlx 1.0"
    assert sizes == "2.16 GB of weights, 131 KB of keys and values a token"
    assert first == second and first.split() == ["2,048", "2,100.0", "0.975", "95.2", "62.5", "3.50", "GB"]
    assert len({len(line) for line in (*columns, first)}) == 1


def test_an_unknown_chip_has_no_share() -> None:
    head, *_, row = benchmark.table(report(None)).splitlines()
    assert "bandwidth not known: --bandwidth" in head
    assert row.split()[4] == "-"
