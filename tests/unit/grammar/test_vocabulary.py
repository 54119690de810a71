"""A tokenizer in llguidance's form."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar.constraint import Constraint
from phi4_mlx.grammar.grammars import regex
from phi4_mlx.grammar.vocabulary import vocabulary_of
from phi4_mlx.tokens.tokenizer import load_tokenizer
from tests.conftest import DATA


@pytest.mark.parametrize("folder", ["tiny_tokenizer", "tiny_sentencepiece"])
def test_forced_text_is_in_tokens_of_the_vocabulary_without_a_space_before(folder: str) -> None:
    tokenizer = load_tokenizer(DATA / folder)
    for text in ("hello world", "the city", "\n", ""):
        ids = vocabulary_of(tokenizer).library.tokenize_str(text)
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
        assert len(ids) < len(text) or len(text) < 2


def test_a_vocabulary_is_made_once_and_dies_with_its_tokenizer() -> None:
    tokenizer = load_tokenizer(DATA / "tiny_tokenizer")
    assert vocabulary_of(tokenizer) is vocabulary_of(tokenizer)
    made = weakref.ref(vocabulary_of(tokenizer))
    del tokenizer
    gc.collect()
    assert made() is None


def test_a_tokenizer_without_an_end_is_refused() -> None:
    endless = load_tokenizer(DATA / "tiny_tokenizer")
    endless.eos_ids = frozenset()
    with pytest.raises(RequestError, match="ends a turn"):
        vocabulary_of(endless)


def test_control_strings_outside_the_added_tokens_are_never_allowed(tmp_path: Path) -> None:
    """o200k's own vocabulary lists strings like `<|endoftext03|>`."""
    shutil.copytree(DATA / "tiny_tokenizer", tmp_path, dirs_exist_ok=True)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= {"<|fake|>": 600, "fake": 601}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    mask = Constraint(regex("(?s:.*)"), load_tokenizer(tmp_path), 700).mask().tolist()
    assert mask[601] and not mask[600]
