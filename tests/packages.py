"""The traces of a conversion on the disk."""

from __future__ import annotations

from pathlib import Path


def left_beside(out: Path) -> list[str]:
    """The names in the target's folder that a conversion to `out` made, the target's own included."""
    return sorted(path.name for path in out.parent.iterdir() if out.name in path.name)
