"""Points to the top-level `convert/` in a checkout; an installed package has that folder here instead."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "convert")]
