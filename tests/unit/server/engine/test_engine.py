"""The engine by itself: what a job is told, what it costs, and that the mistake of one is not the others'."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.adapters.layers import adapter_layers, add_adapter, load_adapter
from phi4_mlx.checkpoint import load
from phi4_mlx.generation import batch as batch_module
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.stream import generate
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.text import Decoder, Model
from phi4_mlx.server.engine import engine as engine_module
from phi4_mlx.server.engine.engine import Engine, Settings
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import Cancel, Event, Failure, Finish, Job, Piece
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.adapters import save_adapter

GREEDY = Sampling(temp=0.0)
BYTES = 2**26  # for keys and values, and for earlier prompts


@pytest.fixture(scope="module")
def loaded() -> tuple[Model, Tokenizer]:
    return load("demo")


@pytest.fixture
def make_engine(loaded: tuple[Model, Tokenizer]) -> Callable[..., Engine]:
    def make(**settings: Any) -> Engine:
        limits = {"kv_limit_bytes": BYTES, "prefix_limit_bytes": BYTES}
        return Engine(*loaded, Settings("demo", **(limits | settings)))

    return make


def prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))


def run(engine: Engine, *jobs: Job, each_step: Callable[[int], None] = lambda step: None) -> dict[int, list[Event]]:
    """All events of the jobs, as the engine's process would send them."""
    told: dict[int, list[Event]] = {job.id: [] for job in jobs}
    messages: list[Job] = list(jobs)
    for step in range(3000):
        for event in engine_module.turn(engine, messages):
            told[event.job].append(event)
        messages = []
        each_step(step)
        if not engine.busy:
            return told
    raise AssertionError("the engine does not come to an end")


def text(events: list[Event]) -> str:
    assert isinstance(events[-1], Finish), events[-1]
    assert not any(isinstance(event, (Finish, Failure)) for event in events[:-1])  # an end is told once
    return "".join(event.text for event in events if isinstance(event, Piece))


def finish(events: list[Event]) -> Finish:
    assert isinstance(events[-1], Finish), events[-1]
    return events[-1]


ANSWERS: dict[tuple[Any, ...], str] = {}


def alone(loaded: tuple[Model, Tokenizer], job: Job) -> str:
    asked = job.prompt, job.max_tokens
    if asked not in ANSWERS:
        ANSWERS[asked] = generate(*loaded, job.prompt, max_tokens=job.max_tokens)
    return ANSWERS[asked]


ASKED = [
    "What is the capital of France?",
    "Say hello.",
    "Convert 5 km to miles. " * 20,  # 243 tokens; the boundary is at 256
    "What is 3 plus 4?",
    "Tell me about the sea, please, and do not stop.",
]


def greedy_jobs(tokenizer: Tokenizer, max_tokens: int = 40) -> list[Job]:
    return [Job(n + 1, prompt(tokenizer, each), max_tokens, GREEDY) for n, each in enumerate(ASKED)]


def test_jobs_are_answered_as_generate_answers_them_alone(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    jobs = greedy_jobs(loaded[1])
    told = run(make_engine(), *jobs)
    for job in jobs:
        assert text(told[job.id]) == alone(loaded, job)
        assert finish(told[job.id]).prompt_tokens == len(job.prompt)
    lengths = [(len(job.prompt), finish(told[job.id]).answer_tokens) for job in jobs]
    assert any(before < 256 < before + drawn for before, drawn in lengths)  # one has crossed


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_a_seed_repeats_an_answer_whoever_is_beside_it(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], temp: float
) -> None:
    job = Job(1, prompt(loaded[1], ASKED[4]), 30, Sampling(temp=temp, top_p=0.95, seed=7))
    others = [replace(job, id=n, sampling=Sampling(temp=1.0)) for n in range(2, 5)]
    assert text(run(make_engine(), job)[1]) == text(run(make_engine(), *others, job)[1])


def test_a_stop_string_ends_an_answer_before_it_and_is_told(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    _, tokenizer = loaded
    job = Job(1, prompt(tokenizer, ASKED[0]), 40, GREEDY)
    whole = alone(loaded, job)
    ids = tokenizer.encode(whole)
    at = len(tokenizer.decode(ids[:2])) - 1
    split = whole[at : at + 3]  # begins in one token and ends in another
    assert len(tokenizer.encode(whole[: at + 3])) > len(tokenizer.encode(whole[: at + 1]))
    for stops in ([split], ["zzz", split], [split, whole[at : at + 1] + "\0"]):
        events = run(make_engine(), replace(job, stop=tuple(stops)))[1]
        assert text(events) == whole[: whole.index(split)]
        assert (finish(events).reason, finish(events).stop_string) == ("stop", split)
    # In the midst of a token: what stands before it there is told once.
    starts = [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]
    inside = next(whole[at + 1 :] for at in starts if whole.index(whole[at + 1 :][:1]) == at + 1 not in starts)
    events = run(make_engine(), replace(job, stop=(inside[:1],)))[1]
    assert text(events) == whole[: -len(inside)] and finish(events).stop_string == inside[:1]
    # What only looked like the beginning of one is told in the end.
    events = run(make_engine(), replace(job, stop=(whole[-1] + "\0",)))[1]
    assert text(events) == whole and finish(events).stop_string is None


def test_max_tokens_and_the_end_of_the_turn(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_tokens_run(monkeypatch)
    job = Job(1, prompt(loaded[1], ASKED[0]), 1, GREEDY)
    end = finish(run(make_engine(), job)[1])
    assert (end.reason, end.answer_tokens) == ("length", 1)
    assert sum(calls) == len(job.prompt)  # a single token costs no step but the prompt's
    end = finish(run(make_engine(), replace(job, max_tokens=200))[1])
    assert end.reason == "stop" and end.answer_tokens < 200


def test_a_job_is_cut_when_its_time_is_over(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now)
    engine = make_engine(max_rows=2)
    slow = Job(1, prompt(loaded[1], ASKED[4]), 200, Sampling(temp=0, logit_bias=dict.fromkeys(loaded[1].eos_ids, -100)))
    other = replace(slow, id=2, max_tokens=30, timeout_s=5000.0)
    waiting = replace(slow, id=3)

    def tick(step: int) -> None:
        nonlocal now
        now += 600 / 16 + 0.1

    told = run(engine, slow, other, waiting, each_step=tick)
    assert finish(told[1]).reason == "timeout" and 0 < finish(told[1]).answer_tokens < 30
    assert finish(told[2]).reason == "length" and finish(told[2]).answer_tokens == 30
    (failure,) = told[3]
    assert isinstance(failure, Failure) and failure.status == 504  # nobody takes it for an empty answer


def test_logprobs_are_those_of_a_plain_forward_pass(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    model, tokenizer = loaded
    job = Job(1, prompt(tokenizer, ASKED[0]), 12, GREEDY, top_logprobs=4)
    told = run(make_engine(), job, replace(job, id=2, top_logprobs=0), replace(job, id=3, top_logprobs=None))
    tokens = [each for event in told[1] if isinstance(event, Piece) for each in event.logprobs]
    assert len(tokens) == finish(told[1]).answer_tokens
    ids = list(job.prompt)
    for each in tokens:
        logits = model(mx.array([ids]))[0, -1]
        logprobs = np.array(logits - mx.logsumexp(logits))
        order = np.argsort(-logprobs)[:4]
        assert [top for top, _ in each.top] == [tokenizer.token_bytes(int(n)) for n in order]
        np.testing.assert_allclose([value for _, value in each.top], logprobs[order], atol=2e-4)
        assert each.logprob == pytest.approx(logprobs[order[0]], abs=2e-4)
        ids.append(int(order[0]))
    assert all(not it.top for event in told[2] if isinstance(event, Piece) for it in event.logprobs)
    assert not any(event.logprobs for event in told[3] if isinstance(event, Piece))


def test_a_job_that_is_cancelled_says_no_more_and_leaves_its_prompt(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    engine, (first, second, *_) = make_engine(), greedy_jobs(loaded[1])
    for moment in ("waiting", "reading", "decoding"):
        engine.prefixes.clear()
        engine.batch.prefill_step_size = 4 if moment == "reading" else 512
        told = engine_module.turn(engine, [first, second]) if moment != "waiting" else engine.submit(first)
        if moment == "waiting":
            engine.submit(second)
        assert engine.gauges()["answers_under_way"] == 2
        assert engine_module._handle(engine, Cancel(first.id)) == []
        assert engine.gauges()["answers_under_way"] == 1  # at once, not after a step
        assert len(engine.prefixes) >= (moment == "decoding")
        later = run_on(engine, told)
        assert all(event.job == second.id for event in later)
        assert text([event for event in [*told, *later] if event.job == second.id]) == alone(loaded, second)
    engine.cancel(99)  # one that is unknown is no matter


def run_on(engine: Engine, before: list[Event]) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def test_what_cannot_be_done_is_refused(loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]) -> None:
    engine, job = make_engine(), greedy_jobs(loaded[1])[0]
    for bad, status in [
        (replace(job, adapter="none such"), 400),
        (replace(job, max_tokens=10**6), 400),
        (replace(job, stop=("",)), 400),
        (replace(job, sampling=Sampling(seed=-1)), 400),
        (replace(job, sampling=Sampling(logit_bias={10**6: 1.0})), 400),  # only noticed when it is applied
        (replace(job, prompt=(10**6,)), 400),
        (replace(job, prompt=()), 400),
    ]:
        told = run(engine, bad, replace(job, id=2))
        (failure,) = told[1]
        assert isinstance(failure, Failure) and failure.status == status, bad
        assert text(told[2]) == alone(loaded, job)


# -- an exception at each call site ----------------------------------------------------------------------------------

BAD = 3  # the job that it happens to


def broken(*args: Any, **options: Any) -> Any:
    raise OSError("injected")


def break_sampler(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    make = Sampling.sampler
    patch.setattr(Sampling, "sampler", lambda sampling: broken if sampling.seed == 666 else make(sampling))


def break_processor(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    make = Sampling.processors
    patch.setattr(Sampling, "processors", lambda own: [broken] if own.logit_bias == {666: 1.0} else make(own))


def break_submit(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    answer = engine._answer
    patch.setattr(engine, "_answer", lambda job: broken() if job.id == BAD else answer(job))


def of_bad(engine: Engine, sequence: Any) -> bool:
    return engine._answers[sequence].job.id == BAD


def break_constraint(kind: str) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    class Mask:
        count = 0

        def mask(self) -> None:
            self.count += 1
            return broken() if kind == "mask" and self.count > 2 else None

        def accept(self, token: int) -> list[int]:
            return broken() if kind == "accept" and self.count > 2 else []

    def install(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        def constraint(job: Job, vocab_size: int) -> Any:
            if job.id != BAD:
                return None
            return broken() if kind == "made" else Mask()

        patch.setattr(engine, "_constraint", constraint)

    return install


def break_prefill(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    run_chunk = batch_module._run_chunk
    patch.setattr(
        batch_module,
        "_run_chunk",
        lambda sequence, room: broken() if of_bad(engine, sequence) else run_chunk(sequence, room),
    )


def break_text(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    make = engine.tokenizer.streaming_decoder

    class Breaking:
        def __init__(self) -> None:
            self.inner, self.count = make(), 0

        def add(self, token: int) -> str:
            self.count += 1
            return broken() if self.count > 3 else self.inner.add(token)

    answer = engine._answer

    def with_broken_text(job: Job) -> Any:
        it = answer(job)
        if job.id == BAD:
            it.text = engine_module.AnswerText(Breaking(), None)
        return it

    patch.setattr(engine, "_answer", with_broken_text)


def break_finish_text(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    answer = engine._answer

    def with_broken_text(job: Job) -> Any:
        it = answer(job)
        if job.id == BAD:
            patch.setattr(it.text, "finish", broken)
        return it

    patch.setattr(engine, "_answer", with_broken_text)


def break_logprob(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_module, "_logprob", broken)  # only one asks for them


def break_find(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    find, wanted = engine.prefixes.find, prompt(engine.tokenizer, ASKED[BAD - 1])
    patch.setattr(
        engine.prefixes,
        "find",
        lambda model, adapter, ids: broken() if tuple(ids) == wanted else find(model, adapter, ids),
    )


def break_put(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.prefixes, "put", broken)


def break_model_load(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    model = engine._models.get
    patch.setattr(engine._models, "get", lambda adapter: broken() if adapter == "bad" else model(adapter))


def break_decode(times: int) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    def install(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        left, forward = times, Decoder.__call__

        def failing(self: Any, ids: mx.array, cache: Any, *options: Any) -> mx.array:
            nonlocal left
            if left and isinstance(cache, BatchCache):
                left -= 1
                broken()
            return forward(self, ids, cache, *options)

        patch.setattr(Decoder, "__call__", failing)

    return install


def break_draw_in_the_midst(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """A job has failed in this step already when the device does."""
    break_sampler(engine, patch)
    evaluate, left = mx.eval, 1

    def failing(*arrays: Any) -> None:
        nonlocal left
        if left and len(arrays) == 1 and isinstance(arrays[0], list) and len(arrays[0]) > 2:
            left -= 1
            broken()
        evaluate(*arrays)

    patch.setattr(batch_module.mx, "eval", failing)


def break_cancel(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Batch, "end", broken)


ALONE = {
    "submit": break_submit,
    "adapter": break_model_load,
    "constraint made": break_constraint("made"),
    "constraint mask": break_constraint("mask"),
    "constraint accept": break_constraint("accept"),
    "sampler": break_sampler,
    "processor": break_processor,
    "forward in prefill": break_prefill,
    "text": break_text,
    "text at the end": break_finish_text,
    "logprob": break_logprob,
    "prefix find": break_find,
}
NOBODY = {"prefix put": break_put, "forward in decode": break_decode(1)}


def injected_jobs(engine: Engine, site: str) -> list[Job]:
    jobs = greedy_jobs(engine.tokenizer, 16)
    bad = jobs[BAD - 1]
    if site in ("sampler", "draw"):
        bad = replace(bad, sampling=Sampling(temp=1.0, seed=666))
    if site == "processor":
        bad = replace(bad, sampling=replace(GREEDY, logit_bias={666: 1.0}))
    if site == "logprob":
        bad = replace(bad, top_logprobs=1)
    if site == "adapter":
        bad = replace(bad, adapter="bad")
    return [*jobs[: BAD - 1], bad, *jobs[BAD:]]


@pytest.mark.parametrize("site", [*ALONE, *NOBODY])
def test_an_exception_fails_its_own_job_or_none(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    engine = make_engine()
    jobs = injected_jobs(engine, site)
    wanted = {job.id: alone(loaded, job) for job in jobs}
    with monkeypatch.context() as patch:
        (ALONE | NOBODY)[site](engine, patch)
        told = run(engine, *jobs)
    for job in jobs:
        if job.id == BAD and site in ALONE:
            failure = told[job.id][-1]
            assert isinstance(failure, Failure) and failure.status == 500 and "injected" in failure.message
        else:
            assert text(told[job.id]) == wanted[job.id]
    assert engine.gauges()["answers_under_way"] == 0 and engine.gauges()["kv_bytes"] == 0
    again = jobs[0]
    assert text(run(engine, again)[again.id]) == wanted[again.id]


@pytest.mark.parametrize(
    "install", [break_decode(2), break_draw_in_the_midst], ids=["forward in decode, twice", "eval of a draw"]
)
def test_a_job_always_hears_its_end(
    loaded: tuple[Model, Tokenizer],
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    install: Callable[[Engine, pytest.MonkeyPatch], None],
) -> None:
    engine = make_engine()
    jobs = injected_jobs(engine, "sampler")
    with monkeypatch.context() as patch:
        install(engine, patch)
        told = run(engine, *jobs)
    for events in told.values():
        assert isinstance(events[-1], (Finish, Failure))
    assert text(run(engine, jobs[0])[1]) == alone(loaded, jobs[0])


@pytest.mark.parametrize("what", ["step", "admit", "cancel"])
def test_a_step_that_comes_to_nothing_fails_those_under_way_and_no_later_one(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine, jobs = make_engine(), greedy_jobs(loaded[1])
    engine_module.turn(engine, jobs[:2])
    with monkeypatch.context() as patch:
        if what == "cancel":
            break_cancel(engine, patch)
            events = engine_module.turn(engine, [Cancel(1), jobs[2]])
            assert {event.job for event in events if isinstance(event, Failure)} == {2}
        else:
            patch.setattr(Batch, what if what == "step" else "_admit", broken)
            events = engine_module.turn(engine, [])
            assert {(event.job, event.status) for event in events if isinstance(event, Failure)} == {(1, 500), (2, 500)}
            assert engine.gauges()["kv_bytes"] == 0 and not engine.busy  # nothing goes on that nobody waits for
    late = run_on(engine, []) if what == "cancel" else []
    if late:  # the job that came with the message that failed
        assert text([event for event in [*events, *late] if event.job == 3]) == alone(loaded, jobs[2])
    told = run(engine, jobs[0])
    assert text(told[1]) == alone(loaded, jobs[0])


# -- adapters --------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, seed: int) -> Path:
    model, _ = load("demo")
    add_adapter(model, rank=4, scale=8.0)
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    for layer in adapter_layers(model).values():
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=next(keys))
    save_adapter(model, folder, {})
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(write_adapter(root / name, seed)) for seed, name in enumerate(["one", "two"])}


def test_adapters_by_name_and_the_base_share_a_batch(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], adapters: dict[str, str]
) -> None:
    engine = make_engine(adapters=adapters)
    job = Job(0, prompt(loaded[1], ASKED[0]), 20, GREEDY)
    names = [None, "one", "two", "one", None]
    jobs = [replace(job, id=n, adapter=name) for n, name in enumerate(names)]
    told = run(engine, *jobs)
    answers = {}
    for name in (None, "one", "two"):
        model, tokenizer = load("demo")
        if name:
            load_adapter(model, Path(adapters[name]))
        answers[name] = generate(model, tokenizer, job.prompt, max_tokens=20)
    assert len(set(answers.values())) == 3  # they do differ
    assert [text(told[n]) for n in range(len(names))] == [answers[name] for name in names]
    # What one has computed is of no use to another.
    assert [finish(told[n]).cached_tokens for n in range(3)] == [0, 0, 0]
    told = run(engine, *jobs[:3])
    assert [text(told[n]) for n in range(3)] == [answers[name] for name in names[:3]]
    assert [finish(told[n]).cached_tokens for n in range(3)] == [len(job.prompt) - 1] * 3


# -- the prefix cache ------------------------------------------------------------------------------------------------


def count_tokens_run(patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward pass of a single sequence runs."""
    calls: list[int] = []
    forward = Decoder.__call__

    def counting(self: Any, ids: mx.array, *options: Any) -> mx.array:
        calls.append(ids.size)
        return forward(self, ids, *options)

    patch.setattr(Decoder, "__call__", counting)
    return calls


@pytest.mark.slow
def test_the_second_turn_of_a_long_conversation_reads_only_what_is_new(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = loaded
    messages = [{"role": "user", "content": " ".join(f"Number {n} is {n * 7}." for n in range(120))}]
    first = Job(1, tuple(tokenizer.apply_chat_template(messages)), 12, GREEDY)
    assert len(first.prompt) >= 1000
    engine = make_engine()
    said = text(run(engine, first)[1])
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And what is 9 times 9?"}]
    second = Job(2, tuple(tokenizer.apply_chat_template(messages)), 12, GREEDY, top_logprobs=20)
    before = engine.prefilled_tokens
    calls = count_tokens_run(monkeypatch)
    events = run(engine, second)[2]
    end = finish(events)
    new = len(second.prompt) - end.cached_tokens
    assert end.cached_tokens >= len(first.prompt)
    assert engine.prefilled_tokens - before == new < 60
    assert calls[0] == new and all(n == 1 for n in calls[1:])  # one pass over the new tokens, then a token at a time
    # The same from cold: text, and log-probabilities within 2e-4 (fp32, sums in another order).
    cold = run(make_engine(), second)[2]
    assert text(events) == text(cold) and finish(cold).cached_tokens == 0
    warm_tops, cold_tops = (
        [top for event in each if isinstance(event, Piece) for it in event.logprobs for top in it.top]
        for each in (events, cold)
    )
    assert [token for token, _ in warm_tops] == [token for token, _ in cold_tops]
    np.testing.assert_allclose([it for _, it in warm_tops], [it for _, it in cold_tops], atol=2e-4)


def test_answers_to_one_prompt_read_it_once(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    for words, chunk in ((3, 512), (100, 64)):  # at one go, or over many steps
        engine = make_engine()
        engine.batch.prefill_step_size = chunk
        asked = prompt(loaded[1], "Count: " + "one " * words)
        jobs = [Job(n, asked, 4, Sampling(temp=1.0, seed=n)) for n in range(5)]
        told = run(engine, *jobs)
        assert engine.prefilled_tokens == len(asked) + 4
        for job in jobs:
            assert text(told[job.id]) == text(run(make_engine(), job)[job.id])


def test_without_room_for_earlier_prompts_all_is_read(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    engine, job = make_engine(prefix_limit_bytes=0), greedy_jobs(loaded[1])[0]
    told = run(engine, job, replace(job, id=2))
    assert text(told[1]) == text(told[2]) == alone(loaded, job)
    assert engine.prefilled_tokens == 2 * len(job.prompt) and len(engine.prefixes) == 0


def test_rows_that_outgrow_the_memory_begin_anew_from_what_is_known(
    loaded: tuple[Model, Tokenizer], make_engine: Callable[..., Engine]
) -> None:
    model, tokenizer = loaded
    limit = 3 * 256 * model.context_cost().token_bytes
    engine = make_engine(kv_limit_bytes=limit)
    draw = random.Random(3)
    bias = Sampling(temp=0, logit_bias=dict.fromkeys(tokenizer.eos_ids, -100.0))
    jobs = [Job(n, tuple(draw.randrange(900) for _ in range(235)), 40, bias) for n in range(3)]
    told = run(engine, *jobs)
    for job in jobs:
        assert finish(told[job.id]).answer_tokens == 40
        assert text(told[job.id]) == text(run(make_engine(), job)[job.id])


def test_the_limit_is_a_prefix_caches_own(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(prefix_limit_bytes=12345)
    assert isinstance(engine.prefixes, PrefixCache) and engine.prefixes.limit_bytes == 12345
    assert engine.gauges()["prefix_cache_limit_bytes"] == 12345
