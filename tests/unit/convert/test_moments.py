"""Second moments are those of the wanted tokens, and a recorded block computes the same."""

from __future__ import annotations

import mlx.core as mx

from phi4_mlx.convert.moments import recording
from tests.conftest import make_tiny_model


def test_moments_are_those_of_the_wanted_inputs() -> None:
    model = make_tiny_model()
    block, layer = model.layers[0], model.layers[0].mlp.down_proj
    x = mx.random.normal((2, 5, 96), key=mx.random.key(0))
    plain = model.through_block(0, (x,))[0]
    gate, up = mx.split(block.mlp.gate_up_proj(x), 2, axis=-1)
    wanted = mx.array([0, 3, 4, 9])
    with recording(block.mlp, {"down_proj": layer}) as record:
        record.want(wanted)
        block.mlp(x)
        block.mlp(2 * x)
    inputs = [mx.sigmoid(g) * g * u for g, u in ((gate, up), (2 * gate, 2 * up))]
    chosen = mx.concatenate([each.reshape(10, -1)[wanted] for each in inputs])
    moments = record.moments["down_proj"]
    assert moments.tokens == 8
    assert mx.allclose(moments.take(), chosen.T @ chosen / 8, rtol=1e-4, atol=1e-5)
    assert block.mlp.down_proj is layer and mx.array_equal(model.through_block(0, (x,))[0], plain)
