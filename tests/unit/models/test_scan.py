"""The selective scan: chunks equal the recurrence written token by token, gradients too, in bounded memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from phi4_mlx.models.scan import CHUNK, selective_scan, short_scan
from tests.model_runs import close

Arrays = list[mx.array]


def inputs(B: int, T: int, E: int, N: int, seed: int = 0) -> Arrays:
    """u, dt, A, B, C and the state before."""
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    u, dt, A, weights, readout, state = (
        mx.random.normal(shape, key=next(keys))
        for shape in ((B, T, E), (B, T, E), (N, E), (B, T, N), (B, T, N), (B, N, E))
    )
    return [u, mx.abs(dt), -mx.abs(A), weights, readout, state]


def sequential(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array, keep: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    outputs = []
    for t in range(u.shape[1]):
        decay = mx.exp(dt[:, t, None, :] * A)
        if keep is not None:
            decay = decay * keep[:, t, None, None]
        state = state * decay + (dt[:, t] * u[:, t])[:, None, :] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * state).sum(axis=1))
    return mx.stack(outputs, axis=1), state


def borders(B: int, T: int) -> mx.array:
    return (mx.random.uniform(shape=(B, T), key=mx.random.key(1)) > 0.15).astype(mx.float32)


@pytest.mark.parametrize("T", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_scan_in_chunks_equals_the_recurrence(T: int, packed: bool) -> None:
    given, keep = inputs(2, T, 12, 4), borders(2, T) if packed else None
    for found, expected in zip(selective_scan(*given, keep), sequential(*given, keep), strict=True):
        assert close(found, expected, 1e-5)


@pytest.mark.parametrize("T", [1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_its_gradient_equals_that_of_the_recurrence(T: int, packed: bool) -> None:
    given, keep = inputs(2, T, 6, 3), borders(2, T) if packed else None
    weights = inputs(2, T, 6, 3, seed=2)

    def loss(scan, *arrays: mx.array) -> mx.array:  # type: ignore[no-untyped-def]
        outputs, state = scan(*arrays, keep)
        return (outputs * weights[0]).sum() + (state * weights[5]).sum()

    every = list(range(6))
    found = mx.grad(lambda *arrays: loss(selective_scan, *arrays), every)(*given)
    expected = mx.grad(lambda *arrays: loss(sequential, *arrays), every)(*given)
    assert all(close(one, other, 1e-4) for one, other in zip(found, expected, strict=True))


def test_a_short_scan_gives_the_state_after_each_token() -> None:
    given = inputs(1, 20, 8, 4)
    outputs, states = short_scan(*given)
    assert mx.array_equal(outputs, selective_scan(*given)[0])
    for t in (0, 7, 19):
        *arrays, state = given
        u, dt, A, B, C = arrays
        upto = slice(0, t + 1)
        assert close(states[t], sequential(u[:, upto], dt[:, upto], A, B[:, upto], C[:, upto], state)[1], 1e-5)


def peak_beside_inputs(T: int, gradient: bool, B: int = 1) -> int:
    """Bytes at the peak of a scan, or of its gradient, beyond those of its inputs."""
    given = inputs(B, T, 512, 16)
    mx.eval(given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if gradient:
        mx.eval(mx.grad(lambda *arrays: selective_scan(*arrays)[0].sum(), [0, 1, 2, 3, 4, 5])(*given))
    else:
        mx.eval(selective_scan(*given))
    return mx.get_peak_memory() - before


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_beyond_the_outputs_does_not_grow_with_the_length(gradient: bool) -> None:
    row = 512 * 4  # bytes of a token in an array [T, E]
    arrays = 6 if gradient else 3  # [T, E] at the peak
    for T in (256, 2048):
        assert peak_beside_inputs(T, gradient) <= arrays * T * row + 24 * CHUNK * 16 * row


@pytest.mark.slow
@pytest.mark.parametrize("B", [4, 16])
def test_memory_beyond_the_outputs_does_not_grow_with_the_batch(B: int) -> None:
    row = 512 * 4
    assert peak_beside_inputs(256, False, B) <= 3 * B * 256 * row + 24 * CHUNK * 16 * row
