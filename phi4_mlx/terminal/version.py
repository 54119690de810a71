"""The version of this package: setup.py, `--version`, the bridge and `phi4_mlx.__version__` all read it here."""

from __future__ import annotations

__version__ = "0.1.0"


def version() -> str:
    """The version of phi4_mlx."""
    return __version__
