"""Comparison of two models, against a plain computation over all logits at once."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.convert.package import convert
from phi4_mlx.data.samples import load_samples
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.evaluation import compare as comparing
from phi4_mlx.evaluation.compare import Comparison, compare
from phi4_mlx.evaluation.distributions import Columns, Rows
from tests.conftest import BOUNDARY, TinyCheckpoint
from tests.kinds import WRITERS

LENGTHS = (3, BOUNDARY + 10, 20)  # words, about as many tokens; one sample crosses the RoPE boundary


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = np.random.default_rng(1)
    lines = [json.dumps({"text": " ".join(map(str, draw.integers(0, 10, length)))}) for length in LENGTHS]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(params=WRITERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two similar models of each kind: one as it is, one in 4 bits."""
    write = WRITERS[request.param]
    one = write(tmp_path / "one", 1)
    convert(one, tmp_path / "two", quantize=True, q_group_size=32)
    return one, tmp_path / "two"


def log_probs(folder: Path, data: Path) -> tuple[list[np.ndarray[Any, Any]], list[list[int]]]:
    """fp64 log-probabilities of each whole sample, run at once, and the tokens that follow."""
    model, tokenizer = load(folder)
    samples, _ = load_samples(data, tokenizer)
    found = []
    for sample in samples:
        logits = np.array(model(mx.array([sample.ids])).astype(mx.float32))[0, :-1].astype(float)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found, [sample.ids[1:] for sample in samples]


def divergence(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def swapped(comparison: Comparison) -> Comparison:
    return dataclasses.replace(comparison, a=comparison.b, b=comparison.a)


def test_figures_are_those_of_all_logits(pair: tuple[Path, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "CHUNK", 16)
    monkeypatch.setattr(comparing, "LOGITS_AT_ONCE", 7 * 512)
    found = compare(*pair, data)
    (one, after), (two, _) = (log_probs(each, data) for each in pair)
    p, q, true = np.concatenate(one), np.concatenate(two), np.concatenate(after)
    assert (found.samples, found.tokens) == (len(LENGTHS), len(true))
    assert found.a.kl.value == pytest.approx(divergence(p, q), rel=1e-4) and found.a.kl.value > 1e-3
    assert found.b.kl.value == pytest.approx(divergence(q, p), rel=1e-4)
    summed = [len(x) * divergence(x, y) for x, y in zip(one, two, strict=True)]
    assert found.a.sample_kl == pytest.approx(summed, rel=1e-4)
    assert found.agreement.value == (p.argmax(-1) == q.argmax(-1)).mean()
    for side, each in ((found.a, p), (found.b, q)):
        assert side.perplexity.value == pytest.approx(np.exp(-each[np.arange(len(true)), true].mean()), rel=1e-5)
        assert side.kl_outside == side.mass_outside == 0


@pytest.mark.parametrize("columns", [None, Columns(512, 16, 32)], ids=["all", "some"])
def test_a_model_is_not_apart_from_itself(tiny_checkpoint: TinyCheckpoint, data: Path, columns: Columns | None) -> None:
    found = compare(tiny_checkpoint(), tiny_checkpoint("same"), data, columns=columns)
    found = dataclasses.replace(found, b=dataclasses.replace(found.b, name=found.a.name))
    assert found.a == found.b and found.a.kl == comparing.Figure(0, 0, 0) and found.a.kl_outside == 0
    assert found.agreement == comparing.Figure(1, 1, 1)


@pytest.mark.parametrize("columns", [None, Columns(512, 16, 32)], ids=["all", "some"])
def test_either_model_may_go_first(tiny_checkpoint: TinyCheckpoint, data: Path, columns: Columns | None) -> None:
    pair = tiny_checkpoint(), tiny_checkpoint("b", seed=2)
    found = compare(*pair, data, columns=columns)
    assert found == swapped(compare(pair[1], pair[0], data, columns=columns))
    assert found.a.kl != found.b.kl


def test_tokens_left_out_are_estimated(pair: tuple[Path, Path], data: Path) -> None:
    exact = compare(*pair, data)
    some = compare(*pair, data, columns=Columns(512, 16, 64))
    assert some.a.perplexity == exact.a.perplexity and some.agreement == exact.agreement
    p, q = (np.concatenate(log_probs(each, data)[0]) for each in pair)
    likeliest = np.zeros(p.shape, bool)
    for each in (p, q):
        np.put_along_axis(likeliest, np.argsort(-each, axis=-1)[:, :16], True, axis=-1)
    for side, whole, x, y in ((some.a, exact.a, p, q), (some.b, exact.b, q, p)):
        certain = ((np.exp(x) * (x - y) - np.exp(x) + np.exp(y)) * likeliest).sum(-1).mean()
        assert side.kl.value - side.kl_outside == pytest.approx(certain, rel=1e-4) and certain < whole.kl.value
        assert side.kl.value == pytest.approx(whole.kl.value, rel=0.1)
        assert side.mass_outside == pytest.approx((np.exp(x) * ~likeliest).sum(-1).mean(), rel=0.1)


def test_every_token_stands_for_itself_or_is_represented() -> None:
    columns = Columns(1003, 8, 100)
    draw = np.random.default_rng(0)
    a, b = (np.stack([draw.permutation(1003)[:8] for _ in range(50)]).astype(np.int32) for _ in range(2))
    total = np.zeros(1003)
    for start in range(0, 1000, 50):
        ids = columns.ids(start, a, b)
        assert ids.shape == (50, columns.width)
        weights = columns.weights(ids)
        for row, each in zip(ids, weights, strict=True):
            assert len(set(row[each > 0])) == (each > 0).sum()  # none counts twice
            total[row[each > 0]] += each[each > 0]
        assert (weights[:, :16].sum(1) == [len({*x, *y}) for x, y in zip(a, b, strict=True)]).all()
    assert total.mean() == pytest.approx(1000, rel=0.01)


def test_one_model_is_in_memory_at_a_time(
    tiny_checkpoint: TinyCheckpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []

    def counted(folder: Path) -> Any:
        gc.collect()
        assert not [each for each in models if each() is not None]
        loaded = load(folder)
        models.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(comparing, "load", counted)
    compare(tiny_checkpoint(), tiny_checkpoint("b", seed=2), data, columns=Columns(512, 16, 32))
    assert len(models) == 3


def test_progress_counts_the_tokens_of_all_passes(tiny_checkpoint: TinyCheckpoint, data: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = tiny_checkpoint()
    found = compare(folder, folder, data, lambda *call: calls.append(call), Columns(512, 16, 32))
    assert calls[-1] == (3 * found.tokens, 3 * found.tokens) and calls == sorted(calls)


def test_one_sample_has_no_interval(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "1 2 3 4"}\n')
    found = compare(tiny_checkpoint(), tiny_checkpoint("b", seed=2), tmp_path / "one.jsonl")
    assert found.a.kl.value > 0 and found.a.kl.low is None and found.agreement.high is None


def test_intervals_contain_the_value_and_narrow_with_more_samples(
    tiny_checkpoint: TinyCheckpoint, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.jsonl").write_text(data.read_text() * 4)
    pair = tiny_checkpoint(), tiny_checkpoint("b", seed=2)
    few, many = (compare(*pair, each).a.kl for each in (data, tmp_path / "more.jsonl"))
    assert few.low is not None and few.high is not None and many.low is not None and many.high is not None
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert many.high - many.low < 0.7 * (few.high - few.low)


def test_cut_and_left_out_samples_are_told(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(max_position_embeddings=BOUNDARY + 16)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "1 " * 100}) + '\n{"text": ""}\n{"text": "1 2 3"}\n')
    found = compare(folder, folder, tmp_path / "data.jsonl")
    assert found.notes == (
        f"cut at the context of {BOUNDARY + 16} tokens: 1 sample",
        "left out, with no token to predict: 1 sample, the first data.jsonl:2",
    )
    assert found.samples == 2


def test_different_vocabularies_are_refused(tiny_checkpoint: TinyCheckpoint, data: Path) -> None:
    one, two = tiny_checkpoint(), tiny_checkpoint("b", vocab_size=640)
    with pytest.raises(RequestError, match=r"vocabulary of 512 .* of 640"):
        compare(one, two, data)


def test_different_tokenizers_are_refused(tiny_checkpoint: TinyCheckpoint, data: Path) -> None:
    one, two = tiny_checkpoint(), tiny_checkpoint("b")
    spec = json.loads((two / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    single = [text for text in vocabulary if len(text) == 1][:2]
    vocabulary[single[0]], vocabulary[single[1]] = vocabulary[single[1]], vocabulary[single[0]]
    (two / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RequestError, match=r"^token \d+ is b'.' in .* and b'.' in .*one tokenizer"):
        compare(one, two, data)


def test_a_model_that_computes_nan_is_refused(tiny_checkpoint: TinyCheckpoint, data: Path) -> None:
    one, two = tiny_checkpoint(), tiny_checkpoint("b")
    weights = mx.load(str(two / "model.safetensors"))
    name = next(name for name, array in weights.items() if array.ndim == 2 and "layers" in name)
    weights[name] = weights[name] * float("nan")
    mx.save_safetensors(str(two / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"b computes logits that are NaN .* data.jsonl:1;"):
        compare(one, two, data)


def test_a_disk_that_fills_up_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "rows", np.float32, 3)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RequestError, match="rows cannot be written: No space left on device; make room, or set TMPDIR"):
        rows.append(np.zeros((2, 3), np.float32))


def test_a_full_disk_is_told_before_anything_is_run(
    tiny_checkpoint: TinyCheckpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.delattr(comparing, "load")
    with pytest.raises(RequestError, match=r"has 1.00 KB free and the distributions need .* TMPDIR"):
        compare(tiny_checkpoint(), tiny_checkpoint("b", seed=2), data)
