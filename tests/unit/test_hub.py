"""Names of models: what a mistyped one is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.hub import DEFAULT_MODEL, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, beside a cache with a model and a dataset; no network."""
    from huggingface_hub import constants

    for name in ("models--owner--small-model", "datasets--owner--data", "version.txt"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    (tmp_path / "work" / "my-phi" / "best").mkdir(parents=True)
    (tmp_path / "work" / "my-phy").touch()  # a file is no model
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("dmeo", "demo"), ("deemo", "demo"), ("demi", "demo"), ("dem", "demo"), ("Demo", "demo"), ("demo ", "demo"),
        ("demoflash", "demo-flash"), ("demo_flash", "demo-flash"), ("demo-flsh", "demo-flash"),
        ("demo-multimodel", "demo-multimodal"),
        ("myphi", "my-phi"), ("My_Phi", "my-phi"), ("./my-pih", "./my-phi"), ("my-phi/bets", "my-phi/best"),
        ("my-ph/best", "my-phi/best"), ("ownr/small-model", "owner/small-model"),
        ("owner/smallmodel", "owner/small-model"),
        ("small-model", "owner/small-model"), ("mlx-comunity/Phi-4-mini-instruct-4bit", DEFAULT_MODEL),
        ("Phi-4-mini-instruct-4bit", DEFAULT_MODEL), ("owner/data", None), ("xyzzy", None), ("no/such", None),
    ],
)  # fmt: skip
def test_a_mistyped_model_is_answered_with_the_right_name(given: str, meant: str | None, cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(given)
    end = f"; did you mean {meant}?" if meant else "; --model demo needs no download"
    assert str(caught.value).endswith(end) and "\n" not in str(caught.value)


def test_a_cache_that_does_not_exist_is_empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "nowhere"))
    with pytest.raises(CheckpointError, match="did you mean demo"):
        resolve("dmeo")
