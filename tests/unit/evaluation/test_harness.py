"""lm-eval's interface over the demo: splits, empty contexts, settings of generation, chat, and whole tasks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation import harness as module
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.generation.answer_batch import Answer
from tests.conftest import ROOT, Demo, TinyCheckpoint

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from phi4_mlx.evaluation.harness import Harness

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, validation: {folder}/test.jsonl}}}}
test_split: test
fewshot_split: validation
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: {target}
{more}
"""
CHOICES = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
WORDS = """output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: true, temperature: 1.0}
repeats: 3
metric_list: [{metric: exact_match}]
filter_list: [{name: first, filter: [{function: take_first}]}]"""
TEXT = "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"


@pytest.fixture
def subject(demo: Demo) -> Subject:
    """The demo."""
    return Subject(*demo, "a/demo", "demo")


@pytest.fixture
def answers(tmp_path: Path) -> Any:
    """A new file of answers."""
    with Answers(tmp_path / "answers.jsonl") as opened:
        yield opened


def requests(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=each, idx=0) for each in arguments]


def logprob(subject: Subject, context: list[int], continuation: list[int]) -> float:
    logits = subject.model(mx.array([context + continuation]))[0, len(context) - 1 : -1]
    return nn.log_softmax(logits)[mx.arange(len(continuation)), mx.array(continuation)].sum().item()


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("Hello my", " name is", "Hello my", " name is"),
        ("Hello my ", "name is", "Hello my", " name is"),  # white space moves to the continuation
        ("Hello my \n ", "name", "Hello my", " \n name"),
        ("<|user|>Hi<|end|><|assistant|>", "Hello", "<|user|>Hi<|end|><|assistant|>", "Hello"),
    ],
)
def test_contexts_are_split_from_continuations_as_lm_eval_does(
    subject: Subject, answers: Answers, context: str, continuation: str, before: str, after: str
) -> None:
    whole, start = (subject.tokenizer.encode(text, specials=True) for text in (before + after, before))
    assert whole[: len(start)] == start
    ((found, _),) = Harness(subject, answers).loglikelihood(requests((context, continuation)))
    assert found == pytest.approx(logprob(subject, start, whole[len(start) :]), abs=1e-4)


def test_a_start_token_stands_at_the_start_alone(subject: Subject, answers: Answers, monkeypatch: Any) -> None:
    encode, start = subject.tokenizer.encode, subject.start_id
    harness = Harness(subject, answers)
    monkeypatch.setattr(subject.tokenizer, "encode", lambda text, **more: [start, *encode(text, **more)])
    text = harness.apply_chat_template([{"role": "user", "content": "a<|end|>b"}])  # which stays text
    ids = harness.tok_encode(text)
    assert start not in ids[1:] and harness.tok_encode(text + " c") == [*ids, *encode(" c")]


def test_control_strings_are_control_tokens(subject: Subject, answers: Answers) -> None:
    ids = Harness(subject, answers).tok_encode("<|user|>Hi<|end|>")
    control = subject.tokenizer.control_ids
    assert (ids[0], ids[-1]) == (control["<|user|>"], control["<|end|>"])


def test_a_continuation_that_merges_with_its_context_is_still_scored(subject: Subject, answers: Answers) -> None:
    encode = subject.tokenizer.encode
    word = next(word for word in ("the", "and", "you", "tool", "that") if len(encode(word)) == 1)
    ((found, _), (alone, _)) = Harness(subject, answers).loglikelihood(requests((word[:-1], word[-1]), ("", word)))
    assert len(encode(word[:-1])) == 1
    assert found == pytest.approx(alone) and found < 0


def test_empty_contexts_and_continuations(subject: Subject, answers: Answers) -> None:
    harness = Harness(subject, answers)
    ids = subject.tokenizer.encode("Hello there")
    start = "".join(text for text, number in subject.tokenizer.control_ids.items() if number == subject.start_id)
    found = harness.loglikelihood(
        requests(("", "Hello there"), ("", start + "Hello there"), ("", ""), ("Hello", ""), (" ", "Hello"))
    )
    expected = logprob(subject, [subject.start_id], ids)
    assert [found[0][0], found[1][0]] == pytest.approx([expected] * 2, abs=1e-4)
    assert found[2] == found[3] == (0.0, True)
    assert math.isfinite(found[4][0]) and found[4][0] < 0


def test_rolling_scores_each_token_of_a_long_text_once(tiny_checkpoint: TinyCheckpoint, answers: Answers) -> None:
    subject = load_subject(str(tiny_checkpoint(max_position_embeddings=96, original_max_position_embeddings=64)))
    text = "abcdefgh " * 40
    ids = subject.tokenizer.encode(text)
    assert 96 < len(ids) < 4 * 96
    with pytest.warns(UserWarning, match="windows"):
        found, none = Harness(subject, answers).loglikelihood_rolling(requests((text,), ("",)))
    whole, expected = [subject.start_id, *ids], 0.0
    for start in range(0, len(ids), 96):
        stop = min(start + 96, len(ids))
        run = whole[max(0, stop - 96) : stop + 1]  # the last window sees a full context
        expected += logprob(subject, run[: start - stop], ids[start:stop])
    assert found == pytest.approx(expected, abs=1e-3) and none == 0


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"max_tokens": 256}),
        ({"until": "\n", "max_gen_toks": 5}, {"stops": ("\n",), "max_tokens": 5}),
        ({"until": ["a", "", "a", "b"], "max_new_tokens": 5}, {"stops": ("a", "b"), "max_tokens": 5}),
        ({"until": None, "temperature": None, "max_tokens": 7}, {"max_tokens": 7}),
        ({"until": ("x",), "do_sample": False, "temperature": 0.7}, {"stops": ("x",), "max_tokens": 256}),
        ({"do_sample": True}, {"temp": 1.0, "max_tokens": 256}),
        ({"do_sample": True, "temperature": 0.0}, {"max_tokens": 256}),
        ({"temperature": 0.8, "top_p": 0.95}, {"temp": 0.8, "top_p": 0.95, "max_tokens": 256}),
    ],
)
def test_settings_of_a_task_are_honoured(
    subject: Subject,
    answers: Answers,
    settings: dict[str, Any],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Question] = []

    def ask(subject: Subject, questions: list[Question], *_: object) -> list[Answer]:
        asked.extend(questions)
        return [Answer("t", "c", "r", (), "stop", 1, 1) for _ in questions]

    monkeypatch.setattr(module, "ask", ask)
    harness = Harness(subject, answers, seed=5)
    assert harness.generate_until(requests(("Hi", settings), ("Hi", settings), ("Ho", settings))) == ["c"] * 3
    first = Question(asked[0].name, harness.tok_encode("Hi"), seed=5, **{"stops": (), **changes})
    assert asked[0] == first
    assert [question.seed for question in asked] == [5, 6, 5]  # a repeated question is drawn again
    assert [(request.args[0], answer.reasoning) for request, answer in harness.drawn] == [
        (t, "r") for t in ("Hi", "Hi", "Ho")
    ]


def test_options_take_the_place_of_a_tasks_settings(subject: Subject, answers: Answers) -> None:
    harness = Harness(subject, answers, max_tokens=3, temp=0.0)
    harness.generate_until(requests(("Hi", {"max_gen_toks": 50, "do_sample": True, "temperature": 1.0})))
    ((_, answer),) = harness.drawn
    assert answer.tokens <= 3
    assert len(answers) == 1


def test_settings_without_effect_are_named(subject: Subject, answers: Answers) -> None:
    with pytest.warns(UserWarning, match="no effect: num_beams, top_k"):
        Harness(subject, answers).generate_until(requests(("Hi", {"top_k": 5, "num_beams": 2, "max_gen_toks": 1})))


def test_a_chat_is_rendered_as_text_that_encodes_to_its_ids(subject: Subject, answers: Answers) -> None:
    harness = Harness(subject, answers)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 2 + 2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3 + 3?"},
    ]
    ids = subject.tokenizer.apply_chat_template(messages)
    assert harness.tok_encode(harness.apply_chat_template(messages)) == ids
    open_turn = harness.apply_chat_template(
        [*messages, {"role": "assistant", "content": "It"}], add_generation_prompt=False
    )
    assert open_turn == harness.apply_chat_template(messages) + "It"
    assert harness.chat_template(True) == "phi4-mini" and harness.chat_template(False) == ""
    assert harness.tokenizer_name == "a__demo"


def test_a_control_string_in_a_message_stays_text(subject: Subject, answers: Answers) -> None:
    harness, end = Harness(subject, answers), subject.tokenizer.control_ids["<|end|>"]
    messages = [{"role": "user", "content": "Say <|end|> now"}]
    ids = subject.tokenizer.apply_chat_template(messages)
    context = harness.apply_chat_template(messages)
    assert harness.tok_encode(context) == ids and ids.count(end) == 1
    more = subject.tokenizer.encode("It is")
    assert harness.tok_encode(context + "It is") == [*ids, *more]
    ((found, _),) = harness.loglikelihood(requests((context, "It is")))
    assert found == pytest.approx(logprob(subject, ids, more), abs=1e-4)
    harness.generate_until(requests((context, {"max_gen_toks": 1})))
    assert harness.drawn[0][1].prompt_tokens == len(ids)


def test_a_model_without_a_chat_format_is_refused_in_one_line(
    subject: Subject, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(subject.tokenizer, "chat_format")
    harness = Harness(subject, answers)
    with pytest.raises(RequestError, match="a/demo has no chat format"):
        harness.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match="a/demo has no chat format"):
        harness.chat_template(True)
    assert harness.loglikelihood(requests(("a", "b")))


def evaluated(harness: Harness, folder: Path, name: str, target: str, more: str, **options: Any) -> Any:
    """lm-eval's result of a task written on the spot."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    documents = [
        {
            "question": f"{a} + 1?",
            "choices": [f"{a + d}" for d in (0, 1, 2, 30)],
            "label": 1,
            "text": f"{a} is a number.",
        }
        for a in range(3, 9)
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, target=target, more=more))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluate(harness, manager.load([name]), bootstrap_iters=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "more", "metric", "count"),
    [
        ("letters", "label", CHOICES, "acc,none", 24),
        ("words", '"{{choices[label]}}"', WORDS, "exact_match,first", 18),
        ("texts", '"{{text}}"', TEXT, "word_perplexity,none", 6),
    ],
)
def test_lm_eval_runs_its_kinds_of_tasks(
    subject: Subject,
    tmp_path: Path,
    name: str,
    target: str,
    more: str,
    metric: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with Answers(tmp_path / "answers.jsonl") as answers:
        first = evaluated(Harness(subject, answers), tmp_path, name, target, more)
        assert len(answers) == count
    assert math.isfinite(first["results"][name][metric])
    with Answers(tmp_path / "answers.jsonl") as answers:
        again = evaluated(Harness(subject, answers), tmp_path, name, target, more)
        assert again["results"] == first["results"] and len(answers) == count
        if name == "letters":
            chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief."}
            evaluated(Harness(subject, answers), tmp_path, name, target, more, **chat)
            assert len(answers) == 2 * count


def test_a_missing_extra_is_one_line() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from phi4_mlx.errors import RequestError\n"
        "try:\n    import phi4_mlx.evaluation.harness\n"
        "except RequestError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "pip install 'lm-eval>=0.4.13'" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, phi4_mlx.evaluation.harness\nprint(sorted({'torch', 'transformers', 'mlx_lm'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
