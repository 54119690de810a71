"""`python -m phi4_mlx.bridge --jsonl`: one request a line on standard input, one event a line on standard output.

    {"id": 1, "do": "load", "name": "demo"}               ->  {"id": 1, "event": "finish", "model": 1, ...}
    {"id": 2, "do": "chat", "messages": [...]}            ->  {"id": 2, "event": "token", "text": "Hel"}, ...
    {"cancel": 2}                                         ->  {"id": 2, "event": "finish", "reason": "cancelled", ...}

"do" is load, unload, use_adapter, count_tokens, chat, complete or version; the other fields are the arguments of that
function in `phi4_mlx.bridge`; messages may have pictures and sounds, by path or in base64. "model" is by default the
model loaded last. Requests run in order; a cancellation takes effect at once. A malformed line is answered with an
error, whose id is null if the line has none. At the end of the input the program finishes all requests and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from phi4_mlx import bridge
from phi4_mlx.bridge.events import LAST, BridgeEvent, refusal
from phi4_mlx.bridge.worker import Stream, Work
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.terminal.command import READER_LEFT, Parser, run, typed, word

ACTIONS = ("load", "unload", "use_adapter", "count_tokens", "chat", "complete", "version")
GIVEN = {"chat": "messages", "complete": "prompt"}  # the actions that stream an answer, and its input's name
MAX_LINE = 2**26  # bytes; the longest context is about half a megabyte of text, and a photo in base64 is up to 16 MB

RequestId = int | str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _serve, argv)


def _parser() -> Parser:
    parser = Parser(
        prog=typed("bridge"), description="Serve another program over standard input and output, in JSON Lines."
    )
    parser.add_argument(
        "--jsonl", action="store_true", required=True, help="requests and events are JSON objects, one a line"
    )
    parser.add_argument("--model", type=word, help="a model to load before the first request (default: none)")
    parser.add_argument(
        "--adapter-path", type=word, metavar="FOLDER", help="a LoRA adapter to put on --model (default: none)"
    )
    return parser


def _serve(args: argparse.Namespace) -> None:
    if args.adapter_path is not None and args.model is None:
        raise RequestError("--adapter-path needs --model, the model to put the adapter on")
    with _private_output() as output:
        lines = Lines(output)
        if args.model is not None:
            lines.load(args.model, args.adapter_path or "")
        lines.read(sys.stdin.buffer)


@contextlib.contextmanager
def _private_output() -> Iterator[IO[bytes]]:
    """Standard output for events only: everything else that is printed goes to standard error."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        yield output
    finally:
        sys.stdout = before  # `output` stays open: requests that are cancelled at exit still write their last event


class Lines:
    """Reads requests and writes their events, one a line."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._streams: dict[RequestId, Stream] = {}  # of the requests under way
        self._model = 0  # the one loaded last

    def load(self, name: str, adapter_path: str) -> None:
        """Loads the model that the command line names.

        Raises:
            CheckpointError: the model cannot be loaded.
        """
        event = bridge.load(name, adapter_path)
        if event["event"] == "error":
            raise CheckpointError(event["message"])
        self._model = event["model"]

    def read(self, source: IO[bytes]) -> None:
        """Reads requests to the end of `source`, and waits until all are done."""
        try:
            while line := source.readline(MAX_LINE):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := source.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    self._refuse(None, f"a line is longer than {MAX_LINE:,} bytes")
                elif line.strip():
                    self._take(line)
            bridge.WORKER.call(lambda: {"event": "finish"})
        except BaseException:
            bridge.WORKER.cancel_all()
            raise

    def _take(self, line: bytes) -> None:
        """Obeys one line: a request or a cancellation."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._refuse(None, f"a line is not JSON: {error}")
        if not isinstance(request, dict):
            return self._refuse(None, "a line is not a JSON object")
        if "cancel" in request:
            return self._cancel(request["cancel"])
        request_id = request.pop("id", None)
        if not isinstance(request_id, (int, str)) or isinstance(request_id, bool):
            return self._refuse(None, f"a request needs an id, a number or a string, not {request_id!r:.100}")
        return self._start(request_id, request)

    def _cancel(self, request_id: object) -> None:
        with self._lock:
            stream = self._streams.get(request_id) if isinstance(request_id, (int, str)) else None
        if stream is not None:  # else it has just ended
            stream.cancelled = True

    def _start(self, request_id: RequestId, request: dict[str, Any]) -> None:
        if request_id in self._streams:
            return self._refuse(request_id, f"a request with the id {request_id!r:.100} is under way")
        try:
            work = self._work(request)
        except TypeError as error:
            return self._refuse(request_id, str(error))
        with self._lock:  # no event is written before the stream is registered, since the first may be the last
            self._streams[request_id] = bridge.WORKER.start(work, sink=lambda event: self._send(request_id, event))
        return None

    def _work(self, request: dict[str, Any]) -> Work:
        """The work of a request.

        Raises:
            TypeError: the action is not known, or has other arguments.
        """
        action = request.pop("do", None)
        if action not in ACTIONS:
            raise TypeError(f"do must be one of {', '.join(ACTIONS)}, not {action!r:.100}")
        function = getattr(bridge, action)
        signature = inspect.signature(function)
        signature.bind(**({"model": 0} if "model" in signature.parameters else {}), **request)

        def work(stream: Stream) -> Iterable[BridgeEvent]:
            if "model" in signature.parameters:
                request.setdefault("model", self._model)  # known only now: an earlier request may have loaded it
            if action in GIVEN:
                return bridge.answer(stream, request.pop("model"), request.pop(GIVEN[action]), request)
            result = function(**request)
            if action == "load":
                self._model = result.get("model", self._model)
            return [{"event": "finish", "version": result} if action == "version" else result]

        return work

    def _refuse(self, request_id: RequestId | None, message: str) -> None:
        with self._lock:
            self._write({"id": request_id, **refusal(message)})

    def _send(self, request_id: RequestId, event: BridgeEvent) -> None:
        with self._lock:
            if event["event"] in LAST:
                del self._streams[request_id]
            self._write({"id": request_id, **event})

    def _write(self, event: BridgeEvent) -> None:
        try:
            self._output.write(json.dumps(event).encode() + b"\n")
            self._output.flush()
        except OSError:  # the reader has left; exit at once, because the main thread may be blocked in a read
            os._exit(READER_LEFT)


if __name__ == "__main__":
    raise SystemExit(main())
