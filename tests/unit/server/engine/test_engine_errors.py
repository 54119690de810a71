"""Exceptions inside the engine: one of a job fails that job, one of a whole step fails the running jobs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.generation import row_group
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.grammar import constraint as constraint_module
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.text import Decoder, Model
from phi4_mlx.server.engine import adapters as adapters_module
from phi4_mlx.server.engine import answer as answer_module
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.loop import turn
from phi4_mlx.server.engine.protocol import Cancel, Failure, Finish, Job
from tests.conftest import Demo
from tests.unit.server.engine.harness import GREEDY, MakeEngine, alone, greedy_jobs, run, run_to_the_end, text

BAD = 3  # the job whose call raises; its prompt is the only long one


class Broken:
    """Stands in for a function: raises, and counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        raise OSError("injected")


broken = Broken()


@pytest.fixture(autouse=True)
def the_exception_is_raised() -> Iterator[None]:
    """Fails a test whose exception was never raised."""
    broken.calls = 0
    yield
    assert broken.calls


def break_sampler(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    make = Sampling.sampler
    patch.setattr(Sampling, "sampler", lambda sampling: broken if sampling.seed == 666 else make(sampling))


def break_processor(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    make = Sampling.processors
    patch.setattr(Sampling, "processors", lambda own: [broken] if own.logit_bias == {666: 1.0} else make(own))


def is_bad(ids: Sequence[int]) -> bool:
    return len(ids) > 200


def break_submit(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    check = Model.check_ids
    patch.setattr(Model, "check_ids", lambda model, ids: broken() if is_bad(ids) else check(model, ids))


def break_constraint(call: str) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    class BreakingConstraint:
        def __init__(self, *_: Any) -> None:
            self.count = broken() if call == "made" else 0

        def mask(self) -> None:
            self.count += 1
            return broken() if call == "mask" and self.count > 2 else None

        def accept(self, token: int) -> list[int]:
            return broken() if call == "accept" and self.count > 2 else []

    def install(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(constraint_module, "Constraint", BreakingConstraint)  # only the bad job has a grammar

    return install


def break_prefill(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    forward = Decoder.__call__

    def failing(self: Any, ids: mx.array, *rest: Any, **options: Any) -> mx.array:
        return broken() if is_bad(ids[0]) else forward(self, ids, *rest, **options)

    patch.setattr(Decoder, "__call__", failing)


def break_decoder(call: str) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    def install(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        make, numbers = engine.tokenizer.streaming_decoder, itertools.count(1)

        class BreakingDecoder:
            def __init__(self) -> None:
                self.inner, self.count = make(), 0

            def add(self, token: int) -> str:
                self.count += 1
                return broken() if call == "add" and self.count > 3 else self.inner.add(token)

            def finish(self) -> str:
                return broken() if call == "finish" else self.inner.finish()

        # Jobs are submitted in the order of their ids, and each takes one decoder.
        patch.setattr(
            engine.tokenizer, "streaming_decoder", lambda: BreakingDecoder() if next(numbers) == BAD else make()
        )

    return install


def break_logprob(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer_module, "TokenLogprob", broken)  # only the bad job asks for log-probabilities


def break_find(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    find = engine.prefixes.find
    patch.setattr(
        engine.prefixes,
        "find",
        lambda model, adapter, ids, kv_bits: broken() if is_bad(ids) else find(model, adapter, ids, kv_bits),
    )


def break_put(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.prefixes, "put", broken)


def break_adapter(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapters_module, "read_adapter", broken)  # only the bad job names an adapter


def break_decode(times: int) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    def install(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        left, forward = times, Decoder.__call__

        def failing(self: Any, ids: mx.array, cache: Any, **options: Any) -> mx.array:
            nonlocal left
            if left and isinstance(cache, BatchCache):
                left -= 1
                broken()
            return forward(self, ids, cache, **options)

        patch.setattr(Decoder, "__call__", failing)

    return install


def break_draw_after_a_failure(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Breaks the device in a step in which a job has failed already."""
    break_sampler(engine, patch)
    evaluate, left = mx.eval, 1

    def failing(*arrays: Any) -> None:
        nonlocal left
        if left and len(arrays) == 1 and isinstance(arrays[0], list) and len(arrays[0]) > 2:
            left -= 1
            broken()
        evaluate(*arrays)

    patch.setattr(mx, "eval", failing)


Install = Callable[[Engine, pytest.MonkeyPatch], None]

# Call sites whose exception fails its own job, and those whose exception fails none.
FAILS_ITS_JOB: dict[str, Install] = {
    "submit": break_submit,
    "adapter": break_adapter,
    "constraint made": break_constraint("made"),
    "constraint mask": break_constraint("mask"),
    "constraint accept": break_constraint("accept"),
    "sampler": break_sampler,
    "processor": break_processor,
    "forward in prefill": break_prefill,
    "text": break_decoder("add"),
    "text at the end": break_decoder("finish"),
    "logprob": break_logprob,
    "prefix find": break_find,
}
FAILS_NONE: dict[str, Install] = {"prefix put": break_put, "forward in decode": break_decode(1)}


def injected_jobs(engine: Engine, site: str) -> list[Job]:
    jobs = greedy_jobs(engine.tokenizer, 16)
    bad = jobs[BAD - 1]
    if site == "sampler":
        bad = replace(bad, sampling=Sampling(temp=1.0, seed=666))
    if site == "processor":
        bad = replace(bad, sampling=replace(GREEDY, logit_bias={666: 1.0}))
    if site == "logprob":
        bad = replace(bad, top_logprobs=1)
    if site == "adapter":
        bad = replace(bad, adapter="bad")
    if site.startswith("constraint"):
        bad = replace(bad, grammar=json_schema({}).text)
    return [*jobs[: BAD - 1], bad, *jobs[BAD:]]


@pytest.mark.slow
@pytest.mark.parametrize("site", [*FAILS_ITS_JOB, *FAILS_NONE])
def test_an_exception_fails_its_own_job_or_none(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    engine = make_engine(adapters={"bad": "unused"})
    jobs = injected_jobs(engine, site)
    wanted = {job.id: alone(demo, job) for job in jobs}
    with monkeypatch.context() as patch:
        (FAILS_ITS_JOB | FAILS_NONE)[site](engine, patch)
        events = run(engine, *jobs)
    for job in jobs:
        if job.id == BAD and site in FAILS_ITS_JOB:
            failure = events[job.id][-1]
            assert isinstance(failure, Failure) and failure.status == 500 and "injected" in failure.message
        else:
            assert text(events[job.id]) == wanted[job.id]
    assert engine.gauges()["answers_under_way"] == 0 and engine.gauges()["kv_bytes"] == 0
    assert text(run(engine, jobs[0])[1]) == wanted[1]


@pytest.mark.parametrize(
    "install", [break_decode(2), break_draw_after_a_failure], ids=["forward in decode, twice", "eval of a draw"]
)
def test_every_job_gets_its_last_event(
    demo: Demo,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    install: Install,
) -> None:
    engine = make_engine()
    jobs = injected_jobs(engine, "sampler")
    with monkeypatch.context() as patch:
        install(engine, patch)
        events = run(engine, *jobs)
    for each in events.values():
        assert isinstance(each[-1], (Finish, Failure))
    assert text(run(engine, jobs[0])[1]) == alone(demo, jobs[0])


@pytest.mark.parametrize(("place", "name"), [(Batch, "step"), (row_group, "cache_bytes")], ids=["step", "admission"])
def test_a_step_that_fails_as_a_whole_fails_the_running_jobs_and_no_later_one(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    engine, jobs = make_engine(), greedy_jobs(demo[1])
    turn(engine, jobs[:2])
    with monkeypatch.context() as patch:
        patch.setattr(place, name, broken)
        events = turn(engine, [])
        assert {(event.job, event.status) for event in events if isinstance(event, Failure)} == {(1, 500), (2, 500)}
        assert engine.gauges()["kv_bytes"] == 0 and not engine.busy  # failed jobs leave nothing behind
    assert text(run(engine, jobs[0])[1]) == alone(demo, jobs[0])


def test_a_cancel_that_fails_fails_the_running_jobs_and_no_later_one(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, jobs = make_engine(), greedy_jobs(demo[1])
    turn(engine, jobs[:2])
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "end", broken)
        events = turn(engine, [Cancel(1), jobs[2]])
        assert {event.job for event in events if isinstance(event, Failure)} == {2}
    events += run_to_the_end(engine)
    assert text([event for event in events if event.job == 3]) == alone(demo, jobs[2])  # submitted in the same turn
    assert text(run(engine, jobs[0])[1]) == alone(demo, jobs[0])


class Mute(Exception):
    """An exception that cannot be converted to text."""

    def __str__(self) -> str:
        raise ValueError("mute")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (Mute(), "Mute: its text cannot be read"),
        (OSError("x" * 33_000_000), "OSError: xxx"),
        (OSError("first\nsecond\033[31m"), "OSError: first second[31m"),
        (RequestError("y" * 33_000_000), "yyy"),
    ],
    ids=["mute", "large", "control characters", "a client's mistake"],
)
def test_any_exception_is_told_in_one_short_line(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, error: Exception, wanted: str
) -> None:
    engine, job = make_engine(), greedy_jobs(demo[1])[0]
    for place, name in ((Model, "check_ids"), (Batch, "step")):  # fails its job, or all of them
        with monkeypatch.context() as patch:

            def failing(*args: Any, **options: Any) -> Any:
                broken.calls += 1
                raise error

            patch.setattr(place, name, failing)
            (failure,) = turn(engine, [job])
        assert isinstance(failure, Failure) and wanted in failure.message and len(failure.message) < 500
        assert failure.message.isprintable()
    assert text(run(engine, job)[1]) == alone(demo, job)
