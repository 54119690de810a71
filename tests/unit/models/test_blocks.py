"""A model that runs block by block computes what it computes as a whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.conftest import BOUNDARY, make_tiny_model
from tests.kinds import MAKERS


@pytest.mark.parametrize("length", [1, 9, BOUNDARY, BOUNDARY + 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_blocks_one_by_one_equal_the_whole(kind: str, length: int) -> None:
    model = MAKERS[kind]()
    ids = mx.random.randint(3, 200, (2, length), key=mx.random.key(length))
    embedding = model.model.embed_tokens(ids)
    carried = model.into_blocks(embedding)
    for number in range(len(model.layers)):
        carried = model.through_block(number, carried)
    assert mx.array_equal(model.out_of_blocks(carried), model.hidden(ids))


def test_untied_models_too() -> None:
    model = make_tiny_model(tie_word_embeddings=False)
    ids = mx.arange(3, 20)[None]
    carried = model.into_blocks(model.model.embed_tokens(ids))
    for number in range(len(model.layers)):
        carried = model.through_block(number, carried)
    assert mx.array_equal(model.out_of_blocks(carried), model.hidden(ids))
