"""Grammars compiled beside the running answers."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from phi4_mlx.grammar import constraint as constraint_module
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.server.engine.protocol import Failure
from tests.conftest import Demo
from tests.unit.server.engine.harness import MakeEngine, finish, greedy_jobs, run, run_to_the_end, text


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every grammar takes as long to compile as this is not set."""
    gate, real = threading.Event(), constraint_module.Constraint

    def slow(*given: Any) -> Any:
        gate.wait(60)
        return real(*given)

    monkeypatch.setattr(constraint_module, "Constraint", slow)
    return gate


def test_other_answers_end_while_a_grammar_is_compiled(
    make_engine: MakeEngine, demo: Demo, gate: threading.Event
) -> None:
    engine = make_engine()
    free, held = greedy_jobs(demo[1])[:2]
    engine.submit(replace(held, grammar=json_schema({"type": "boolean"}).text))
    engine.submit(free)
    seen: list[Any] = []
    while not any(event.job == free.id and hasattr(event, "reason") for event in seen):
        seen += engine.step()
    assert {event.job for event in seen} == {free.id} and engine.busy
    gate.set()
    events = run_to_the_end(engine)
    assert {event.job for event in events} == {held.id}
    assert text(events) in ("true", "false") and finish(events).reason in ("stop", "length")


def test_a_job_that_is_cancelled_while_its_grammar_is_compiled_is_gone(
    make_engine: MakeEngine, demo: Demo, gate: threading.Event
) -> None:
    engine = make_engine()
    job = replace(greedy_jobs(demo[1])[0], grammar=json_schema({}).text)
    engine.submit(job)
    engine.cancel(job.id)
    assert not engine.busy and engine.step() == []
    gate.set()


def test_a_grammar_that_cannot_be_compiled_fails_its_job_alone(make_engine: MakeEngine, demo: Demo) -> None:
    free, bad = greedy_jobs(demo[1])[:2]
    events = run(make_engine(), replace(bad, grammar='{"grammars": [{"lark_grammar": "start: x"}]}'), free)
    (failure,) = events[bad.id]
    assert isinstance(failure, Failure) and failure.status == 400
    assert finish(events[free.id]).reason in ("stop", "length")
