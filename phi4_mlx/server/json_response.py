"""A response in JSON."""

from __future__ import annotations

from starlette.responses import Response

from phi4_mlx.server.apis.wire import json_bytes


class JsonResponse(Response):
    """A response whose content is a JSON value."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The bytes of the body."""
        return json_bytes(content)
