"""A file that does not have a JSON object is named, with advice that fits the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import ConfigError
from phi4_mlx.files.json_file import read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"ü": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"ü": [1, None]}


def test_a_missing_file_is_named_with_the_callers_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"state\.json does not exist$"):
        read_json(tmp_path / "state.json")
    with pytest.raises(ConfigError, match=r"state\.json does not exist; copy it$"):
        read_json(tmp_path / "state.json", if_missing="copy it")
    with pytest.raises(ConfigError, match=r"config\.json does not exist; a model folder holds config\.json, weights"):
        ModelConfig.from_folder(tmp_path)
