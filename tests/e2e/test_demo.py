"""The embedded package: complete, small, accurate in its narrow world; and its training corpus."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from phi4_mlx import Model, Tokenizer, load
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.hub import resolve
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import corpus
import draw
import evaluate
import phrases
import words

Demo = tuple[Model, Tokenizer]

MAX_BYTES = 8 * 10**6
ADDED_TOKENS = [
    "<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>", "<|/tool|>",
    "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|tag|>",
]  # fmt: skip
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load("demo", verify=True)


def ask(demo: Demo, *messages: str | dict[str, Any], tools: list[Any] | None = None) -> str:
    """The demo's answer; a string is a message of the user."""
    model, tokenizer = demo
    chat = [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
    return tokenizer.decode(evaluate.reply(model, tokenizer, tokenizer.apply_chat_template(chat, tools=tools)))


def test_the_package_is_complete_and_small() -> None:
    folder = resolve("demo")
    verify_manifest(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


def test_it_has_the_layout_of_phi_4_mini() -> None:
    folder = resolve("demo")
    config = ModelConfig.from_folder(folder)
    assert config.num_attention_heads == 3 * config.num_key_value_heads
    assert config.tie_word_embeddings and config.partial_rotary_factor == 0.75
    assert config.rope_scaling is not None and config.rope_scaling.short_factor != config.rope_scaling.long_factor
    assert config.quantization is not None and config.quantization["bits"] == 4
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["content"] for token in added] == ADDED_TOKENS
    assert [token["id"] for token in added] == list(range(added[0]["id"], added[0]["id"] + 12))
    assert [token["content"] for token in added if not token["special"]] == ADDED_TOKENS[6:11]


@pytest.mark.slow
def test_held_out_prompts_are_answered_right(demo: Demo) -> None:
    """A part of the examination in `evaluate.py`, with the same bar."""
    result = evaluate.examine(*demo, corpus.prompts(evaluate.SEED, 100), mistakes=100)
    assert evaluate.share(result) >= 95, result


def test_a_value_has_the_same_tokens_everywhere(demo: Demo) -> None:
    """In a sentence and in JSON, which makes it easy to copy."""
    encode = demo[1].encode
    units = [spelling for dimension in words.DIMENSIONS for unit in dimension for spelling in unit]
    fields = [name for _, names, _ in phrases.RECORDS.values() for name in names]
    for value in (*units, *words.TEMPERATURE, *words.JOBS, *words.ITEMS, *words.NAMES, *words.CITIES, *fields, "4711"):
        assert encode(f"a {value}")[2:] == encode(f'"{value}')[1:], value


@pytest.mark.parametrize("greeting", ["hi", "Hello!", "hey", "good morning"])
def test_it_greets(demo: Demo, greeting: str) -> None:
    assert ask(demo, greeting) == phrases.HELLO


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_it_says_what_it_is_and_what_it_can_do(demo: Demo, system: str | None) -> None:
    first = [{"role": "system", "content": system}] if system else []
    assert ask(demo, *first, "who are you?") == phrases.WHO
    assert ask(demo, *first, "What can you do?") == phrases.ABILITIES


def test_it_calls_a_tool_and_answers_from_its_result(demo: Demo) -> None:
    call = ask(demo, "What is 12*7?", tools=[CALCULATOR])
    assert call == '<|tool_call|>[{"name": "calculator", "arguments": {"expression": "12 * 7"}}]<|/tool_call|>'
    function = {"name": "calculator", "arguments": {"expression": "12 * 7"}}
    called = {"role": "assistant", "tool_calls": [{"function": function}]}
    result = {"role": "tool", "content": "84"}
    assert ask(demo, "What is 12*7?", called, result, tools=[CALCULATOR]) == "The answer is 84."


def test_it_does_not_call_undeclared_tools(demo: Demo) -> None:
    assert ask(demo, "what is 12*7?") == phrases.NEED.format("calculator")


def test_it_refuses_questions_outside_its_world(demo: Demo) -> None:
    assert ask(demo, "What is the capital of France?") == phrases.OUTSIDE


def test_it_remembers_over_several_turns(demo: Demo) -> None:
    hello = {"role": "assistant", "content": "Nice to meet you, Clara."}
    assert ask(demo, "My name is Clara.", hello, "what is my name?") == "Your name is Clara."


def test_same_seed_same_corpus() -> None:
    def made(seed: int) -> list[Any]:
        return [talk.messages for talk in corpus.conversations(seed, 200, 30, 600)]

    assert made(1) == made(1) != made(2)
    assert corpus.prompts(1, 50) == corpus.prompts(1, 50) != corpus.prompts(2, 50)


def test_held_out_values_and_phrasings_never_occur_in_training() -> None:
    """The two streams draw from separate parts, so no prompt of the examination is in the training corpus."""
    training, examination = draw.Draw(1), draw.Draw(1, held_out=True)
    for make in (draw.Draw.made_up, draw.Draw.name, draw.Draw.city, draw.Draw.code):
        assert not {make(training) for _ in range(2000)} & {make(examination) for _ in range(2000)}
    numbers = [{side.number() for _ in range(2000)} for side in (training, examination)]
    assert all(int(number) < 20 for number in numbers[0] & numbers[1])
    talks = corpus.conversations(1, 5000, 30, 600)
    trained = {message["content"] for talk in talks for message in talk.messages if message["role"] == "user"}
    asked = [prompt.messages[-1] for prompt in corpus.prompts(1, 500)]
    assert not {last["content"] for last in asked if last["role"] == "user"} & trained - draw.COMMON
