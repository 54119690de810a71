"""Questions asked in batch: answers as when asked alone, stops while drawing, thoughts apart, nothing asked twice."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.agent import ToolCall
from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.generation.sampling import make_sampler
from phi4_mlx.generation.stream import generate
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from tests.conftest import Demo
from tests.kinds import WRITERS


@pytest.fixture
def subject(demo: Demo) -> Subject:
    """The demo."""
    return Subject(*demo, "demo", "demo")


def scripted(subject: Subject, monkeypatch: pytest.MonkeyPatch, text: str) -> Subject:
    """The subject, whose every answer is this text, then the end of the turn."""
    script = [*subject.tokenizer.encode(text, specials=True), min(subject.tokenizer.eos_ids)]
    kind, V = type(subject.model), subject.model.config.vocab_size
    hidden = kind.hidden

    def counting(self: LanguageModel, ids: mx.array, cache: Any = None, **options: Any) -> mx.array:
        found = hidden(self, ids, cache, **options)
        lengths = getattr(cache, "lengths", None) or [cache.offset]
        counting.lengths = lengths  # type: ignore[attr-defined]
        return found

    def logits(self: LanguageModel, states: mx.array) -> mx.array:
        rows = []
        for length in counting.lengths:  # type: ignore[attr-defined]
            wanted = script[min(length - counting.prompt, len(script) - 1)]  # type: ignore[attr-defined]
            rows.append(mx.where(mx.arange(V) == wanted, 9.0, 0.0))
        return mx.stack(rows)[:, None]

    monkeypatch.setattr(kind, "hidden", counting)
    monkeypatch.setattr(kind, "logits", logits)
    counting.prompt = len(subject.tokenizer.encode("Q"))  # type: ignore[attr-defined]
    return subject


@pytest.mark.parametrize("kind", WRITERS)
def test_answers_in_batch_are_those_asked_alone(tmp_path: Path, kind: str) -> None:
    subject = load_subject(str(WRITERS[kind](tmp_path / kind)))
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randrange(1, 60))) for _ in range(7)]
    questions: list[Question] = [Question(text, text, max_tokens=draw.randrange(1, 20)) for text in texts]
    questions += [Question(text, [{"role": "user", "content": text}], max_tokens=9) for text in texts[:3]]
    with Answers(tmp_path / "answers") as answers:
        found = ask(subject, questions, answers)
    for question, answer in zip(questions, found, strict=True):
        prompt: Any = question.prompt
        ids = (
            subject.tokenizer.encode(prompt, specials=True)
            if isinstance(prompt, str)
            else subject.tokenizer.apply_chat_template(prompt)
        )
        alone = generate(subject.model, subject.tokenizer, ids, max_tokens=question.max_tokens)
        assert (answer.text, answer.prompt_tokens) == (alone, len(ids))
        assert (answer.finish_reason, answer.tokens) == (
            "length",
            question.max_tokens,
        ) or answer.finish_reason == "stop"


def test_a_sampled_answer_is_repeatable_and_its_own(subject: Subject, tmp_path: Path) -> None:
    questions = [Question("", "Once", max_tokens=6, temp=1.5, top_p=0.9, seed=seed) for seed in (1, 2, 3, 1)]
    with Answers(tmp_path / "answers") as answers:
        found = ask(subject, questions, answers)
        assert len(answers) == 3
    assert found[0] == found[3]
    assert len({answer.text for answer in found}) == 3
    for question, answer in zip(questions, found, strict=True):
        sampler = make_sampler(1.5, 0.9, seed=question.seed)
        assert answer.text == generate(subject.model, subject.tokenizer, "Once", max_tokens=6, sampler=sampler)


@pytest.mark.parametrize(
    ("stops", "content", "tokens"),
    [
        (("two",), "one ", 2),
        (("wo", "o three"), "one t", 2),
        ((" three", "zzz"), "one two", 3),
        (("zzz",), "one two three", None),
        ((), "one two three", None),
    ],
)
def test_a_stop_string_ends_the_answer_while_it_is_drawn(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[str, ...],
    content: str,
    tokens: int | None,
) -> None:
    subject = scripted(subject, monkeypatch, "one two three")
    script = subject.tokenizer.encode("one two three")
    with Answers(tmp_path / "answers") as answers:
        (answer,) = ask(subject, [Question("", "Q", stops=stops, max_tokens=99)], answers)
    assert (answer.content, answer.text, answer.finish_reason) == (content, content, "stop")
    drawn = subject.tokenizer.decode(script[: answer.tokens])
    if tokens is None:
        assert answer.tokens == len(script) + 1
    else:  # not a token more than needed
        assert any(stop in drawn for stop in stops)
        assert not any(stop in subject.tokenizer.decode(script[: answer.tokens - 1]) for stop in stops)


def test_thoughts_are_apart_and_a_stop_string_in_them_ends_nothing(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo
    monkeypatch.setattr(tokenizer, "chat_format", CHAT_FORMATS["phi4-mini-reasoning"])
    subject = scripted(Subject(model, tokenizer, "demo", "demo"), monkeypatch, "<think>\nI stop.\n</think>\n\nyes. no")
    with Answers(tmp_path / "answers") as answers:
        (answer,) = ask(subject, [Question("", "Q", stops=(".",), max_tokens=99)], answers)
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("I stop.", "yes", "stop")
    assert answer.text == "<think>\nI stop.\n</think>\n\nyes"


def test_thoughts_that_do_not_end_are_no_answer(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = demo
    monkeypatch.setattr(tokenizer, "chat_format", CHAT_FORMATS["phi4-mini-reasoning"])
    subject = scripted(Subject(model, tokenizer, "demo", "demo"), monkeypatch, "<think>so many thoughts")
    with Answers(tmp_path / "answers") as answers:
        (answer,) = ask(subject, [Question("", "Q", max_tokens=20)], answers)
    assert (answer.content, answer.finish_reason) == ("", "stop")
    assert answer.reasoning == "so many thoughts"


def test_calls_of_declared_tools_are_parsed(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'ok<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>'
    subject = scripted(subject, monkeypatch, text)
    tools = [{"name": "add", "description": "", "parameters": {"a": {"type": "int"}}}]
    questions = [Question("", "Q", tools=tools, max_tokens=99), Question("", "Q", max_tokens=99)]
    with Answers(tmp_path / "answers") as answers:
        with_tools, without = ask(subject, questions, answers)
        assert ask(subject, questions, answers) == [with_tools, without]
    assert with_tools.calls == (ToolCall("add", {"a": 1}),)
    assert (with_tools.content, with_tools.text) == ("ok", text)
    assert (without.calls, without.content) == ((), text)


def test_nothing_is_asked_twice_and_each_answer_is_written_at_once(subject: Subject, tmp_path: Path) -> None:
    path, seen = tmp_path / "answers", []
    questions = [Question(str(n), f"number {n}", max_tokens=n + 1) for n in range(6)]

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert len(path.read_text().splitlines()) == done

    with Answers(path) as answers:
        first = ask(subject, questions[:4], answers, progress)
    assert seen[0] == (0, 4) and seen[-1] == (4, 4)
    seen.clear()
    with Answers(path) as answers:
        assert ask(subject, questions, answers, progress)[:4] == first
    assert seen[0] == (4, 6) and seen[-1] == (6, 6)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len({*keys}) == len(keys) == 6


@pytest.mark.parametrize("kind", WRITERS)
def test_a_long_shared_beginning_is_run_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(str(WRITERS[kind](tmp_path / kind)))
    draw = random.Random(2)
    shots = "".join(draw.choices("abcdefgh ", k=700))
    questions = [Question(str(n), f"{shots}{n} is another{'x' * n}", max_tokens=2) for n in range(6)]
    lengths = [len(subject.tokenizer.encode(question.prompt, specials=True)) for question in questions]  # type: ignore[arg-type]
    assert min(lengths) > 520  # more than a step prefills
    seen, hidden = [], type(subject.model).hidden

    def counted(self: LanguageModel, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        seen.append(ids.size)
        return hidden(self, ids, *args, **options)

    monkeypatch.setattr(type(subject.model), "hidden", counted)
    with Answers(tmp_path / "answers") as answers:
        ask(subject, questions, answers)
    assert sum(seen) < 1.3 * max(lengths)


def test_a_prompt_longer_than_the_context_is_cut_from_the_left_and_reported(tmp_path: Path) -> None:
    subject = load_subject(str(WRITERS["phi3"](tmp_path / "tiny", max_position_embeddings=80)))
    text = "abcdefgh" * 40
    ids = subject.tokenizer.encode(text)
    with Answers(tmp_path / "answers") as answers:
        with pytest.warns(UserWarning, match="1 prompt of 1 cut from the left"):
            (cut,) = ask(subject, [Question("", text, max_tokens=20)], answers)
        with pytest.warns(UserWarning, match="1 prompt of 1 left with fewer tokens"):
            (short,) = ask(subject, [Question("", "abc", max_tokens=1000)], answers)
    assert cut.prompt_tokens == 60 and cut.text == generate(subject.model, subject.tokenizer, ids[-60:], max_tokens=20)
    assert short.tokens + short.prompt_tokens == 80 or short.finish_reason == "stop"


def test_an_empty_prompt_is_the_start_of_a_text(subject: Subject, tmp_path: Path) -> None:
    with Answers(tmp_path / "answers") as answers:
        (answer,) = ask(subject, [Question("", "", max_tokens=4)], answers)
    alone = generate(subject.model, subject.tokenizer, [subject.start_id], max_tokens=4)
    assert (answer.text, answer.prompt_tokens) == (alone, 1)


@pytest.mark.parametrize(
    "change", [{"max_tokens": 0}, {"temp": -1.0}, {"top_p": 2.0}, {"stops": ("",)}, {"temp": 1.0, "seed": -1}]
)
def test_settings_out_of_range_are_refused(subject: Subject, tmp_path: Path, change: dict[str, Any]) -> None:
    with Answers(tmp_path / "answers") as answers, pytest.raises(RequestError):
        ask(subject, [replace(Question("", "Q"), **change)], answers)
