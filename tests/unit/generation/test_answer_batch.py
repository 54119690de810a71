"""Answers drawn in one batch: rows, ends that a grammar forces, failures of one request, and their JSON."""

from __future__ import annotations

import json
from collections import deque
from typing import NoReturn

import pytest

from phi4_mlx.errors import CheckpointError
from phi4_mlx.generation import answer_batch
from phi4_mlx.generation.answer_batch import Answer, AnswerBatch, AnswerRequest
from phi4_mlx.generation.memory import plan_context
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.grammar.grammars import json_schema
from phi4_mlx.tools.calls import ToolCall
from tests.conftest import Demo


def drawn(demo: Demo, requests: list[AnswerRequest]) -> dict[str, Answer | Exception]:
    """The answers by their keys; never more rows than allowed."""
    model, tokenizer = demo
    batch, queue = AnswerBatch(model, tokenizer, plan_context(model)), deque(requests)
    found: dict[str, Answer | Exception] = {}
    while queue or batch:
        batch.fill(queue)
        assert len(batch) <= answer_batch.MAX_ROWS
        found |= {request.key: answer for request, answer in batch.step()}
    assert len(found) == len(requests)
    return found


def test_rows_are_limited_and_neighbours_do_not_matter(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = demo[1].encode
    texts = ["Once", "Once upon", "Tell me", "hi", "a", "what are you?"]
    requests = [
        AnswerRequest(str(n), encode(text), 3 + n, Sampling(1.2, seed=7) if n % 2 else Sampling())
        for n, text in enumerate(texts)
    ]
    together = drawn(demo, requests)
    monkeypatch.setattr(answer_batch, "MAX_ROWS", 2)
    assert drawn(demo, requests[::-1]) == together
    for request in requests:
        assert drawn(demo, [request]) == {request.key: together[request.key]}


def test_an_end_that_a_grammar_forces_is_no_stop(demo: Demo) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    ids = demo[1].encode("Tell me")
    (answer,) = drawn(demo, [AnswerRequest("0", ids, 12, grammar=json_schema(schema))]).values()
    assert isinstance(answer, Answer)
    assert list(json.loads(answer.text)) == ["text"]
    assert answer.finish_reason == "length" and answer.tokens <= 12


def test_a_failure_is_of_one_request(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> NoReturn:
        raise CheckpointError("NaN")

    monkeypatch.setattr(Sampling, "processors", lambda self: [failing] if self.seed == 1 else [])
    ids = demo[1].encode("Once")
    found = drawn(demo, [AnswerRequest("bad", ids, 4, Sampling(seed=1)), AnswerRequest("good", ids, 4)])
    assert isinstance(found["bad"], CheckpointError)
    assert found["good"] == drawn(demo, [AnswerRequest("good", ids, 4)])["good"]


def test_an_answer_crosses_as_json() -> None:
    answer = Answer("a b", "b", "a", (ToolCall("add", {"x": [1, None]}),), "stop", 3, 2)
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
