"""The thread that the bridge works on: streams of events, one after another, and the models that they are about.

Only the standard library is imported here, and the thread starts with its first piece of work.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4_mlx.bridge.model import BridgeModel

Event = dict[str, Any]

LAST = ("finish", "error")
EXIT_TIMEOUT_S = 10.0


class Stream:
    """What a piece of work says, event by event.

    Attributes:
        number: its name to the outside.
        model: what it is about; 0 for none.
        cancelled: set by whoever has had enough.
        has_sink: whether events are told as they come.
        events: else, what has been said and not been taken.
    """

    def __init__(self, number: int, model: Any, sink: Callable[[Event], Any] | None) -> None:
        self.number, self.model, self.cancelled = number, model, False
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.has_sink = sink is not None
        self.put = self.events.put if sink is None else sink

    def last(self) -> Event:
        """Waits for the last event."""
        while (event := self.events.get())["event"] not in LAST:
            pass
        return event


Work = Callable[[Stream], Iterable[Event]]


class Worker:
    """One thread for all that MLX does, since what it makes on one thread is not for others.

    Attributes:
        models: the loaded ones by number.
        streams: those that have not been taken to their end.
    """

    def __init__(self) -> None:
        self.models: dict[int, BridgeModel] = {}
        self.streams: dict[int, Stream] = {}
        self._numbers, self._model_numbers = itertools.count(1), itertools.count(1)
        self._waiting: queue.SimpleQueue[tuple[Stream, Work]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, work: Work, model: Any = 0, sink: Callable[[Event], Any] | None = None) -> Stream:
        """Queues a piece of work.

        Args:
            work: called with its stream, on the thread; what it yields are the stream's events, and what it raises is
                its last one.
            model: as in `Stream`.
            sink: called on the thread with each event; by default they wait in the stream.
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

    def only(self, work: Callable[[], Event]) -> Event:
        """Waits for a piece of work that says one thing; on the thread itself, does it at once."""
        if threading.current_thread() is self._thread:
            try:
                return work()
            except Exception as error:
                return error_event(error)
        stream = self.start(lambda stream: [work()])
        try:
            return stream.last()
        finally:
            self.streams.pop(stream.number, None)

    def model(self, number: Any) -> BridgeModel:
        """A loaded model.

        Raises:
            RequestError: there is none of that number.
        """
        found = self.models.get(number) if isinstance(number, int) else None
        if found is None:
            from phi4_mlx.errors import RequestError

            raise RequestError(f"there is no model {number!r:.100}; load gives one its number")
        return found

    def load(self, name: str, options: Mapping[str, Any]) -> Event:
        """Loads a model, on the thread."""
        from phi4_mlx.bridge.model import BridgeModel

        model = BridgeModel(name, **options)
        number = next(self._model_numbers)
        self.models[number] = model
        return {"event": "finish", "model": number, "context": model.context}

    def unload(self, number: int) -> Event:
        """Forgets a model, on the thread."""
        import mlx.core as mx

        self.model(number)
        del self.models[number]
        mx.clear_cache()
        return {"event": "finish"}

    def cancel_all(self, model: Any = None) -> None:
        """Cancels all streams, or those about one model."""
        for stream in list(self.streams.values()):
            stream.cancelled = stream.cancelled or model is None or stream.model == model

    def _run(self) -> None:
        while True:
            stream, work = self._waiting.get()
            try:
                for event in work(stream):
                    stream.put(event)
            except BaseException as error:
                stream.put(error_event(error))
            if stream.has_sink:
                self.streams.pop(stream.number, None)

    def _settle(self) -> None:
        """The program ends: MLX must not be in the middle of anything then.

        The thread itself never ends: what MLX keeps for a thread is freed behind its end, which may be after Python's.
        """
        self.cancel_all()
        idle = threading.Event()

        def rest(stream: Stream) -> tuple[()]:
            idle.set()
            return ()

        self._waiting.put((Stream(0, 0, None), rest))
        idle.wait(EXIT_TIMEOUT_S)


def error_event(error: BaseException) -> Event:
    """What went wrong, as an event.

    Its "code" is "request", "config", "checkpoint", "tokenizer", "file", "memory", "missing" (a package) or "internal".
    """
    from phi4_mlx.errors import Phi4Error

    text = " ".join(str(error).split())
    if isinstance(error, Phi4Error):
        return {"event": "error", "code": type(error).__name__.removesuffix("Error").lower(), "message": text}
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return {"event": "error", "code": "file", "message": f"{where}{error.strerror or text}"}
    if isinstance(error, MemoryError):
        return {"event": "error", "code": "memory", "message": "out of memory; a smaller model or prompt needs less"}
    if isinstance(error, ModuleNotFoundError):
        return {"event": "error", "code": "missing", "message": f"{error.name} is not installed"}
    return {"event": "error", "code": "internal", "message": f"{type(error).__name__}: {text}"}
