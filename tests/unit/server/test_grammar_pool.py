"""Grammars compiled in other processes: limits, crashes and kills cost one request, and nobody waits for a bomb."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.grammar import grammars
from phi4_mlx.grammar.apart import MAX_GROWTH_BYTES, Refused, TooCostly, Worker
from phi4_mlx.grammar.order import Order
from phi4_mlx.server.grammar_pool import MAX_WAITING, Busy, GrammarPool
from tests.conftest import ROOT
from tests.json_schemas import STRING, obj

HANG_S = 120.0
SMALL = Order(("json_schema", obj({"a": STRING})))
PATTERN = Order(("json_schema", {"type": "string", "pattern": "^a+$"}))


def bomb(number: int = 0) -> str:
    """A Lark grammar that takes minutes to compile."""
    patterns = " & ".join(f"/.*{letter}.{{{14 + number}}}.*/" for letter in "bc")
    return f"start: T\nT: ~/.*a.{{14}}.*/ & {patterns}\n"


def with_pool(work: Callable[[GrammarPool], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        pool = GrammarPool()
        try:
            return await asyncio.wait_for(work(pool), HANG_S)
        finally:
            pool.stop()

    return asyncio.run(run())


async def busy_pid(pool: GrammarPool) -> int:
    """The process that compiles a bomb of the slow lane."""
    used: dict[int, float] = {}
    while True:
        for pid in pool.pids:
            ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            if ticks - used.setdefault(pid, ticks) > 20:
                return pid
        await asyncio.sleep(0.05)


def test_a_grammar_is_the_same_as_in_this_process() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": obj({"a": {"not": {}}})}}]
    orders = (SMALL, PATTERN, Order(None, tools=tools), Order(("choice", ["a"]), tools=tools, choice="f"))

    async def work(pool: GrammarPool) -> None:
        for order in orders:
            assert await pool.make(order) == order.make()
        with pytest.raises(Refused, match="'not'") as raised:
            await pool.make(Order(("json_schema", {"not": {}})))
        assert raised.value.field == "response_format"

    with_pool(work)


@pytest.mark.slow
def test_a_bomb_is_refused_once_and_remembered() -> None:
    async def work(pool: GrammarPool) -> None:
        await pool.make(PATTERN)
        results = await asyncio.gather(
            *(pool.make(Order(("grammar", bomb()))) for _ in range(100)), return_exceptions=True
        )
        assert {str(each) for each in results} == {str(results[0])}
        assert "takes more than 2 s to compile; make it simpler" in str(results[0])
        before = set(pool.pids)
        for _ in range(100):
            with pytest.raises(Refused):
                await pool.make(Order(("grammar", bomb())))
        assert await pool.make(SMALL)
        assert await pool.make(Order(("regex", "a+")))
        assert before <= set(pool.pids), "no process ended for a remembered bomb"

    with_pool(work)


@pytest.mark.slow
def test_quick_grammars_do_not_wait_for_bombs() -> None:
    async def work(pool: GrammarPool) -> None:
        await pool.make(SMALL)
        bombs = [asyncio.create_task(pool.make(Order(("grammar", bomb(n))))) for n in range(4)]
        for n in range(20):
            await pool.make(Order(("json_schema", obj({f"a{n}": STRING}))))
        assert not any(task.done() for task in bombs)
        await asyncio.gather(*bombs, return_exceptions=True)

    with_pool(work)


@pytest.mark.slow
def test_too_many_bombs_are_refused_at_once() -> None:
    async def work(pool: GrammarPool) -> None:
        bombs = [asyncio.create_task(pool.make(Order(("grammar", bomb(n))))) for n in range(MAX_WAITING + 3)]
        while len(done := [task for task in bombs if task.done()]) < 3:
            await asyncio.sleep(0.01)
        assert [type(task.exception()) for task in done] == [Busy] * 3
        pool.stop()
        await asyncio.gather(*bombs, return_exceptions=True)

    with_pool(work)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP])
def test_a_compiler_that_dies_costs_one_request(number: int) -> None:
    async def work(pool: GrammarPool) -> None:
        await pool.make(PATTERN)
        task = asyncio.create_task(pool.make(Order(("grammar", bomb()))))
        os.kill(await busy_pid(pool), number)
        with pytest.raises(Refused, match=r"more than 2 s|more than 512 MB to compile, or ends its compiler"):
            await task
        assert await pool.make(Order(("regex", "b+"))) == grammars.regex("b+")

    with_pool(work)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compiler_that_is_killed_while_idle_is_replaced() -> None:
    async def work(pool: GrammarPool) -> None:
        await pool.make(SMALL)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        assert await pool.make(Order(("json_schema", obj({"b": STRING}))))

    with_pool(work)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compiler_has_a_limit_of_memory() -> None:
    worker = Worker()
    try:
        worker.make(SMALL.text, SMALL.field)
        limits = Path(f"/proc/{worker.pid}/limits").read_text()
        soft = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max address space"))
        used = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        assert MAX_GROWTH_BYTES // 2 < int(soft) - used <= MAX_GROWTH_BYTES
    finally:
        worker.stop()


def test_tools_that_are_too_costly_take_any_arguments_unless_they_are_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: Worker, order: str, field: str) -> tuple[str, tuple[str, ...]]:
        if '"pattern"' in order:
            raise TooCostly("the grammar of the tools takes long", field)
        made = Order.read(order).make()
        return made.text, made.loosened

    monkeypatch.setattr(Worker, "make", make)
    monkeypatch.setattr(Worker, "start", lambda self: None)
    costly = {"name": "f", "parameters": obj({"a": {"type": "string", "pattern": "a"}})}
    tool, strict = (
        {"type": "function", "function": {**costly, **more}} for more in ({}, {"name": "g", "strict": True})
    )
    grammar = with_pool(lambda pool: pool.make(Order(None, tools=[tool])))
    assert grammar.loosened == ("all schemas (the grammar of the tools takes long)",)
    for tools in ([strict], [tool, strict]):
        with pytest.raises(Refused, match="takes long"):
            with_pool(lambda pool, tools=tools: pool.make(Order(None, tools=tools)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_compilers_end_with_a_server_that_is_killed() -> None:
    code = (
        "import asyncio\nfrom phi4_mlx.server.grammar_pool import GrammarPool\n"
        "from phi4_mlx.grammar.order import Order\n"
        "async def main():\n    pool = GrammarPool()\n    await pool.make(Order(('regex', 'a')))\n"
        "    await pool.make(Order(('json_object',)))\n    print(*pool.pids, flush=True)\n"
        f"    await pool.make(Order(('grammar', {bomb()!r})))\nasyncio.run(main())\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    pids = server.stdout.readline().split()
    assert len(pids) >= 2
    server.kill()
    server.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a compiler outlives its server"
        time.sleep(0.05)


def test_an_intersection_is_compiled_apart_by_the_python_function_too() -> None:
    assert grammars.lark("start: T\nT: /a+/ & /.{3}/\n").text == grammars.lark_here("start: T\nT: /a+/ & /.{3}/\n").text


@pytest.mark.slow
def test_a_bomb_ends_in_an_error_in_python_too() -> None:
    with pytest.raises(RequestError, match="more than 2 s"):
        grammars.lark(bomb())
