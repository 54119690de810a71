"""Quantised keys and values, guesses and priorities of jobs: the answers are those of `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.stream import generate
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.protocol import Finish, Job
from phi4_mlx.server.engine.settings import Settings
from tests.adapters import adapted, save_adapter
from tests.conftest import Demo, make_tiny_model
from tests.tiny_sambay import make_tiny_sambay
from tests.unit.server.engine.harness import (
    GREEDY,
    QUESTIONS,
    MakeEngine,
    alone,
    finish,
    greedy_jobs,
    prompt,
    run,
    text,
)

COPY = "Repeat this: The mill stands by the river, and the river runs to the sea. The mill stands by the river."
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["river", "mill"]}, "n": {"type": "integer"}}}


def copying_jobs(demo: Demo, max_tokens: int = 150) -> list[Job]:
    """Answers that repeat themselves, since they may not end."""
    endless = replace(GREEDY, logit_bias=dict.fromkeys(demo[1].eos_ids, -100.0))
    return [Job(n, prompt(demo[1], f"{COPY} {n}"), max_tokens, endless) for n in range(4)]


@pytest.mark.parametrize("kv_bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_jobs_with_quantised_caches_get_the_answers_of_generate(
    demo: Demo, make_engine: MakeEngine, kv_bits: int
) -> None:
    engine, jobs = make_engine(kv_bits=kv_bits), greedy_jobs(demo[1])
    expected = [generate(*demo, job.prompt, max_tokens=job.max_tokens, kv_bits=kv_bits) for job in jobs]
    peaks: list[float] = []
    events = run(engine, *jobs, each_step=lambda step: peaks.append(engine.gauges()["kv_bytes"]))
    assert [text(events[job.id]) for job in jobs] == expected
    again = run(engine, *jobs)
    assert [text(again[job.id]) for job in jobs] == expected
    assert finish(again[1]).cached_tokens == len(jobs[0].prompt) - 1
    plain: list[float] = []
    unquantised = make_engine()
    run(unquantised, *jobs, each_step=lambda step: plain.append(unquantised.gauges()["kv_bytes"]))
    assert max(peaks) < 0.6 * max(plain)
    assert make_engine(kv_bits=kv_bits, kv_limit_bytes=2**21).longest > make_engine(kv_limit_bytes=2**21).longest


def test_an_entry_of_the_prefix_cache_serves_its_own_kind_alone(demo: Demo, make_engine: MakeEngine) -> None:
    engine, job = make_engine(), greedy_jobs(demo[1])[0]
    run(engine, job)
    assert engine.prefixes.find(demo[0], None, job.prompt) is not None
    assert engine.prefixes.find(demo[0], None, job.prompt, 4) is None


def test_a_lookup_takes_at_most_0_6_of_the_passes_of_four_copying_clients(
    demo: Demo, make_engine: MakeEngine
) -> None:
    jobs, passes, answers = copying_jobs(demo), [], []
    for mode in ("off", "lookup"):
        engine = make_engine(speculate=mode)
        events = run(engine, *jobs)
        answers.append([text(events[job.id]) for job in jobs])
        gauges = engine.gauges()
        passes.append(gauges["passes_total"])
        assert (gauges["guessed_tokens_total"] > 0) is (mode == "lookup")
        assert gauges["held_tokens_total"] <= gauges["guessed_tokens_total"] and not gauges["guess_failures_total"]
    assert answers[0] == answers[1]
    assert passes[1] <= 0.6 * passes[0], passes


@pytest.mark.slow
@pytest.mark.parametrize("guesses", ["lookup", "draft", "auto"])
def test_guesses_change_no_event_of_any_job(demo: Demo, make_engine: MakeEngine, tmp_path: Path, guesses: str) -> None:
    save_adapter(adapted(load("demo")[0], seed=3, scale=24.0), tmp_path / "pirate", {})
    folders = {"pirate": str(tmp_path / "pirate")}
    schema, copy = json_schema(SCHEMA).text, prompt(demo[1], COPY)
    jobs = [
        Job(1, copy, 60, GREEDY),
        Job(2, copy, 60, Sampling(temp=0.7, top_p=0.9, seed=5), top_logprobs=2),
        Job(3, copy, 60, GREEDY, stop=("river", "mill s")),
        Job(4, copy, 60, Sampling(temp=0.9, seed=8), grammar=schema),
        Job(5, copy, 40, GREEDY, adapter="pirate"),
        Job(6, copy, 60, replace(GREEDY, frequency_penalty=0.5)),
        *(replace(job, id=10 + job.id) for job in greedy_jobs(demo[1])),  # one crosses the RoPE boundary
    ]
    expected = run(make_engine(adapters=folders), *jobs)
    draft = demo[0] if guesses == "draft" else None
    settings = Settings("demo", adapters=folders, speculate="lookup" if draft is None else "auto", kv_limit_bytes=2**28)
    if guesses == "auto":
        settings = replace(settings, speculate="auto")
    engine = Engine(*demo, settings, draft)
    found = run(engine, *jobs)
    for job in jobs:
        assert text(found[job.id]) == text(expected[job.id]), job.id
        assert replace(finish(found[job.id]), cached_tokens=0) == replace(finish(expected[job.id]), cached_tokens=0)
    logprobs = [
        [(token.text, round(token.logprob, 3)) for event in events[2] for token in getattr(event, "logprobs", ())]
        for events in (found, expected)
    ]
    assert logprobs[0] == logprobs[1]
    assert guesses == "auto" or engine.gauges()["held_tokens_total"] > 0


def test_a_job_of_a_lower_number_is_answered_first(demo: Demo, make_engine: MakeEngine) -> None:
    engine = make_engine(max_rows=1)
    ask = prompt(demo[1], QUESTIONS[4])
    jobs = [Job(n, ask, 12, GREEDY, priority=priority) for n, priority in ((1, 5), (2, 0), (3, -2), (4, 0))]
    ends: list[int] = []
    engine.submit(jobs[0])
    for _ in range(4):
        engine.step()
    for job in jobs[1:]:
        engine.submit(job)
    while engine.busy:
        ends += [event.job for event in engine.step() if isinstance(event, Finish)]
    assert ends == [3, 2, 4, 1]
    assert text(run(engine, jobs[0])[1]) == alone(demo, jobs[0])


def test_options_that_a_model_cannot_keep_are_refused_by_name(demo: Demo) -> None:
    flash, tokenizer = make_tiny_sambay(), demo[1]
    for settings, draft, match in (
        (Settings("flash", kv_bits=4), None, "phi4flash.*--kv-bits"),
        (Settings("flash", speculate="lookup"), None, "phi4flash.*--speculate lookup"),
        (Settings("flash", speculate="auto"), make_tiny_sambay(), "phi4flash.*--draft-model"),
    ):
        with pytest.raises(RequestError, match=match) as caught:
            Engine(flash, tokenizer, settings, draft)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match=r"vocabulary is 256"):
        Engine(*demo, Settings("demo", speculate="auto"), make_tiny_model(vocab_size=256))
    assert not Engine(flash, tokenizer, Settings("flash", speculate="auto")).busy


def test_a_draft_model_takes_memory_of_the_context(demo: Demo, make_engine: MakeEngine) -> None:
    limit = 2**21
    with_draft = Engine(*demo, Settings("demo", speculate="auto", kv_limit_bytes=limit), demo[0])
    assert with_draft.longest < make_engine(kv_limit_bytes=limit).longest
