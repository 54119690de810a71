"""The version of this package."""

from __future__ import annotations


def version() -> str:
    """The version of phi4_mlx; "" in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("phi4-mlx")
    except metadata.PackageNotFoundError:
        return ""
