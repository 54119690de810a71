"""The processes that compile grammars for the server: a few, in two lanes, and a memory of what they made.

A hostile grammar takes its limit of time or memory and ends its process, not the server. Grammars without patterns,
multiples or intersections are quick, and have a lane of their own, so that they do not wait for the slow ones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import queue
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from phi4_mlx.grammar.apart import Refused, TooCostly, Worker
from phi4_mlx.grammar.grammars import Grammar
from phi4_mlx.grammar.order import Order

QUICK_WORKERS = 1
SLOW_WORKERS = 2
MAX_WAITING = 8  # orders in a lane; at 2 s each, the last in the slow lane waits 8 s
MAX_KNOWN = 256  # results
MAX_KNOWN_CHARS = 2**24  # of the results' texts

Result = Grammar | Refused


class Busy(Exception):
    """Too many grammars wait to be compiled."""


class GrammarPool:
    """Makes grammars in other processes. All methods must be called in the event loop's thread."""

    def __init__(self) -> None:
        self._quick, self._slow = _Lane(QUICK_WORKERS), _Lane(SLOW_WORKERS)
        self._known: OrderedDict[bytes, Result] = OrderedDict()
        self._known_chars = 0
        self._running: dict[bytes, asyncio.Task[Result]] = {}

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run."""
        return [worker.pid for lane in (self._quick, self._slow) for worker in lane.workers if worker.pid is not None]

    def start(self) -> None:
        """Starts the processes; they also start by themselves, at the first order."""
        self._quick.start()
        self._slow.start()

    def stop(self) -> None:
        """Ends the processes."""
        self._quick.stop()
        self._slow.stop()

    async def make(self, order: Order) -> Grammar:
        """Makes a grammar, or finds it among the last ones; orders that are equal are made once.

        Raises:
            Refused: it cannot be made, or exceeds a limit.
            Busy: too many others wait.
        """
        text = await asyncio.to_thread(lambda: order.text)  # a megabyte of tools would hold up the event loop
        key = hashlib.sha256(text.encode()).digest()
        result = self._known.get(key)
        if result is None:
            if key not in self._running:
                lane = self._slow if order.slow else self._quick
                lane.enter()
                self._running[key] = asyncio.create_task(self._made(key, lane, order))
            result = await asyncio.shield(self._running[key])  # others may wait for it when this client has left
        else:
            self._known.move_to_end(key)
        if isinstance(result, Refused):
            raise Refused(str(result), result.field)
        return result

    async def _made(self, key: bytes, lane: _Lane, order: Order) -> Result:
        try:
            result = await self._tried(lane, order)
        finally:
            lane.leave()
            del self._running[key]
        self._known[key] = result
        self._known_chars += _chars(result)
        while len(self._known) > MAX_KNOWN or self._known_chars > MAX_KNOWN_CHARS:
            self._known_chars -= _chars(self._known.popitem(last=False)[1])
        return result

    async def _tried(self, lane: _Lane, order: Order) -> Result:
        """The grammar, or the refusal; schemas that are too costly are left out unless they are strict."""
        try:
            return await lane.make(order)
        except TooCostly as error:
            loose = order.without_schemas()
            if loose is None:
                return error
            reason = str(error)
        except Refused as error:
            return error
        try:
            grammar = await lane.make(loose)
        except Refused as error:
            return error
        return dataclasses.replace(grammar, loosened=(f"all schemas ({reason})", *grammar.loosened))


def _chars(result: Result) -> int:
    return len(result.text) if isinstance(result, Grammar) else len(str(result))


class _Lane:
    """Workers of equal rank, each used by one thread at a time."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grammars")
        self.workers = [Worker() for _ in range(workers)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._free.put(worker)
        self._waiting = 0

    def enter(self) -> None:
        """Counts an order; raises `Busy` if too many wait."""
        if self._waiting >= MAX_WAITING:
            raise Busy
        self._waiting += 1

    def leave(self) -> None:
        self._waiting -= 1

    async def make(self, order: Order) -> Grammar:
        done: concurrent.futures.Future[Grammar] = concurrent.futures.Future()
        self._threads.submit(self._make, order, done)
        return await asyncio.wrap_future(done)

    def start(self) -> None:
        for _ in self.workers:
            self._threads.submit(self._make, None, None)

    def stop(self) -> None:
        for worker in self.workers:
            worker.close()
        self._threads.shutdown(wait=False)

    def _make(self, order: Order | None, done: concurrent.futures.Future[Grammar] | None) -> None:
        """A thread: makes a grammar, then starts the worker again if that has ended it."""
        worker = self._free.get()
        try:
            if order is not None and done is not None:
                try:
                    done.set_result(Grammar(*worker.make(order.text, order.field)))
                except Exception as error:
                    done.set_exception(error)
            with contextlib.suppress(OSError):
                worker.start()
        finally:
            self._free.put(worker)
