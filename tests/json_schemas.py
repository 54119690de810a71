"""Short ways to write JSON schemas, for tests of grammars."""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}
