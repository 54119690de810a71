"""Scores in batch equal those of each sequence run alone, and nothing is run twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.evaluation import scoring
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.scoring import Score, scores
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.generation import memory
from phi4_mlx.generation.memory import cache_bytes, plan_context
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.rope import Regime
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.conftest import BOUNDARY
from tests.kinds import MAKERS

START = 7
Request = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    """A subject of each kind."""
    tokenizer = Tokenizer([{"content": "<s>", "id": START}], {})
    return {kind: Subject(make(), tokenizer, kind, kind) for kind, make in MAKERS.items()}


@contextmanager
def passes(model: LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """The shape of each forward pass of a model."""
    kind, seen = type(model), []
    whole = kind.hidden

    def hidden(self: LanguageModel, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append((ids.shape[0], ids.shape[1]))
        return whole(self, ids, *args, **options)

    kind.hidden = hidden  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        kind.hidden = whole  # type: ignore[method-assign]


def tokens(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in shapes)


def alone(model: LanguageModel, context: list[int], continuation: list[int]) -> Score:
    """The score of one sequence that the context holds, from its whole logits."""
    if not continuation:
        return Score(0.0, True, 0)
    ids = [*(context or [START]), *continuation][-model.config.max_position_embeddings - 1 :]
    logits = model(mx.array([ids[:-1]]))[0, -len(continuation) :].astype(mx.float32)
    targets = mx.array(continuation)[:, None]
    logprobs = mx.take_along_axis(logits, targets, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    greedy = mx.argmax(logits, axis=-1).tolist() == continuation
    return Score(logprobs.sum().item(), greedy, len(continuation))


def check(subject: Subject, requests: Sequence[Request], answers: Answers) -> None:
    found = scores(subject, requests, answers)
    expected = [alone(subject.model, *request) for request in requests]
    assert [(score.greedy, score.tokens) for score in found] == [(each.greedy, each.tokens) for each in expected]
    assert [score.logprob for score in found] == pytest.approx([each.logprob for each in expected], rel=0, abs=1e-4)


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(20, 400) for _ in range(count)]


def choices(draw: random.Random, documents: int, shots: int = 40) -> list[Request]:
    """Documents of four choices after the same shots."""
    before, made = ids(draw, shots), []
    for _ in range(documents):
        context = before + ids(draw, draw.randrange(1, 25))
        made += [(context, ids(draw, draw.randrange(1, 9))) for _ in range(4)]
    return made


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), most_rows=st.sampled_from([1, 2, 3, 64]), chunk=st.sampled_from([5, 64, 2048]))
def test_a_score_equals_one_asked_alone(
    subjects: dict[str, Subject],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    seed: int,
    most_rows: int,
    chunk: int,
) -> None:
    draw = random.Random(seed)
    requests: list[Request] = []
    known = [[], ids(draw, draw.randrange(1, BOUNDARY))]
    for _ in range(draw.randrange(1, 8)):  # a random tree of beginnings with choices, across the RoPE boundary
        beginning = draw.choice(known)
        known.append(beginning[: draw.randrange(len(beginning) + 1)] + ids(draw, draw.choice([1, 2, 9, BOUNDARY])))
        context = draw.choice(known)
        requests += [(context, ids(draw, draw.choice([0, 1, 1, 4, 30]))) for _ in range(draw.randrange(1, 5))]
    with pytest.MonkeyPatch.context() as patched, Answers(tmp_path_factory.mktemp("run") / "answers") as answers:
        patched.setattr(scoring, "MAX_ROWS", most_rows)
        patched.setattr(scoring, "PREFILL_STEP_SIZE", chunk)
        check(subjects[kind], requests, answers)


@pytest.mark.parametrize("kind", MAKERS)
def test_each_sequence_has_the_rope_table_of_its_length(
    subjects: dict[str, Subject], tmp_path: Path, kind: str
) -> None:
    draw = random.Random(1)
    context = ids(draw, BOUNDARY - 4)
    requests = [(context, ids(draw, length)) for length in (1, 4, 5, 6, 7, 20)]  # 5: the boundary exactly
    with Answers(tmp_path / "answers") as answers:
        check(subjects[kind], requests, answers)


def test_a_score_is_of_the_long_table_once_the_sequence_is_long(tmp_path: Path, subjects: dict[str, Subject]) -> None:
    model, regimes = subjects["phi3"].model, []
    make = model.make_cache

    def make_cache(regime: Regime) -> Any:
        regimes.append(regime)
        return make(regime)

    draw = random.Random(1)
    context = ids(draw, BOUNDARY)
    model.make_cache = make_cache  # type: ignore[method-assign,assignment]
    try:
        with Answers(tmp_path / "answers") as answers:
            scores(subjects["phi3"], [(context, ids(draw, 1)), (context, ids(draw, 2))], answers)
    finally:
        del model.make_cache
    assert regimes == ["short", "long"]


def test_shared_beginnings_and_choices_are_run_once(subjects: dict[str, Subject], tmp_path: Path) -> None:
    draw = random.Random(2)
    before = ids(draw, 30)
    contexts = [before + ids(draw, 20) for _ in range(5)]
    requests = [(context, [choice]) for context in contexts for choice in (50, 51, 52, 53)]
    with Answers(tmp_path / "answers") as answers, passes(subjects["phi3"].model) as shapes:
        scores(subjects["phi3"], requests, answers)
    assert tokens(shapes) == 30 + 5 * 20
    assert len(shapes) == 2  # the beginning, and one row a document


def test_documents_that_begin_alike_by_chance_do_not_lose_their_own_beginnings(
    subjects: dict[str, Subject], tmp_path: Path
) -> None:
    draw = random.Random(8)
    before, requests = ids(draw, 30), []
    for n in range(8):
        context = [*before, 50 + n % 2, *ids(draw, 20)]
        requests += [(context, ids(draw, 6)) for _ in range(4)]
    with Answers(tmp_path / "answers") as answers, passes(subjects["phi3"].model) as shapes:
        scores(subjects["phi3"], requests, answers)
    assert tokens(shapes) <= 30 + 8 * (21 + 4 * 6)


def test_a_text_without_shared_beginning_is_not_slower_than_alone(subjects: dict[str, Subject], tmp_path: Path) -> None:
    draw = random.Random(3)
    requests = [(ids(draw, 20), ids(draw, 10)) for _ in range(8)]
    with Answers(tmp_path / "answers") as answers, passes(subjects["phi3"].model) as shapes:
        scores(subjects["phi3"], requests, answers)
    assert shapes == [(8, 29)]


def test_nothing_is_scored_twice(subjects: dict[str, Subject], tmp_path: Path) -> None:
    requests = choices(random.Random(4), 4)
    with Answers(tmp_path / "answers") as answers:
        first = scores(subjects["phi3"], requests[:8], answers)
    with Answers(tmp_path / "answers") as answers, passes(subjects["phi3"].model) as shapes:
        assert scores(subjects["phi3"], requests[:8], answers) == first
        assert shapes == []
        again = scores(subjects["phi3"], requests + requests, answers)
        assert again[:8] == first and again[: len(requests)] == again[len(requests) :]
    assert len((tmp_path / "answers").read_text().splitlines()) == len(requests)


def test_a_run_stopped_between_passes_goes_on_to_the_same_bits(subjects: dict[str, Subject], tmp_path: Path) -> None:
    requests, written = choices(random.Random(5), 6), []
    with Answers(tmp_path / "whole") as answers:
        put = answers.put_all

        def put_all(some: Mapping[str, object]) -> None:
            put(some)
            written.append((tmp_path / "whole").read_bytes())

        answers.put_all = put_all  # type: ignore[method-assign]
        whole = scores(subjects["phi3"], requests, answers)
    assert len(written) > 4
    for before in [b"", *written]:
        (tmp_path / "stopped").write_bytes(before)
        with Answers(tmp_path / "stopped") as answers:
            assert scores(subjects["phi3"], requests, answers) == whole
        assert sorted((tmp_path / "stopped").read_bytes().splitlines()) == sorted(written[-1].splitlines())


def test_rows_of_a_pass_are_as_many_as_fit_the_memory(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subjects["phi3"].model
    plan = plan_context(model)
    draw = random.Random(9)
    requests = [(ids(draw, 20), ids(draw, 10)) for _ in range(8)]
    three_rows = 3 * cache_bytes(model.context_cost(), 29, snapshots=0)
    beside = plan.cache_bytes(29) + 2 * 4 * scoring.LOGITS
    monkeypatch.setattr(memory, "memory_limit", lambda: plan.peak_bytes(29) + 2 * (beside + three_rows))
    with Answers(tmp_path / "answers") as answers, passes(model) as shapes:
        check(subjects["phi3"], requests, answers)
    assert [rows for rows, _ in shapes if rows > 1] == [3, 3, 2]


def test_a_long_sequence_is_cut_from_the_left_and_reported(subjects: dict[str, Subject], tmp_path: Path) -> None:
    model = MAKERS["phi3"](max_position_embeddings=96)
    subject = replace(subjects["phi3"], model=model)
    draw = random.Random(6)
    requests = [(ids(draw, 150), ids(draw, 3)), (ids(draw, 94), ids(draw, 3))]
    with Answers(tmp_path / "answers") as answers, pytest.warns(UserWarning, match="1 sequence of 2 .* 96 tokens"):
        check(subject, requests, answers)


def test_a_continuation_longer_than_the_context_is_scored_in_windows(tmp_path: Path) -> None:
    model = MAKERS["phi3"](max_position_embeddings=64, original_max_position_embeddings=32)
    subject = Subject(model, Tokenizer([{"content": "<s>", "id": START}], {}), "tiny", "tiny")
    text = ids(random.Random(7), 150)
    with Answers(tmp_path / "answers") as answers, pytest.warns(UserWarning):
        (score,) = scores(subject, [([], text)], answers)
    whole = [START, *text]
    expected = 0.0
    for start, end in ((0, 64), (64, 128), (128, 150)):  # a token is predicted once; the last window is full
        run = whole[max(0, end - 64) : end]
        expected += alone(model, run[: len(run) + start - end + 1], text[start:end]).logprob
    assert score.logprob == pytest.approx(expected, abs=1e-4)
    assert score.tokens == 150


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(subjects: dict[str, Subject], tmp_path: Path, bad: int) -> None:
    with Answers(tmp_path / "answers") as answers, pytest.raises(RequestError, match="vocabulary"):
        scores(subjects["phi3"], [([5], [bad])], answers)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    model = MAKERS["phi3"]()
    model.model.norm.weight = model.model.norm.weight * float("nan")
    subject = Subject(model, Tokenizer([{"content": "<s>", "id": START}], {}), "tiny", "tiny")
    with Answers(tmp_path / "answers") as answers, pytest.raises(CheckpointError, match="NaN"):
        scores(subject, [([5], [6])], answers)
