"""The HTTP server's life: its signals, its lack of descriptors, and an end that nothing can delay."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from phi4_mlx.server.guard import TimedProtocol
from phi4_mlx.server.limits import GRACE_S, HEADER_BYTES, STORING_S
from phi4_mlx.server.log import LOG
from phi4_mlx.terminal.amount import amount

DESCRIPTORS = 4096  # asked for at the start; macOS gives a process 256 by default
CUTTING_S = 3.0  # for connections and tasks to end once they are cut
LEAVING_S = 3.0  # for threads that still work on a request, at the very end
MCP_LEAVING_S = 6.0  # for one MCP server; one that ignores the end of its input and SIGTERM is killed after about 4 s
TIDY_S = 10  # between two returns of freed memory while there are no requests; one takes some milliseconds
REMINDER_S = 60.0  # between two warnings about the same lack

LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open descriptors, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Lacks:
    """An event loop's exception handler that warns once a minute of a lack of descriptors or memory."""

    def __init__(self) -> None:
        self._told: dict[int, float] = {}  # error number -> the time of the last warning

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handles an exception of a callback or a task that nobody awaits."""
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context["message"]:
            return  # asyncio tries to accept again on a listener that has been closed since
        if not isinstance(error, OSError) or error.errno not in LACKS:
            return loop.default_exception_handler(context)
        now = time.monotonic()
        if now - self._told.get(error.errno, -REMINDER_S) >= REMINDER_S:
            self._told[error.errno] = now
            LOG.warning("new connections wait: %s; `ulimit -n` is the limit of descriptors", error.strerror)


class Stop:
    """Signals that end the process: the first asks for it, the second cuts running answers.

    Attributes:
        signal: the first signal; None so far.
        asked: set by the first signal.
        cut: set by the second.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked, self.cut = asyncio.Event(), asyncio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGINT, SIGTERM and SIGHUP (a closed terminal), which stays ignored under `nohup`."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # the end is near, and a traceback helps nobody

    async def or_done(self, work: asyncio.Task[None]) -> None:
        """Waits for a task, which the first signal cancels."""
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait([work, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if work.done():
            return work.result()
        work.cancel()

    def _received(self, number: int) -> None:
        if self.signal is not None:
            return self.cut.set()
        self.signal = number
        self.asked.set()
        leave_within(GRACE_S + CUTTING_S + STORING_S + 1.0, 1)


async def cancel_the_rest() -> None:
    """Cancels all other tasks, and waits a moment for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1.0)


def leave_soon(code: int, mcp_servers: int = 0) -> None:
    """Ends the process even if a thread still works on the request of a client that has left."""
    leave_within(LEAVING_S + MCP_LEAVING_S * mcp_servers, code)


def leave_within(seconds: float, code: int) -> None:
    """Ends the process after some time, whatever its threads do."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


class HttpServer(uvicorn.Server):
    """uvicorn's server, which stops when it is asked to, and cuts what the grace leaves.

    Args:
        app: the application.
        stop: the signals.
        drain: called at the first signal, to fail the requests that only wait.
    """

    def __init__(self, app: ASGIApp, stop: Stop, drain: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,  # `phi4_mlx.server.log` writes it
                access_log=False,
                server_header=False,
                proxy_headers=False,  # any client may send them
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(GRACE_S + CUTTING_S),
                callback_notify=self._return_memory,
                timeout_notify=TIDY_S,
            )
        )
        self._stop, self._drain = stop, drain
        gc.freeze()  # what lives as long as the server need not be searched again

    async def _return_memory(self) -> None:
        """Returns the memory of earlier requests to the system; neither Python nor glibc does so at once."""
        if not self.server_state.tasks:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `Stop`."""
        yield

    async def serve_beside(self, lost: asyncio.Task[str], listener: socket.socket) -> None:
        """Serves until `Stop` asks for the end, or until `lost` is done."""

        async def watch() -> None:
            asked = asyncio.create_task(self._stop.asked.wait())
            await asyncio.wait([asked, lost], return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            self.should_exit = True

        watching = asyncio.create_task(watch())
        try:
            await self.serve([listener])
        finally:
            watching.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets running answers end, and cuts the rest after the grace or at a second signal."""

        async def cut() -> None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.cut.wait(), GRACE_S)
            for connection in list(self.server_state.connections):
                connection.transport.abort()

        self._drain()
        if self.server_state.tasks:
            running = amount(len(self.server_state.tasks), "running request")
            LOG.warning("stopping: %s may take %g s; a second signal ends them now", running, GRACE_S)
        cutting = asyncio.create_task(cut())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()
