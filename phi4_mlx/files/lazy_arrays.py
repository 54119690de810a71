"""Arrays of `mx.load`, which are read from the disk at their first use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, message_of


@contextlib.contextmanager
def unchanged(source: str) -> Iterator[None]:
    """Reports that MLX cannot read what a file's header promised.

    Args:
        source: of the arrays, as the subject of a message in the plural.

    Raises:
        CheckpointError: a file was cut or removed since `mx.load` read its header.
    """
    try:
        yield
    except RuntimeError as error:
        _drain_errors()
        raise CheckpointError(f"{source} changed on the disk ({message_of(error)}); load the model again") from None


def _drain_errors() -> None:
    """Waits for other reads that failed: MLX would raise their errors from the next `mx.eval`, whoever calls it."""
    while True:
        try:
            mx.synchronize(mx.cpu)
            return
        except RuntimeError:
            continue
