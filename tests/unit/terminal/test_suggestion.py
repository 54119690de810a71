"""The right name for a mistyped one, and none where nothing is near."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.terminal.suggestion import is_slip, nearest, path_suggestion, suggestion

WORDS = st.text(alphabet="abcdef", min_size=3, max_size=12)


@given(WORDS, st.data())
def test_one_letter_is_always_bridged(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    other = data.draw(st.sampled_from("abcdefxyz"))
    for typo in (
        name[:at] + name[at + 1 :],
        name[:at] + other + name[at:],
        name[:at] + other + name[at + 1 :],
        name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
    ):
        assert is_slip(typo, name) and is_slip(name, typo)
        assert nearest(typo, ["zzzzzzzzzzzzzzz", name]) == [name]


@pytest.mark.parametrize(
    ("one", "other"),
    [("temp", "teem-p"), ("abc", "cba"), ("x", "p"), ("ab", "xy"), ("", "a"), ("temp", "tem"), ("demo", "omed")],
)
def test_two_letters_are_more_than_a_slip(one: str, other: str) -> None:
    assert is_slip(one, other) == (other == "tem")


def test_nearer_names_come_alone() -> None:
    assert nearest("Top_P", ["--top-p", "--top-k"]) == ["--top-p"]
    assert nearest("--top-", ["--top-p", "--top-k"]) == ["--top-p", "--top-k"]
    assert nearest("tokens", ["--max-tokens", "--temp"]) == ["--max-tokens"]
    assert nearest("temperature", ["--max-tokens", "--temp"]) == ["--temp"]
    assert nearest("speculative", ["--speculate", "--temp"]) == ["--speculate"]
    assert nearest("nope", ["--help", "--debug"]) == [] and nearest("x", []) == []
    assert suggestion("x", ["abc"]) == "" and suggestion("abd", ["abc"]) == "; did you mean abc?"
    assert suggestion("--t", ["--ta", "--tb", "--tc", "--td"]) == "; did you mean --ta or --tb or --tc?"


def test_a_path_is_compared_folder_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "phi-4-mini").mkdir(parents=True)
    (tmp_path / "models" / "phi-4-min").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for parent in ("models", "modles", "./models", "~/models", "~/Models", f"{tmp_path}/models", f"{tmp_path}/model"):
        right = parent.replace("modles", "models").replace("Models", "models").removesuffix("s") + "s"
        for name in ("phi4-mini", "phi-4-mni", "phi-4-mini/", "Phi_4_mini"):
            if not os.path.isdir(os.path.expanduser(f"{parent}/{name}")):
                assert path_suggestion(f"{parent}/{name}", os.path.isdir) == f"; did you mean {right}/phi-4-mini?"
    assert path_suggestion("modles", os.path.isdir) == "; did you mean models?"
    assert path_suggestion("dmeo", os.path.isdir, ["demo"]) == "; did you mean demo?"
    assert path_suggestion("mdels", os.path.isdir, ["models"]) == "; did you mean models?"


@pytest.mark.parametrize(
    "path", ["", "/", "a\0b", "a/" * 3000, "x" * 100_000, "~nobody/x", "/nowhere/at/all", "\udcff"]
)
def test_any_path_has_an_answer(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_suggestion(path, os.path.isdir, ["demo"]) == ""
