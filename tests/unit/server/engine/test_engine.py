"""The engine without its process: events, limits, prefix reuse and adapters."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.sequence import WORTH_WAITING
from phi4_mlx.generation.stream import generate
from phi4_mlx.models.text import Decoder
from phi4_mlx.server.engine import engine as engine_module
from phi4_mlx.server.engine.loop import turn
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import Cancel, Failure, Job, Piece
from phi4_mlx.tokens.prompt import Prompt
from tests.adapters import adapted, save_adapter
from tests.conftest import Demo
from tests.unit.server.engine.harness import (
    GREEDY,
    QUESTIONS,
    MakeEngine,
    alone,
    finish,
    greedy_jobs,
    prompt,
    run,
    run_to_the_end,
    text,
)


def test_jobs_in_a_batch_get_the_answers_of_generate(demo: Demo, make_engine: MakeEngine) -> None:
    jobs = greedy_jobs(demo[1])
    events = run(make_engine(), *jobs)
    for job in jobs:
        assert text(events[job.id]) == alone(demo, job)
        assert finish(events[job.id]).prompt_tokens == len(job.prompt)
    lengths = [(len(job.prompt), finish(events[job.id]).answer_tokens) for job in jobs]
    assert any(before < 256 < before + drawn for before, drawn in lengths)  # one crosses the boundary


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_a_seed_repeats_an_answer_whatever_else_is_in_the_batch(
    demo: Demo, make_engine: MakeEngine, temp: float
) -> None:
    job = Job(1, prompt(demo[1], QUESTIONS[4]), 30, Sampling(temp=temp, top_p=0.95, seed=7))
    others = [replace(job, id=n, sampling=Sampling(temp=1.0)) for n in range(2, 5)]
    assert text(run(make_engine(), job)[1]) == text(run(make_engine(), *others, job)[1])


def test_a_stop_string_ends_an_answer_before_it_and_is_reported(demo: Demo, make_engine: MakeEngine) -> None:
    _, tokenizer = demo
    job = Job(1, prompt(tokenizer, QUESTIONS[0]), 40, GREEDY)
    whole = alone(demo, job)
    ids = tokenizer.encode(whole)
    at = len(tokenizer.decode(ids[:2])) - 1
    split = whole[at : at + 3]  # begins in one token and ends in another
    assert len(tokenizer.encode(whole[: at + 3])) > len(tokenizer.encode(whole[: at + 1]))
    for stops in ([split], ["zzz", split], [split, whole[at : at + 1] + "\0"]):
        events = run(make_engine(), replace(job, stop=tuple(stops)))[1]
        assert text(events) == whole[: whole.index(split)]
        assert (finish(events).reason, finish(events).stop_string) == ("stop", split)
    # In the middle of a token: the text before it is sent once.
    starts = [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]
    inside = next(whole[at + 1 :] for at in starts if whole.index(whole[at + 1 :][:1]) == at + 1 not in starts)
    events = run(make_engine(), replace(job, stop=(inside[:1],)))[1]
    assert text(events) == whole[: -len(inside)] and finish(events).stop_string == inside[:1]
    # Text that only looked like the start of a stop string is sent at the end.
    events = run(make_engine(), replace(job, stop=(whole[-1] + "\0",)))[1]
    assert text(events) == whole and finish(events).stop_string is None


def test_an_answer_ends_at_max_tokens_or_at_an_end_marker(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_tokens_run(monkeypatch)
    job = Job(1, prompt(demo[1], QUESTIONS[0]), 1, GREEDY)
    end = finish(run(make_engine(), job)[1])
    assert (end.reason, end.answer_tokens) == ("length", 1)
    assert sum(calls) == len(job.prompt)  # a single token needs only the prompt's pass
    end = finish(run(make_engine(), replace(job, max_tokens=200))[1])
    assert end.reason == "stop" and end.answer_tokens < 200


def test_a_job_ends_at_its_time_limit(demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now)
    engine = make_engine(max_rows=2)
    slow = Job(1, prompt(demo[1], QUESTIONS[4]), 200, Sampling(temp=0, logit_bias=dict.fromkeys(demo[1].eos_ids, -100)))
    other = replace(slow, id=2, max_tokens=30, timeout_s=5000.0)
    waiting = replace(slow, id=3)

    def tick(step: int) -> None:
        nonlocal now
        now += 600 / 16 + 0.1

    events = run(engine, slow, other, waiting, each_step=tick)
    assert finish(events[1]).reason == "timeout" and 0 < finish(events[1]).answer_tokens < 30
    assert finish(events[2]).reason == "length" and finish(events[2]).answer_tokens == 30
    (failure,) = events[3]
    assert isinstance(failure, Failure) and failure.status == 504  # not an empty answer


def test_logprobs_are_those_of_a_plain_forward_pass(demo: Demo, make_engine: MakeEngine) -> None:
    model, tokenizer = demo
    job = Job(1, prompt(tokenizer, QUESTIONS[0]), 12, GREEDY, top_logprobs=4)
    events = run(make_engine(), job, replace(job, id=2, top_logprobs=0), replace(job, id=3, top_logprobs=None))
    tokens = [each for event in events[1] if isinstance(event, Piece) for each in event.logprobs]
    assert len(tokens) == finish(events[1]).answer_tokens
    ids = list(job.prompt)
    for each in tokens:
        logits = model(mx.array([ids]))[0, -1]
        logprobs = np.array(logits - mx.logsumexp(logits))
        order = np.argsort(-logprobs)[:4]
        assert [top for top, _ in each.top] == [tokenizer.token_bytes(int(n)) for n in order]
        np.testing.assert_allclose([value for _, value in each.top], logprobs[order], atol=2e-4)
        assert each.logprob == pytest.approx(logprobs[order[0]], abs=2e-4)
        ids.append(int(order[0]))
    without_top = [each for event in events[2] if isinstance(event, Piece) for each in event.logprobs]
    assert len(without_top) == len(tokens) and not any(each.top for each in without_top)
    assert not any(event.logprobs for event in events[3] if isinstance(event, Piece))


@pytest.mark.parametrize("chunk", [48, 80, 512])
def test_a_beginning_that_waiting_prompts_share_is_prefilled_once(
    demo: Demo, make_engine: MakeEngine, chunk: int
) -> None:
    shared = random.Random(8).choices(range(900), k=100)
    jobs = [Job(n, Prompt([*shared, *range(n, n + 60)]), 6, GREEDY) for n in range(1, 5)]
    engine = make_engine()
    engine.batch.prefilling.step_size = chunk
    events = run(engine, *jobs)
    cached = [finish(events[job.id]).cached_tokens for job in jobs]
    assert cached[0] == 0 and all(100 - WORTH_WAITING < count <= 100 for count in cached[1:])
    assert engine.prefilled_tokens == sum(len(job.prompt) for job in jobs) - sum(cached)
    for job in jobs:
        assert text(events[job.id]) == text(run(make_engine(prefix_limit_bytes=0), job)[job.id])


@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding"])
def test_a_cancelled_job_sends_no_more_events_and_its_cache_is_kept(
    demo: Demo, make_engine: MakeEngine, moment: str
) -> None:
    engine, (first, second, *_) = make_engine(), greedy_jobs(demo[1])
    if moment == "prefilling":
        engine.batch.prefilling.step_size = 4
    events = [*engine.submit(first), *engine.submit(second)] if moment == "waiting" else turn(engine, [first, second])
    assert engine.gauges()["answers_under_way"] == 2
    engine.cancel(first.id)
    assert engine.gauges()["answers_under_way"] == 1  # at once, not after a step
    if moment == "decoding":
        assert len(engine.prefixes) > 0
    later = run_to_the_end(engine)
    assert {event.job for event in later} == {second.id}
    assert text([event for event in [*events, *later] if event.job == second.id]) == alone(demo, second)


def test_a_cancel_of_an_unknown_job_is_ignored(make_engine: MakeEngine) -> None:
    assert turn(make_engine(), [Cancel(99)]) == []


def test_invalid_jobs_are_refused_and_do_not_disturb_others(demo: Demo, make_engine: MakeEngine) -> None:
    engine, job = make_engine(), greedy_jobs(demo[1])[0]
    for bad, status in [
        (replace(job, adapter="unknown"), 400),
        (replace(job, max_tokens=10**6), 400),
        (replace(job, stop=("",)), 400),
        (replace(job, sampling=Sampling(seed=-1)), 400),
        (replace(job, sampling=Sampling(logit_bias={10**6: 1.0})), 400),  # detected when it is applied
        (replace(job, prompt=(10**6,)), 400),
        (replace(job, prompt=()), 400),
    ]:
        events = run(engine, bad, replace(job, id=2))
        (failure,) = events[1]
        assert isinstance(failure, Failure) and failure.status == status, bad
        assert text(events[2]) == alone(demo, job)


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of two adapters that change the demo's answers."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["one", "two"]):
        save_adapter(adapted(load("demo")[0], seed=seed, scale=24.0), root / name, {})
    return {name: str(root / name) for name in ("one", "two")}


def test_jobs_of_several_adapters_and_of_the_base_share_a_batch(
    demo: Demo, make_engine: MakeEngine, adapters: dict[str, str]
) -> None:
    engine = make_engine(adapters=adapters)
    job = Job(0, prompt(demo[1], QUESTIONS[0]), 20, GREEDY)
    names = [None, "one", "two", "one", None]
    jobs = [replace(job, id=n, adapter=name) for n, name in enumerate(names)]
    events = run(engine, *jobs)
    answers = {}
    for name in (None, "one", "two"):
        model, tokenizer = load("demo")
        if name:
            load_adapter(model, Path(adapters[name]))
        answers[name] = generate(model, tokenizer, job.prompt, max_tokens=20)
    assert len(set(answers.values())) == 3  # the adapters change the answer
    assert [text(events[n]) for n in range(len(names))] == [answers[name] for name in names]
    # A cache is not reused under another adapter.
    assert [finish(events[n]).cached_tokens for n in range(3)] == [0, 0, 0]
    events = run(engine, *jobs[:3])
    assert [text(events[n]) for n in range(3)] == [answers[name] for name in names[:3]]
    assert [finish(events[n]).cached_tokens for n in range(3)] == [len(job.prompt) - 1] * 3


# -- the prefix cache ------------------------------------------------------------------------------------------------


def count_tokens_run(patch: pytest.MonkeyPatch) -> list[int]:
    """Records the tokens of each forward pass, of all its sequences together."""
    calls: list[int] = []
    forward = Decoder.__call__

    def counting(self: Any, ids: mx.array, *rest: Any, **options: Any) -> mx.array:
        calls.append(ids.size)
        return forward(self, ids, *rest, **options)

    patch.setattr(Decoder, "__call__", counting)
    return calls


@pytest.mark.slow
def test_the_second_turn_of_a_long_conversation_prefills_only_its_new_tokens(
    demo: Demo, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = demo
    messages = [{"role": "user", "content": " ".join(f"Number {n} is {n * 7}." for n in range(120))}]
    first = Job(1, tuple(tokenizer.apply_chat_template(messages)), 12, GREEDY)
    assert len(first.prompt) >= 1000
    engine = make_engine()
    answer = text(run(engine, first)[1])
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And what is 9 times 9?"}]
    second = Job(2, tuple(tokenizer.apply_chat_template(messages)), 12, GREEDY, top_logprobs=20)
    before = engine.prefilled_tokens
    calls = count_tokens_run(monkeypatch)
    events = run(engine, second)[2]
    end = finish(events)
    new = len(second.prompt) - end.cached_tokens
    assert end.cached_tokens >= len(first.prompt)
    assert engine.prefilled_tokens - before == new < 60
    assert calls[0] == new and all(n == 1 for n in calls[1:])  # one pass over the new tokens, then single tokens
    # Without a prefix: the same text, and log-probabilities within 2e-4 (fp32, sums in another order).
    cold = run(make_engine(), second)[2]
    assert text(events) == text(cold) and finish(cold).cached_tokens == 0
    warm_tops, cold_tops = (
        [top for event in answer if isinstance(event, Piece) for each in event.logprobs for top in each.top]
        for answer in (events, cold)
    )
    assert [token for token, _ in warm_tops] == [token for token, _ in cold_tops]
    np.testing.assert_allclose([value for _, value in warm_tops], [value for _, value in cold_tops], atol=2e-4)


@pytest.mark.parametrize(("words", "chunk"), [(3, 512), (100, 64)], ids=["in one step", "over many steps"])
def test_a_prompt_that_several_jobs_share_is_prefilled_once(
    demo: Demo, make_engine: MakeEngine, words: int, chunk: int
) -> None:
    engine = make_engine()
    engine.batch.prefilling.step_size = chunk
    shared = prompt(demo[1], "Count: " + "one " * words)
    jobs = [Job(n, shared, 4, Sampling(temp=1.0, seed=n)) for n in range(5)]
    events = run(engine, *jobs)
    assert engine.prefilled_tokens == len(shared) + 4  # the others run its last token
    for job in jobs:
        assert text(events[job.id]) == text(run(make_engine(), job)[job.id])


def test_a_prefix_cache_of_zero_bytes_stores_nothing(demo: Demo, make_engine: MakeEngine) -> None:
    engine, job = make_engine(prefix_limit_bytes=0), greedy_jobs(demo[1])[0]
    events = run(engine, job, replace(job, id=2))
    assert text(events[1]) == text(events[2]) == alone(demo, job)
    assert engine.prefilled_tokens == 2 * len(job.prompt) and len(engine.prefixes) == 0


@pytest.mark.slow
def test_jobs_that_outgrow_the_memory_wait_and_continue_exactly(demo: Demo, make_engine: MakeEngine) -> None:
    model, tokenizer = demo
    limit = 3 * 256 * model.context_cost().token_bytes
    engine = make_engine(kv_limit_bytes=limit)
    draw = random.Random(3)
    endless = Sampling(temp=0, logit_bias=dict.fromkeys(tokenizer.eos_ids, -100.0))
    jobs = [Job(n, tuple(draw.randrange(900) for _ in range(235)), 40, endless) for n in range(3)]
    counts: list[tuple[int, int]] = []
    events = run(
        engine, *jobs, each_step=lambda step: counts.append((len(engine.batch.active), len(engine.batch.waiting)))
    )
    assert (2, 1) in counts and (1, 2) in counts  # two jobs start; one returns to the queue when both have grown
    for job in jobs:
        assert finish(events[job.id]).answer_tokens == 40
        assert text(events[job.id]) == text(run(make_engine(), job)[job.id])


def test_the_prefix_cache_gets_its_limit_from_the_settings(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_limit_bytes=12345)
    assert isinstance(engine.prefixes, PrefixCache) and engine.prefixes.limit_bytes == 12345
    assert engine.gauges()["prefix_cache_limit_bytes"] == 12345


def test_memory_for_no_answer_is_refused_with_the_least_that_works(make_engine: MakeEngine) -> None:
    with pytest.raises(RequestError, match="--kv-cache-bytes") as raised:
        engine_module.check_room(make_engine(kv_limit_bytes=2**16))
    least = int(re.findall(r"--kv-cache-bytes (\d+)", str(raised.value))[0])
    engine = make_engine(kv_limit_bytes=least)
    engine_module.check_room(engine)
    assert engine.longest == 256
    with pytest.raises(RequestError):
        engine_module.check_room(make_engine(kv_limit_bytes=least - 1))
    job = Job(1, prompt(engine.tokenizer, "Say hello."), 200, GREEDY)
    assert finish(run(engine, job)[1])
