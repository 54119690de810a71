"""The loop of the engine's process: the server's messages in, steps of the engine, events out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection

from phi4_mlx.errors import CheckpointError, Phi4Error
from phi4_mlx.ranks.session import Session, open_session
from phi4_mlx.server.engine.answer import short_message
from phi4_mlx.server.engine.engine import Engine, Settings, check_room, limit_note
from phi4_mlx.server.engine.protocol import Broken, Cancel, Command, Event, Job, Leave, Ping, Pong, Ready
from phi4_mlx.server.engine.pulse import Pulse
from phi4_mlx.terminal.command import complain, typed


def run(connection: Connection, settings: Settings) -> None:
    """The engine's process: reads jobs from a connection and writes events to it, until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to both processes; the server decides when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pulse = Pulse(connection)
        try:
            with open_session(settings.model_options, partial(complain, typed("server"))) as session:
                engine = _loaded(session, settings)
                pulse.send(Ready(engine.longest, limit_note(engine)))
                _answer_all(connection, pulse, engine)
        except Phi4Error as error:
            pulse.send(Broken(short_message(error)))


def _loaded(session: Session, settings: Settings) -> Engine:
    """The engine with its model."""
    try:
        engine = Engine(*session.load(), settings)
        check_room(engine)
        return engine
    except Phi4Error:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {short_message(error)}"
        raise CheckpointError(f"the engine could not load the model: {why}") from None


def _answer_all(connection: Connection, pulse: Pulse, engine: Engine) -> None:
    """Answers jobs until the server says that this is all."""
    leaves = False
    while not leaves:
        messages: list[Command] = []
        pulse.turns, pulse.waiting = pulse.turns + 1, not engine.busy
        while connection.poll(0 if engine.busy or messages else None):
            messages.append(connection.recv())
            pulse.waiting = False
        for message in messages:
            if isinstance(message, Ping):
                pulse.send(Pong(message.number, engine.gauges()))
            leaves = leaves or isinstance(message, Leave)
        if events := turn(engine, messages):
            pulse.send(events)


def turn(engine: Engine, messages: Iterable[Command]) -> list[Event]:
    """Handles the server's messages, then takes a step."""
    events: list[Event] = []
    works: list[Callable[[], list[Event]]] = [partial(_handle, engine, message) for message in messages]
    for work in [*works, engine.step]:
        try:
            events += work()
        except Exception as error:
            events += engine.fail_all(error)
    return events


def _handle(engine: Engine, message: Command) -> list[Event]:
    if isinstance(message, Job):
        return engine.submit(message)
    if isinstance(message, Cancel):
        engine.cancel(message.job)
    return []
