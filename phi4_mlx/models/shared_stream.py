"""The one stream of MLX on which models are loaded and tokens are drawn, by any thread, one thread at a time.

An array that is not computed yet belongs to the stream it was made on, and MLX's ordinary streams work in the thread
that made them alone. So a model of one thread, its RoPE tables, its lazy weights or a half-read answer would fail in
another one with "There is no Stream".
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Iterator

import mlx.core as mx

EXIT_PAUSE_S = 0.1

_turn = threading.RLock()
_streams: dict[str, mx.Stream] = {}  # by device
_thread = threading.local()
_first_key: list[int] = mx.random.state[0].tolist()  # MLX starts the random numbers of every thread with it


@contextlib.contextmanager
def shared_stream() -> Iterator[None]:
    """Waits for the other threads, and makes the shared stream of the default device the default one.

    Hold it for a step, not for an answer: a generator that yields inside would leave it to its caller.
    """
    with _turn:
        if not hasattr(_thread, "known"):
            _greet()
        device = mx.default_device()
        stream = _streams.get(str(device))
        if stream is None:
            stream = _streams[str(device)] = mx.new_thread_unsafe_stream(device)
        with mx.stream(stream):
            yield


def _greet() -> None:
    """Prepares a thread: without a seed of its own, it would draw the same numbers as every other thread."""
    _thread.known = True
    if threading.current_thread() is not threading.main_thread():
        _pause_at_exit()
        if mx.random.state[0].tolist() == _first_key:
            mx.random.seed(secrets.randbits(64))


@functools.cache
def _pause_at_exit() -> None:
    """Registers a pause: MLX frees a thread's data after its end, and aborts if the interpreter has ended by then."""
    atexit.register(time.sleep, EXIT_PAUSE_S)
