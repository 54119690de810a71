"""The loop of the engine's process: the server's messages in, steps of the engine, events out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection

from phi4_mlx.checkpoint import load
from phi4_mlx.errors import Phi4Error
from phi4_mlx.server.engine.answer import short_message
from phi4_mlx.server.engine.engine import Engine, Settings, check_room, limit_note
from phi4_mlx.server.engine.protocol import Broken, Cancel, Event, Job, Ping, Pong, Ready
from phi4_mlx.server.engine.pulse import Pulse


def run(connection: Connection, settings: Settings) -> None:
    """The engine's process: reads jobs from a connection and writes events to it, until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to both processes; the server decides when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pulse = Pulse(connection)
        try:
            draft = None if settings.draft_model is None else load(settings.draft_model)[0]
            engine = Engine(*load(settings.model, chat_format=settings.chat_format), settings, draft)
            check_room(engine)
        except Phi4Error as error:
            return pulse.send(Broken(short_message(error)))
        except Exception as error:
            return pulse.send(
                Broken(f"the engine could not load the model: {type(error).__name__}: {short_message(error)}")
            )
        pulse.send(Ready(engine.longest, limit_note(engine)))
        while True:
            messages: list[Job | Cancel | Ping] = []
            pulse.turns, pulse.waiting = pulse.turns + 1, not engine.busy
            while connection.poll(0 if engine.busy or messages else None):
                messages.append(connection.recv())
                pulse.waiting = False
            for message in messages:
                if isinstance(message, Ping):
                    pulse.send(Pong(message.number, engine.gauges()))
            if events := turn(engine, messages):
                pulse.send(events)


def turn(engine: Engine, messages: Iterable[Job | Cancel | Ping]) -> list[Event]:
    """Handles the server's messages, then takes a step."""
    events: list[Event] = []
    works: list[Callable[[], list[Event]]] = [partial(_handle, engine, message) for message in messages]
    for work in [*works, engine.step]:
        try:
            events += work()
        except Exception as error:
            events += engine.fail_all(error)
    return events


def _handle(engine: Engine, message: Job | Cancel | Ping) -> list[Event]:
    if isinstance(message, Job):
        return engine.submit(message)
    if isinstance(message, Cancel):
        engine.cancel(message.job)
    return []
