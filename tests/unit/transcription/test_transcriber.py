"""Parts side by side have the answers that each has alone."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.generation.stream import generate
from phi4_mlx.transcription.parts import Part
from phi4_mlx.transcription.tasks import TRANSCRIBE, most_tokens, speech_messages
from phi4_mlx.transcription.transcriber import answers
from tests.tiny_multimodal import write_tiny_multimodal

RATE = 16_000


def part(seconds: float, seed: int) -> Part:
    wave = 0.1 * np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return Part(10.0 * seed, 10.0 * seed + seconds, wave, RATE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(write_tiny_multimodal(tmp_path_factory.mktemp("tiny") / "model"))


def test_answers_side_by_side_are_those_of_each_part_alone(tiny) -> None:
    model, tokenizer = tiny
    parts = [part(seconds, seed) for seed, seconds in enumerate((1.0, 0.4, 1.0, 0.7))]
    found = {answer.part: answer for answer in answers(model, tokenizer, parts, TRANSCRIBE, rows=3)}
    assert set(found) == set(parts)
    for each in parts:
        prompt = tokenizer.apply_chat_template(speech_messages(each.audio(), TRANSCRIBE))
        alone = generate(model, tokenizer, prompt, max_tokens=most_tokens(each.end - each.start))
        assert found[each].text == alone.strip()
    assert len({answer.text for answer in found.values()}) == len(parts)


def test_parts_are_taken_as_rows_become_free(tiny) -> None:
    model, tokenizer = tiny
    taken = done = 0

    def parts() -> Iterator[Part]:
        nonlocal taken
        for seed in range(5):
            taken += 1
            yield part(0.3, seed)

    for _ in answers(model, tokenizer, parts(), TRANSCRIBE, rows=2):
        done += 1
        assert taken <= done + 1
    assert done == taken == 5


def test_a_failure_of_a_part_is_raised(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny

    def fail(*args: object) -> mx.array:
        raise ValueError("no memory")

    monkeypatch.setattr(type(model), "encode", fail)
    with pytest.raises(ValueError, match="no memory"):
        list(answers(model, tokenizer, [part(0.2, 9)], TRANSCRIBE))


def test_no_parts_have_no_answers(tiny) -> None:
    assert list(answers(*tiny, [], TRANSCRIBE)) == []
