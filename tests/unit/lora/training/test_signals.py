"""Answers to signals: by the phase, from a thread, and ends that wait for whole files."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from phi4_mlx.lora.training import signals
from phi4_mlx.lora.training.signals import PREPARING, STEP, TESTING, VALIDATION, Phase, Stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals are handled as in a command, also if the tests run where Ctrl-C is ignored; and afterwards as before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGINT, before)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("phase", [STEP, VALIDATION])
@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "Ctrl-C again"), (signal.SIGTERM, "a second signal")]
)  # fmt: skip
def test_a_step_and_a_validation_are_finished_first(
    phase: Phase, number: signal.Signals, again: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Stop()
    with stop.listening(), stop.during(phase):
        send(number)
        assert stop.number == number
    answer = phase.answer.format(again=again)
    assert capsys.readouterr().err == answer + "\n" and again in answer
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        stop.pass_on()
    assert getattr(ended.value, "code", 143) == 143


@pytest.mark.parametrize("phase", [PREPARING, TESTING])
@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)  # fmt: skip
def test_where_nothing_would_be_lost_the_first_signal_ends(
    phase: Phase, number: signal.Signals, ends: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Stop()
    with pytest.raises(ends), stop.listening(), stop.during(phase):
        send(number)
        pytest.fail("it went on")
    assert capsys.readouterr().err == phase.answer + "\n"


def test_a_second_signal_ends_a_step_and_waits_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.listening(), stop.during(STEP):
        send(signal.SIGINT)
        with stop.writing():
            send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it went on")


def test_two_signals_in_a_computation_are_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python calls the handler once for both; a program would have been left by then."""
    monkeypatch.setattr(signals, "GRACE_S", 0.0)
    left: list[int] = []
    stop = Stop(left.append)
    with pytest.raises(KeyboardInterrupt), stop.listening(), stop.during(STEP):
        thread = threading.Thread(target=lambda: [send(signal.SIGINT), wait_for(capsys), send(signal.SIGINT)])
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        thread.join()
        pytest.fail("it went on")
    assert left == [130]


def wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Waits until the first signal was answered."""
    for _ in range(6000):
        if "stopping" in capsys.readouterr().err:
            return
        threading.Event().wait(0.01)


def test_listening_twice_is_listening_once_and_a_thread_does_not() -> None:
    stop = Stop()
    with stop.listening():
        handler = signal.getsignal(signal.SIGINT)
        with stop.listening():
            pass
        assert signal.getsignal(signal.SIGINT) is handler
    found: list[object] = []

    def listen() -> None:
        with Stop().listening():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
