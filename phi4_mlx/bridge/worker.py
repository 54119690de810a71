"""The bridge's worker thread: it runs one piece of work after another, each with a stream of events.

Importing this module imports only the standard library; the thread starts with its first piece of work.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from phi4_mlx.bridge.events import LAST, BridgeEvent, error_event

if TYPE_CHECKING:
    from phi4_mlx.bridge.model import BridgeModel

EXIT_TIMEOUT_S = 10.0

Sink = Callable[[BridgeEvent], object]


class Stream:
    """The events of one piece of work.

    Attributes:
        number: the stream's number for callers.
        model: the number of the model that it uses; 0 for none.
        cancelled: set to end the work early.
        has_sink: True if a sink takes each event at once.
        events: else, the queue of events that have not been taken.
    """

    def __init__(self, number: int, model: object, sink: Sink | None) -> None:
        self.number, self.model, self.cancelled = number, model, False
        self.events: queue.SimpleQueue[BridgeEvent] = queue.SimpleQueue()
        self.has_sink = sink is not None
        self.put: Sink = self.events.put if sink is None else sink

    def last(self) -> BridgeEvent:
        """Waits for the last event; drops those before it."""
        event = self.events.get()
        while event["event"] not in LAST:
            event = self.events.get()
        return event


Work = Callable[[Stream], Iterable[BridgeEvent]]


class Worker:
    """The one thread that uses MLX: its arrays belong to the thread that made them.

    Attributes:
        models: loaded models by number.
        streams: streams whose last event has not been taken, by number.
    """

    def __init__(self) -> None:
        self.models: dict[int, BridgeModel] = {}
        self.streams: dict[int, Stream] = {}
        self._numbers, self._model_numbers = itertools.count(1), itertools.count(1)
        self._waiting: queue.SimpleQueue[tuple[Stream, Work]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, work: Work, model: object = 0, sink: Sink | None = None) -> Stream:
        """Queues a piece of work.

        Args:
            work: called on the thread with its stream; yields the stream's events. An exception becomes the last event.
            model: the number of the model that it uses, for `cancel_all`.
            sink: called on the thread with each event; by default events are queued in the stream.
        """
        with self._lock:
            stream = Stream(next(self._numbers), model, sink)
            self.streams[stream.number] = stream
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="phi4_mlx.bridge", daemon=True)
                self._thread.start()
                atexit.register(self._settle)
        self._waiting.put((stream, work))
        return stream

    def call(self, work: Callable[[], BridgeEvent]) -> BridgeEvent:
        """Runs work with a single event and waits for it; a call on the thread itself runs at once."""
        if threading.current_thread() is self._thread:
            try:
                return work()
            except Exception as error:
                return error_event(error)
        stream = self.start(lambda stream: [work()])
        try:
            return stream.last()
        finally:
            self.forget(stream)

    def stream(self, number: object) -> Stream | None:
        """The stream with a number; None if there is none, or none any more."""
        return self.streams.get(number) if isinstance(number, int) else None

    def forget(self, stream: Stream) -> None:
        """Drops a stream from `streams`."""
        self.streams.pop(stream.number, None)

    def model(self, number: object) -> BridgeModel:
        """A loaded model.

        Raises:
            RequestError: no model has that number.
        """
        found = self.models.get(number) if isinstance(number, int) else None
        if found is None:
            from phi4_mlx.errors import RequestError

            raise RequestError(f"there is no model {number!r:.100}; load returns a model's number")
        return found

    def load(self, name: str, adapter_path: str, chat_format: str, revision: str, verify: bool) -> BridgeEvent:
        """Loads a model, on the thread; arguments as for `phi4_mlx.bridge.load`."""
        from phi4_mlx.bridge.model import BridgeModel

        model = BridgeModel(name, adapter_path, chat_format, revision, verify)
        number = next(self._model_numbers)
        self.models[number] = model
        return {"event": "finish", "model": number, "context": model.context}

    def unload(self, number: int) -> BridgeEvent:
        """Frees a model, on the thread."""
        import mlx.core as mx

        self.model(number)
        del self.models[number]
        mx.clear_cache()
        return {"event": "finish"}

    def cancel_all(self, model: object = None) -> None:
        """Cancels all streams, or those that use one model."""
        for stream in list(self.streams.values()):
            if model is None or stream.model == model:
                stream.cancelled = True

    def _run(self) -> None:
        while True:
            stream, work = self._waiting.get()
            try:
                for event in work(stream):
                    stream.put(event)
            except BaseException as error:
                stream.put(error_event(error))
            if stream.has_sink:
                self.forget(stream)

    def _settle(self) -> None:
        """Waits at exit until the thread is idle: MLX must not be at work while the process ends.

        The thread never ends: MLX frees a thread's data after the thread, which could be after the interpreter.
        """
        self.cancel_all()
        idle = threading.Event()

        def mark_idle(stream: Stream) -> Iterable[BridgeEvent]:
            idle.set()
            return ()

        self._waiting.put((Stream(0, 0, None), mark_idle))
        idle.wait(EXIT_TIMEOUT_S)
