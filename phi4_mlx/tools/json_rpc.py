"""JSON-RPC with a child process over its standard input and output, one message a line.

The process is not trusted. Whatever it writes or leaves out, a request ends with a result, an error or at its time
limit, and the process and its children end with the block.

Source: https://www.jsonrpc.org/specification; the MCP specification's stdio transport.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.terminal.printable import one_line

MAX_LINE = 16 * 2**20  # bytes of a message; an image may be several megabytes
MAX_UNSENT = 2**20  # bytes of answers to a process that asks and does not read
LOG_BYTES = 4096  # of the end of standard error
EXIT_S = 2.0  # for the process to end by itself, and again after SIGTERM
METHOD_NOT_FOUND = -32601


class RpcError(Exception):
    """A request without a result; the message is one line."""


class _Messages:
    """The messages in a stream of bytes. Lines that are none are ignored, as programs print to their output.

    Attributes:
        garbage: the beginning of the last such line.
        too_long: True after a line of over `MAX_LINE` bytes, which is dropped.
    """

    def __init__(self) -> None:
        self.garbage, self.too_long = b"", False
        self._line: list[bytes] = []  # whose end has not come
        self._line_bytes = 0

    def add(self, data: bytes) -> Iterator[JsonObject]:
        """Takes the next bytes and yields the messages that they complete."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            line, self._line, self._line_bytes = b"".join([*self._line, end]), [], 0
            try:
                value = json.loads(line) if line.strip() else []
            except (ValueError, RecursionError):
                value = None
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield each
                else:
                    self.garbage = line[:200]
        self._line.append(rest)
        self._line_bytes += len(rest)
        if self._line_bytes > MAX_LINE:
            self._line, self._line_bytes, self.too_long = [], 0, True


class ChildProcess:
    """A child process and the requests to it. A thread reads and writes, and never waits for the process.

    Args:
        words: the program and its arguments.

    Raises:
        OSError, ValueError: the program cannot be started.
    """

    def __init__(self, words: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        # In a session of its own, a Ctrl-C in the terminal does not reach it, and all its children have one group.
        self._child = subprocess.Popen(words, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._lock = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[JsonObject]] = {}
        self._last_id = 0
        self._unsent = bytearray()
        self._messages = _Messages()
        self._log = b""
        self._failure = ""
        self._closing = self._stopped = False
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="phi4_mlx.json_rpc", daemon=True)
        self._thread.start()

    def request(self, method: str, params: JsonObject, timeout_s: float) -> JsonObject:
        """Sends a request and waits for its result.

        Args:
            method: the method's name.
            params: its parameters.
            timeout_s: the time limit, in seconds.

        Raises:
            TimeoutError: no answer came in time.
            RpcError: the answer is an error or no object, or the process has ended.
        """
        answers: queue.SimpleQueue[JsonObject] = queue.SimpleQueue()
        answer: JsonObject = {}
        with self._lock:
            self._last_id += 1
            number = self._last_id
            self._waiting[number] = answers
        try:
            if not self._failure:
                self._send({"id": number, "method": method, "params": params})
                answer = answers.get(timeout=timeout_s)
        except (queue.Empty, KeyboardInterrupt) as error:
            self.notify("notifications/cancelled", {"requestId": number})
            if isinstance(error, KeyboardInterrupt):
                raise
            garbage = one_line(self._messages.garbage.decode(errors="replace"))[:80]
            written = f"; it writes {garbage!r}" if garbage else ""
            raise TimeoutError(f"{method!r} had no answer in time{written}") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if not answer:
            raise RpcError(self._failure)
        return _result(method, answer)

    def notify(self, method: str, params: JsonObject) -> None:
        """Sends a notification, which has no answer."""
        self._send({"method": method, "params": params})

    def close(self) -> None:
        """Ends the process: closes its standard input, and kills it and its children if it does not end by itself."""
        self._closing = True
        self._wake()
        try:
            for end in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(EXIT_S)
                    break
                self._kill(end)
        finally:  # after a Ctrl-C too
            self._kill(signal.SIGKILL)  # its children
        self._child.wait()
        self._stopped = True
        self._wake()
        self._thread.join()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            with contextlib.suppress(OSError):
                _open(pipe).close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _send(self, message: JsonObject) -> None:
        line = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
        with self._lock:
            self._unsent += line
        self._wake()

    def _wake(self) -> None:
        os.write(self._wake_write, b".")

    def _kill(self, end: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, end)

    # The thread.

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._fail(f"its output cannot be read: {type(error).__name__}: {error}")

    def _serve(self) -> None:
        stdin, stdout, stderr = map(_open, (self._child.stdin, self._child.stdout, self._child.stderr))
        for descriptor in (stdin.fileno(), stdout.fileno(), stderr.fileno(), self._wake_read):
            os.set_blocking(descriptor, False)
        with selectors.DefaultSelector() as selector:
            for readable in (stdout.fileno(), stderr.fileno(), self._wake_read):
                selector.register(readable, selectors.EVENT_READ)
            writes = False
            while not self._stopped:
                if writes != bool(self._unsent and not stdin.closed):
                    writes = not writes
                    selector.register(stdin, selectors.EVENT_WRITE) if writes else selector.unregister(stdin)
                ready = {key.fd for key, _ in selector.select(0.2)}
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                if stderr.fileno() in ready and not self._read_log(stderr.fileno()):
                    selector.unregister(stderr.fileno())
                if writes and stdin.fileno() in ready and not self._write(stdin.fileno()):
                    self._fail("it closed its standard input")
                if stdout.fileno() in ready:
                    if not self._read(stdout.fileno()):
                        selector.unregister(stdout.fileno())
                        self._read_log(stderr.fileno())
                        self._fail(_ended(self._child, self._log))
                elif not self._failure and self._child.poll() is not None:  # a child of it holds the pipe open
                    self._fail(_ended(self._child, self._log))
                if self._closing and not stdin.closed:
                    if writes:
                        writes = False
                        selector.unregister(stdin)
                    stdin.close()

    def _read_log(self, descriptor: int) -> bool:
        """Keeps the end of standard error; False at its end."""
        try:
            data = os.read(descriptor, 2**16)
        except BlockingIOError:
            return True
        self._log = (self._log + data)[-LOG_BYTES:]
        return bool(data)

    def _write(self, descriptor: int) -> bool:
        """Writes what the pipe takes; False if the process reads no more."""
        with self._lock:
            try:
                del self._unsent[: os.write(descriptor, self._unsent[: 2**16])]
            except BlockingIOError:
                pass
            except OSError:
                self._unsent.clear()
                return False
        return True

    def _read(self, descriptor: int) -> bool:
        """Takes the messages that have arrived; False if no more can come."""
        data = os.read(descriptor, 2**16)
        for message in self._messages.add(data):
            if "method" in message:
                self._answer(message)
            else:
                self._settle(message)
        if self._messages.too_long:
            self._fail(f"it wrote a line of over {MAX_LINE:,} bytes, the limit")
            self._kill(signal.SIGKILL)
        return bool(data)

    def _answer(self, message: JsonObject) -> None:
        """Answers a request of the process, of which only ping is served; a notification needs no answer."""
        if "id" in message and len(self._unsent) < MAX_UNSENT:
            error = {"code": METHOD_NOT_FOUND, "message": "Method not found"}
            outcome: JsonObject = {"result": {}} if message["method"] == "ping" else {"error": error}
            self._send({"id": message["id"], **outcome})

    def _settle(self, message: JsonObject) -> None:
        """Hands an answer to its request; one that nobody waits for is ignored."""
        number: Any = message.get("id")
        with self._lock:
            answers = self._waiting.pop(number, None) if type(number) is int else None
        if answers is not None:
            answers.put(message)

    def _fail(self, reason: str) -> None:
        """Ends all requests, also those to come."""
        self._failure = self._failure or reason
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for answers in waiting.values():
            answers.put({})


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _result(method: str, answer: JsonObject) -> JsonObject:
    if "error" in answer:
        given = answer["error"]
        said = given.get("message") if isinstance(given, dict) else given
        raise RpcError(one_line(said if isinstance(said, str) else json.dumps(given))[:500] or "an error, no text")
    if not isinstance(answer.get("result"), dict):
        raise RpcError(f"the result of {method} is not an object: {one_line(json.dumps(answer))[:100]}")
    result: JsonObject = answer["result"]
    return result


def _ended(child: subprocess.Popen[bytes], log: bytes) -> str:
    """How a process ended, with the last line of its standard error."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(0.5)
    code = child.returncode
    how = "it closed its standard output" if code is None else f"it ended with exit code {code}"
    lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
    return f"{one_line(lines[-1])[:300]} ({how})" if lines else how
