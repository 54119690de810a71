"""The facts of a machine, the models that fit, and the speeds."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.checkpoint import KINDS
from phi4_mlx.doctor import machine, speed
from phi4_mlx.doctor.check import Check, difference, run_check
from phi4_mlx.doctor.devices import devices
from phi4_mlx.doctor.tolerance import EXACT, rounding, steps
from phi4_mlx.generation import memory
from tests.multimodal_shapes import published_config
from tests.presets import PRESETS

SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "tie_word_embeddings", "head_dim",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Phi-4-mini-instruct", "phi-4-mini"), ("Phi-3.5-mini-instruct", "phi-3.5-mini"), ("Phi-4", "phi-4"),
        ("Phi-4-reasoning", "phi-4-reasoning"),
    ],
)  # fmt: skip
def test_the_family_has_the_published_shapes(name: str, preset: str) -> None:
    raw = machine.FAMILY[name]
    config: Any = KINDS[raw["model_type"]].config(raw)
    assert {each: getattr(config, each) for each in SHAPES} == {each: getattr(PRESETS[preset], each) for each in SHAPES}


def test_the_multimodal_model_has_the_published_towers() -> None:
    raw = machine.FAMILY["Phi-4-multimodal-instruct without its adapters"]
    ours: Any = KINDS["phi4mm"].config(raw)
    theirs: Any = KINDS["phi4mm"].config(published_config())
    for tower in ("vision", "audio"):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            assert getattr(getattr(ours, tower), name) == getattr(getattr(theirs, tower), name)
    assert {each: getattr(ours, each) for each in SHAPES} == {each: getattr(theirs, each) for each in SHAPES}


def test_less_memory_holds_a_shorter_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 4 * 10**9)
    found = {fit["model"]: fit for fit in machine.fits()}
    mini = found["Phi-4-mini-instruct"]
    assert mini["weights_bytes"] == pytest.approx(2.16e9, rel=0.01)
    assert 0 < mini["longest"]["16"] < mini["longest"]["8"] < mini["longest"]["4"] <= mini["context"]
    assert {*found["Phi-4"]["longest"].values()} == {0}
    assert [*found["Phi-4-mini-flash-reasoning"]["longest"]] == ["16"]


@pytest.mark.parametrize(("answer", "limit"), [("0\n", 0), ("24576\n", 24576), ("", None), ("unknown oid", None)])
def test_the_wired_limit_of_macos(answer: str, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysctl(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert words[-1] == "iogpu.wired_limit_mb"
        return subprocess.CompletedProcess(words, 0, answer, "")

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(subprocess, "run", sysctl)
    about = machine.about()
    assert about["wired_limit_mb"] == limit and about["versions"]["system"] == "macOS 26.1"


def test_speeds_have_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "COPIED", 1024)
    monkeypatch.setattr(speed, "GATE_UP", (64, 64))
    monkeypatch.setattr(speed, "RUNS", 1)
    monkeypatch.setattr(speed, "TOKENS", 3)
    found = [*speed.speeds()]
    assert [row["share"] is None for row in found] == [True, True, False, False, False]
    assert all(row["value"] > 0 for row in found)


def test_differences_are_relative_to_the_largest_element() -> None:
    one, other = mx.array([1.0, 4.0]), mx.array([1.0, 5.0])
    check = Check("pair", (), lambda: [one], EXACT)
    assert run_check(check, devices())["passed"]
    arrays = [[np.array(each)] for each in (one, other)]
    assert difference(*arrays) == pytest.approx(0.2)


def test_nan_is_a_failure_in_words() -> None:
    outcome = run_check(Check("nan", ("rope",), lambda: [mx.array([float("nan")])], EXACT), devices())
    assert not outcome["passed"] and outcome["error"] == "a result has NaN, infinity or another shape"
    assert outcome["twins"] is None


def test_nan_is_a_failure_where_nothing_is_compared() -> None:
    assert not run_check(Check("nan", (), lambda: [mx.array([float("nan")])], EXACT), devices()[:1])["passed"]


def test_an_exception_is_a_failure_in_words() -> None:
    def compute() -> list[mx.array]:
        raise RuntimeError("no kernel of this name")

    outcome = run_check(Check("raises", (), compute, EXACT), devices())
    assert outcome["error"] == "RuntimeError: no kernel of this name" and not outcome["passed"]


def test_tolerances_state_their_derivation() -> None:
    assert rounding(mx.float32, 256).value == 8 * 16 * 2**-24
    half = rounding(mx.bfloat16, 256, 4, 9)
    assert half.value == pytest.approx(8 * 32 * 2**-24 + 8 * 3 * 2**-8)
    assert half.why == "8 x sqrt(4 x 256) x 2^-24 + 8 x sqrt(9) x 2^-8"
    assert (half + steps(4)).why.endswith(" + 2^-6")
