"""The loop of the engine's process: the server's messages in, steps of the engine, events out."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection

from phi4_mlx.checkpoint import load
from phi4_mlx.errors import CheckpointError, Phi4Error
from phi4_mlx.generation.memory_pressure import read_memory
from phi4_mlx.ranks.session import Session, open_session
from phi4_mlx.server.engine.answer import short_message
from phi4_mlx.server.engine.engine import Engine, check_room, limit_note
from phi4_mlx.server.engine.protocol import Broken, Cancel, Command, Event, Job, Leave, Notice, Ping, Pong, Ready
from phi4_mlx.server.engine.pulse import Pulse
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.server.limits import STORING_S
from phi4_mlx.terminal.command import complain, typed
from phi4_mlx.terminal.printable import one_line

FOLLOW_S = 1.0  # between two looks at the memory that the machine has left


def run(connection: Connection, settings: Settings) -> None:
    """The engine's process: reads jobs from a connection and writes events to it, until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to both processes; the server decides when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pulse = Pulse(connection)
        try:
            with open_session(settings.model_options, partial(complain, typed("server"))) as session:
                engine = _loaded(session, settings, partial(_warn, pulse))
                pulse.send(Ready(engine.longest, limit_note(engine)))
                try:
                    _answer_all(connection, pulse, engine)
                except (EOFError, OSError):
                    session.fail("rank 0: the process that serves HTTP has ended")
                    raise
                engine.close(STORING_S)
        except Phi4Error as error:
            pulse.send(Broken(short_message(error)))


def _loaded(session: Session, settings: Settings, warn: Callable[[str], None]) -> Engine:
    """The engine with its model."""
    try:
        draft = None if settings.draft_model is None else load(settings.draft_model)[0]
        engine = Engine(*session.load(), settings, draft, warn)
        check_room(engine)
        return engine
    except Phi4Error:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {short_message(error)}"
        raise CheckpointError(f"the engine could not load the model: {why}") from None


def _answer_all(connection: Connection, pulse: Pulse, engine: Engine) -> None:
    """Answers jobs until the server says that this is all."""
    follow_at_s = 0.0
    while True:
        messages: list[Command] = []
        pulse.turns, pulse.waiting = pulse.turns + 1, not engine.busy
        while connection.poll(0 if engine.busy or messages else FOLLOW_S):
            messages.append(connection.recv())
            pulse.waiting = False
        if time.monotonic() >= follow_at_s:
            engine.prefixes.follow(read_memory())
            follow_at_s = time.monotonic() + FOLLOW_S
        for message in messages:
            if isinstance(message, Leave):
                return
            if isinstance(message, Ping):
                pulse.send(Pong(message.number, engine.gauges()))
        if events := turn(engine, messages):
            pulse.send(events)


def _warn(pulse: Pulse, line: str) -> None:
    with contextlib.suppress(OSError):  # the server is gone
        pulse.send(Notice(one_line(line)))


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
