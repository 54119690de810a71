"""The fingerprint by which ranks tell packages apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.ranks.package import files_fingerprint
from tests.adapters import adapted, save_adapter
from tests.conftest import make_tiny_model, write_tiny_checkpoint
from tests.kinds import WRITERS


@pytest.mark.parametrize("kind", WRITERS)
def test_copies_are_the_same_and_other_numbers_or_settings_are_not(tmp_path: Path, kind: str) -> None:
    one, other = (WRITERS[kind](tmp_path / str(seed), seed=seed) for seed in (1, 2))
    copied = Path(shutil.copytree(one, tmp_path / "elsewhere"))
    same = files_fingerprint(one)
    assert files_fingerprint(copied) == same != files_fingerprint(other)
    for name in ("config.json", "tokenizer.json"):
        changed = Path(shutil.copytree(one, tmp_path / f"changed {name}"))
        (changed / name).write_text((changed / name).read_text() + "\n")
        assert files_fingerprint(changed) != same


def test_a_note_beside_the_package_does_not_matter(tmp_path: Path) -> None:
    package = write_tiny_checkpoint(tmp_path / "package")
    before = files_fingerprint(package)
    (package / "README.md").write_text("a note")
    assert files_fingerprint(package) == before


def test_an_adapter_is_a_folder_or_its_file(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_adapter(adapted(make_tiny_model(), seed=seed), tmp_path / name, {})
    one, two = tmp_path / "one", tmp_path / "two"
    assert files_fingerprint(one) == files_fingerprint(one / "adapters.safetensors") != files_fingerprint(two)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        files_fingerprint(tmp_path)
