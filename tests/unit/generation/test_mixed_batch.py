"""A batch of answers under different adapters: pictures, sound, both, users' own and none, each as it is alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.adapters.layers import current_adapter
from phi4_mlx.adapters.quantized import quantized
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.multimodal import Model
from phi4_mlx.models.text import Decoder
from phi4_mlx.tokens.prompt import Medium, Prompt
from tests.adapters import adapted
from tests.conformance.recipe_multimodal import BOUNDARY
from tests.conftest import make_tiny_model
from tests.media import clip, picture, prompt_of
from tests.tiny_multimodal import make_tiny_multimodal

MAX_TOKENS = 20


def prompt(seed: int, *media: Medium, words: int = 9) -> Prompt:
    """Random text with media in it."""
    draw = random.Random(seed)
    text = [draw.randrange(3, 500) for _ in range(words)]
    return prompt_of(text[:2], *media, text[2:])


@dataclass
class Question:
    ids: Prompt
    adapter: str | None = None


def questions() -> list[Question]:
    """Twelve of all kinds; some start beyond the RoPE boundary, some cross it."""
    return [
        Question(prompt(0)),
        Question(prompt(1, picture(1))),
        Question(prompt(2, clip(2))),
        Question(prompt(3, picture(3), clip(3))),
        Question(prompt(4), "lora"),
        Question(prompt(5), "dora"),
        Question(prompt(6), "other rank"),
        Question(prompt(7), "8 bits"),
        Question(prompt(8, picture(8, across=2))),
        Question(prompt(9, clip(9, 190), words=30)),
        Question(prompt(10, words=BOUNDARY - 5), "lora"),
        Question(prompt(11, words=BOUNDARY - 3)),
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    model = make_tiny_multimodal()
    assert model.adapters.names == ["vision", "speech"]
    for seed, (name, kind, rank) in enumerate([("lora", "lora", 4), ("dora", "dora", 3), ("other rank", "lora", 7)]):
        model.adapters.add(name, current_adapter(adapted(make_tiny_model(), kind, seed, rank=rank, scale=3.0), name))
    model.adapters.add("8 bits", quantized(current_adapter(adapted(make_tiny_model(), seed=9, rank=5), "8 bits")))
    return model


def alone(model: Model, question: Question) -> list[int]:
    cache = model.make_cache()
    cache.adapter = question.adapter
    ids = question.ids.copy()
    return [token for token, _ in generate_step(ids, model, max_tokens=MAX_TOKENS, cache=cache)]


def together(model: Model, asked: Sequence[Question], **options: int) -> list[list[int]]:
    """The answers in one batch."""
    sequences = [BatchSequence(model, each.ids.copy(), MAX_TOKENS, adapter=each.adapter) for each in asked]
    batch = Batch(**options)
    for sequence in sequences:
        batch.add(sequence)
    while batch.waiting or batch.active:
        for event in batch.step():
            assert not isinstance(event, Fault), event
            if event.sequence.drawn >= MAX_TOKENS and event.sequence in batch.active:
                batch.end(event.sequence)
    return [sequence.ids[sequence.prompt_tokens :] for sequence in sequences]


@pytest.mark.parametrize("options", [{}, pytest.param({"prefill_step_size": 13}, marks=pytest.mark.slow)])
def test_twelve_answers_of_all_kinds_are_each_as_alone(
    model: Model, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = questions(), []
    forward = Decoder.__call__

    def counting(self: Any, ids: mx.array, *rest: Any, **kwargs: Any) -> mx.array:
        rows.append(len(ids))
        return forward(self, ids, *rest, **kwargs)

    monkeypatch.setattr(Decoder, "__call__", counting)
    answers = together(model, asked, **options)
    assert max(rows) >= (5 if options else 7)  # rows under all adapters in one pass
    for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer == alone(model, question), number
    assert len({tuple(answer) for answer in answers}) == len(asked)


def test_an_adapter_of_each_kind_changes_the_answer(model: Model) -> None:
    asked = questions()[1:8]
    for question in asked:
        answer = alone(model, question)
        model.adapters.on = False
        off = alone(model, question)
        model.adapters.on = True
        assert answer != off


def test_a_users_adapter_and_a_picture_are_refused_and_others_go_on(model: Model) -> None:
    asked = [Question(prompt(0)), Question(prompt(1, picture(1)), "lora")]
    sequences = [BatchSequence(model, each.ids.copy(), 5, adapter=each.adapter) for each in asked]
    batch = Batch()
    for sequence in sequences:
        batch.add(sequence)
    faults = [event for event in batch.step() if isinstance(event, Fault)]
    assert [fault.sequence for fault in faults] == sequences[1:]
    assert "adapter 'lora' cannot be used with image input" in str(faults[0].error)
    assert batch.active == sequences[:1]
