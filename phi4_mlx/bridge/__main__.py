"""`python -m phi4_mlx.bridge --jsonl`: a request a line on standard input, an event a line on standard output.

    {"id": 1, "do": "load", "name": "demo"}               ->  {"id": 1, "event": "finish", "model": 1, ...}
    {"id": 2, "do": "chat", "messages": [...]}            ->  {"id": 2, "event": "token", "text": "Hel"}, ...
    {"cancel": 2}                                         ->  {"id": 2, "event": "finish", "reason": "cancelled", ...}

"do" is load, unload, use_adapter, count_tokens, chat, complete or version; the rest are the arguments of the function
of that name in `phi4_mlx.bridge`. Without "model" it is about the one loaded last. Requests wait for one another; only
a cancellation is heard at once. A line that is no request is answered with an error, whose id is null if it has none.
The end of the input ends the program when all is done.
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
from phi4_mlx.bridge.worker import LAST, Event, Stream, Work
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.terminal.command import READER_LEFT, Parser, run, word

ACTIONS = ("load", "unload", "use_adapter", "count_tokens", "chat", "complete", "version")
GIVEN = {"chat": "messages", "complete": "prompt"}
MAX_LINE = 2**26  # bytes; the longest context is about half a megabyte of text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        prog="phi4-mlx bridge", description="Serve another program over standard input and output, in JSON Lines."
    )
    parser.add_argument("--jsonl", action="store_true", required=True, help="a request and an event is a line of JSON")
    parser.add_argument("--model", type=word, help="a model to load before the first request")
    parser.add_argument("--adapter-path", type=word, metavar="FOLDER", help="a LoRA adapter to put on it")
    return run(parser, _serve, argv)


def _serve(args: argparse.Namespace) -> None:
    if args.adapter_path is not None and args.model is None:
        raise RequestError("--adapter-path needs --model, which it is put on")
    with _private_output() as output:
        lines = Lines(output)
        if args.model is not None:
            lines.load(args.model, args.adapter_path or "")
        lines.read(sys.stdin.buffer)


@contextlib.contextmanager
def _private_output() -> Iterator[IO[bytes]]:
    """Standard output for events alone: what anybody else prints goes to standard error."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        yield output
    finally:
        sys.stdout = before  # `output` stays open: what is cancelled now still tells its end


class Lines:
    """Requests under way, and where their events go."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._streams: dict[int | str, Stream] = {}
        self._model = 0  # the one loaded last

    def load(self, name: str, adapter_path: str) -> None:
        """Loads the model of the command line.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        event = bridge.load(name, adapter_path)
        if event["event"] == "error":
            raise CheckpointError(event["message"])
        self._model = event["model"]

    def read(self, source: IO[bytes]) -> None:
        """Takes requests until their end, and waits until all are done."""
        try:
            while line := source.readline(MAX_LINE):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := source.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    self._refuse(None, f"a line is longer than {MAX_LINE:,} bytes")
                elif line.strip():
                    self._take(line)
            bridge.WORKER.only(lambda: {"event": "finish"})
        except BaseException:
            bridge.WORKER.cancel_all()
            raise

    def _take(self, line: bytes) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._refuse(None, f"a line is not JSON: {error}")
        if not isinstance(request, dict):
            return self._refuse(None, "a line is no JSON object")
        if "cancel" in request:
            name = request["cancel"]
            with self._lock:
                stream = self._streams.get(name) if isinstance(name, (int, str)) else None
            if stream is not None:  # else it has just ended
                stream.cancelled = True
            return None
        name = request.pop("id", None)
        if not isinstance(name, (int, str)) or isinstance(name, bool):
            return self._refuse(None, f"a request needs an id, a number or a text, not {name!r:.100}")
        if name in self._streams:
            return self._refuse(name, f"a request with the id {name!r:.100} is under way")
        try:
            work = self._work(request)
        except TypeError as error:
            return self._refuse(name, str(error))
        with self._lock:  # the stream is known here before its first event is told, since that may be its last
            self._streams[name] = bridge.WORKER.start(work, sink=lambda event: self._tell(name, event))
        return None

    def _work(self, request: dict[str, Any]) -> Work:
        """What a request asks for.

        Raises:
            TypeError: there is no such thing to do, or it has other arguments.
        """
        do = request.pop("do", None)
        if do not in ACTIONS:
            raise TypeError(f"do must be one of {', '.join(ACTIONS)}, not {do!r:.100}")
        function = getattr(bridge, do)
        signature = inspect.signature(function)
        signature.bind(**({"model": 0} if "model" in signature.parameters else {}), **request)

        def work(stream: Stream) -> Iterable[Event]:
            if "model" in signature.parameters:
                request.setdefault("model", self._model)  # known only now: a load may have been waiting before
            if do in ("chat", "complete"):
                return bridge.answer(stream, request.pop("model"), request.pop(GIVEN[do]), request)
            result = function(**request)
            if do == "load":
                self._model = result.get("model", self._model)
            return [{"event": "finish", "version": result} if do == "version" else result]

        return work

    def _refuse(self, name: int | str | None, message: str) -> None:
        with self._lock:
            self._write({"id": name, **bridge.refusal(message)})

    def _tell(self, name: int | str, event: Event) -> None:
        with self._lock:
            if event["event"] in LAST:
                del self._streams[name]
            self._write({"id": name, **event})

    def _write(self, event: Event) -> None:
        try:
            self._output.write(json.dumps(event).encode() + b"\n")
            self._output.flush()
        except OSError:  # nobody reads any more; the thread that reads requests may be waiting for one
            os._exit(READER_LEFT)


if __name__ == "__main__":
    raise SystemExit(main())
