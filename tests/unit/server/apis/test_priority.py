"""`priority`, which every API takes as vLLM has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from phi4_mlx.server.apis import chat, completions, messages, responses
from phi4_mlx.server.apis.wire import Ask, WireError
from phi4_mlx.server.limits import PRIORITY_LIMIT
from phi4_mlx.server.service import Service
from phi4_mlx.tokens.prompt import Prompt

TALK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
BODIES: list[tuple[ModuleType, dict[str, Any]]] = [
    (chat, TALK),
    (messages, TALK),
    (completions, {"prompt": "hi"}),
    (responses, {"input": "hi"}),
]


@pytest.mark.parametrize(("api", "body"), BODIES, ids=[api.__name__.rpartition(".")[2] for api, _ in BODIES])
def test_every_api_reads_the_priority(api: ModuleType, body: dict[str, Any]) -> None:
    parse: Callable[..., Any] = api.parse
    assert parse(body, 512).priority == 0
    for given, read in ((3, 3), (-7, -7), (2.0, 2), (None, 0), (PRIORITY_LIMIT, PRIORITY_LIMIT)):
        ask = parse({**body, "priority": given}, 512)
        assert ask.priority == read and "priority" not in ask.ignored
    for wrong in (0.5, "high", True, PRIORITY_LIMIT + 1, -PRIORITY_LIMIT - 1, [1]):
        with pytest.raises(WireError, match="priority"):
            parse({**body, "priority": wrong}, 512)


def test_the_jobs_of_a_request_have_its_priority() -> None:
    service = Service(SimpleNamespace(longest=100), None, {"m": None}, 0, 60.0)  # type: ignore[arg-type]
    jobs, _ = asyncio.run(service.jobs(Ask("m", priority=3, n=2), [Prompt([1, 2])]))
    assert [job.priority for job in jobs] == [3, 3]
