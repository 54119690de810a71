"""The switches of fast paths, and the twins that they take, in shapes that the doctor does not try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.models import safe
from phi4_mlx.models.attention import PackedAttention
from phi4_mlx.models.cache import KVCache
from phi4_mlx.models.differential import difference
from phi4_mlx.models.fused import rope, softmax_attention
from phi4_mlx.models.safe import FastPath, without
from phi4_mlx.models.scan import selective_scan


@pytest.fixture(autouse=True)
def _unread() -> Iterator[None]:
    before = safe._off
    yield
    safe._off = before


@pytest.mark.parametrize("value", ["", " ", ",", "rope", "rope, scan", " scan ,,rope,"])
def test_the_environment_names_paths(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(safe.VARIABLE, value)
    safe._off = None
    names = [name for name in ("rope", "scan") if name in value]
    assert safe.switched_off() == names
    assert safe.safe("rope") is ("rope" in names) and not safe.safe("blocks")
    assert safe.notice() == (f"PHI4_MLX_SAFE={','.join(names)}: slower, with the same results" if names else None)


@pytest.mark.parametrize("value", ["compield", "all", "Rope", "rope,x"])
def test_unknown_names_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(safe.VARIABLE, value)
    safe._off = None
    with pytest.raises(RequestError, match="which is no fast path; known are attention, blocks"):
        safe.safe("rope")


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    safe._off = None
    monkeypatch.setenv(safe.VARIABLE, "rope")
    assert safe.safe("rope")
    monkeypatch.setenv(safe.VARIABLE, "scan")
    assert safe.safe("rope") and not safe.safe("scan")


def test_switches_end_with_their_context() -> None:
    with without("rope"), without("scan"):
        assert safe.switched_off() == ["rope", "scan"]
    assert safe.switched_off() == []


def random(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed() -> Sequence[mx.array]:
    segments = mx.array([[1] * 300 + [2] * 400 + [3] * 90])
    return [PackedAttention(segments)(*(random(n, 1, heads, 790, 16) for n, heads in enumerate((4, 2, 2))), 0.25)]


def masked() -> Sequence[mx.array]:
    queries, keys, values = random(1, 2, 6, 5, 16), random(2, 2, 2, 9, 16), random(3, 2, 2, 9, 16)
    bias = random(4, 1, 6, 5, 9)
    rows = mx.arange(9) >= mx.array([0, 7])[:, None, None, None]
    return [softmax_attention(queries, keys, values, 0.3, mask) for mask in (None, "causal", bias, rows)]


def rotated() -> Sequence[mx.array]:
    periods, heads = mx.arange(1, 9).astype(mx.float32), random(1, 3, 2, 4, 16)
    return [rope(heads, 16, offset, periods) for offset in (3, mx.array(3), mx.array([3, 0, 7]))]


def windowed() -> Sequence[mx.array]:
    """A window, a mask of rows, and a gradient through both."""
    arrays = [random(1, 2, 2, 2, 2, 9, 8), random(2, 2, 2, 2, 20, 8), random(3, 2, 2, 20, 16)]
    mask = mx.arange(20) >= mx.array([0, 11])[:, None, None, None]

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        found = difference(queries, keys, values, mx.array(0.3), 6, mask, training=True)
        return mx.where(mx.isnan(found), 0, found).square().sum()

    return [attend(*arrays)]


def scanned() -> Sequence[mx.array]:
    """All gradients of a prompt whose length is no multiple of a chunk, packed or not."""
    u, B, C, state = random(1, 1, 37, 8), random(2, 1, 37, 4), random(3, 1, 37, 4), random(4, 1, 4, 8)
    dt, A = mx.abs(random(5, 1, 37, 8)), -mx.abs(random(6, 4, 8))
    keep = (mx.arange(37) % 9 > 0).astype(mx.float32)[None]
    found: list[mx.array] = []
    for kept in (None, keep):

        def loss(*given: mx.array, kept: mx.array | None = kept) -> mx.array:
            u, dt, A, B, C, state = given
            outputs, last = selective_scan(u, dt, A, B, C, state, kept)
            return (outputs * outputs).sum() + (last * last).sum()

        found += [loss(u, dt, A, B, C, state), *mx.grad(loss, argnums=tuple(range(6)))(u, dt, A, B, C, state)]
    return found


def cached() -> Sequence[mx.array]:
    """Quantised keys, a bounded cache that drops its oldest, and one that is forked and trimmed."""
    found: list[mx.array] = []
    for cache in (KVCache(bits=4), KVCache(max_size=512), KVCache()):
        for n, T in enumerate((500, 30, 1)):
            cache.update_and_fetch(random(n, 1, 1, T, 32), random(n + 5, 1, 1, T, 32))
        twin = cache.fork(cache.offset)
        twin.update_and_fetch(random(8, 1, 1, 2, 32), random(9, 1, 1, 2, 32))
        twin.trim(1)
        cache.trim(3)
        cache.update_and_fetch(random(6, 1, 1, 1, 32), random(7, 1, 1, 1, 32))
        found += [*cache.state, *twin.state, mx.array([cache.offset, twin.offset])]
    return found


@pytest.mark.parametrize(
    ("path", "compute"),
    [
        ("slices", packed), ("attention", packed), ("attention", masked), ("rope", rotated), ("slices", windowed),
        ("scan", scanned), ("buffers", cached),
    ],
)  # fmt: skip
def test_a_twin_equals_its_fast_path(path: FastPath, compute: Callable[[], Sequence[mx.array]]) -> None:
    fast = compute()
    with without(path):
        slow = compute()
    for one, other in zip(fast, slow, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one.astype(mx.float32), other.astype(mx.float32), rtol=1e-4, atol=1e-4)
