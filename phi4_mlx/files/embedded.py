"""The packages that come with the code, by the name that stands for a folder."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent

EMBEDDED = {
    "demo": _ROOT / "demo",
    "demo-flash": _ROOT / "demo_flash",
    "demo-multimodal": _ROOT / "demo_multimodal",
}
