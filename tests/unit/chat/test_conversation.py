"""Turns, ids and cache of a conversation, on a tiny model and a tokenizer of single characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.agent import Round
from phi4_mlx.chat.conversation import Conversation, Interrupted, Turn
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.toolbox import Toolbox
from tests.char_tokenizer import ASSISTANT, END, SYSTEM, USER, CharTokenizer


@pytest.fixture
def conversation(tiny_model: Callable[..., Any]) -> Conversation:
    return Conversation(tiny_model(original_max_position_embeddings=512), CharTokenizer())  # type: ignore[arg-type]


def ask(conversation: Conversation, question: str, max_tokens: int = 8, **options: Any) -> str:
    chosen = DecodeOptions(max_tokens=max_tokens, **options)
    return "".join(event.text for event in conversation.ask(question, chosen))


def encode(text: str) -> list[int]:
    return CharTokenizer().encode(text)


def test_a_prompt_is_the_turns_as_the_model_made_them(conversation: Conversation) -> None:
    conversation.system = "s"
    conversation.turns = [Turn("a", "irrelevant", (300, 301)), Turn("b", "too", (302,))]
    assert conversation.prompt_ids("c") == [
        SYSTEM, *encode("s"), END, USER, *encode("a"), END, ASSISTANT, 300, 301, END,
        USER, *encode("b"), END, ASSISTANT, 302, END,
        USER, *encode("c"), END, ASSISTANT,
    ]  # fmt: skip


def test_only_new_tokens_are_run(conversation: Conversation) -> None:
    ask(conversation, "hello")
    assert conversation.usage.cached_tokens == 0
    before = len(conversation.prompt_ids("")) - 3  # all but the next question's own frame
    ask(conversation, "and then?")
    usage = conversation.usage
    assert usage.prompt_tokens == len(conversation.prompt_ids("x")) - len(encode("x")) - 3 - 8 - 1
    assert usage.cached_tokens >= before - 2  # the reply's last token and its end mark were never run
    assert usage.prompt_tokens - usage.cached_tokens <= len(encode("and then?")) + 5


def test_a_kept_cache_answers_as_a_new_one(conversation: Conversation) -> None:
    ask(conversation, "hello")
    prompt = conversation.prompt_ids("again")
    expected = [token for token, _ in generate_step(prompt, conversation.model, max_tokens=8)]
    ask(conversation, "again")
    assert list(conversation.turns[-1].ids) == expected


@pytest.mark.parametrize("change", ["undo", "system", "reset", "retry"])
def test_what_was_changed_is_forgotten(conversation: Conversation, change: str) -> None:
    for question in ("one", "two", "three"):
        ask(conversation, question)
    if change == "undo":
        conversation.turns.pop()
    elif change == "system":
        conversation.system = "be brief"
    elif change == "reset":
        conversation.turns.clear()
    prompt = conversation.prompt_ids("four")
    expected = [token for token, _ in generate_step(prompt, conversation.model, max_tokens=8)]
    ask(conversation, "four")
    assert list(conversation.turns[-1].ids) == expected
    assert (conversation.usage.cached_tokens > 0) == (change in ("undo", "retry", "reset"))


def test_an_answer_left_early_is_a_turn(conversation: Conversation) -> None:
    events = conversation.ask("hello", DecodeOptions(max_tokens=50))
    tokens = [next(events).token for _ in range(3)]
    events.close()
    assert conversation.turns[-1].ids == tuple(tokens)
    assert conversation.prompt_ids("x")[-4:] == [USER, *encode("x"), END, ASSISTANT]
    assert conversation.prompt_ids("x")[-5] == END  # the cut reply was closed
    prompt = conversation.prompt_ids("next")
    expected = [token for token, _ in generate_step(prompt, conversation.model, max_tokens=8)]
    ask(conversation, "next")
    assert list(conversation.turns[-1].ids) == expected


def test_an_answer_stopped_while_reading_leaves_no_trace(conversation: Conversation) -> None:
    def progress(done: int, total: int) -> None:
        if done:
            raise Interrupted

    assert ask(conversation, "hello", prompt_progress_callback=progress) == ""
    assert conversation.turns == []
    prompt = conversation.prompt_ids("hello")
    expected = [token for token, _ in generate_step(prompt, conversation.model, max_tokens=8)]
    ask(conversation, "hello")
    assert list(conversation.turns[-1].ids) == expected


def test_an_exception_inside_the_model_costs_the_cache_and_not_the_turns(conversation: Conversation) -> None:
    ask(conversation, "hello")
    calls = 0

    def sampler(logprobs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return logprobs.argmax(axis=-1)

    with pytest.raises(KeyboardInterrupt):
        ask(conversation, "more", sampler=sampler)
    assert [turn.question for turn in conversation.turns] == ["hello", "more"]
    assert conversation.cache.offset == 0
    ask(conversation, "go on")


def test_the_end_mark_is_not_part_of_a_reply(conversation: Conversation) -> None:
    def sampler(logprobs: Any) -> Any:
        return logprobs.argmax(axis=-1) * 0 + END

    assert ask(conversation, "hello", sampler=sampler) == ""
    assert conversation.turns == [Turn("hello", "", ())]
    assert conversation.usage.finish_reason == "stop"


def test_an_empty_question_is_refused(conversation: Conversation) -> None:
    with pytest.raises(RequestError, match="the question is empty"):
        conversation.ask(" \n", DecodeOptions())


def test_a_full_context_says_so_and_offers_a_way_out(conversation: Conversation) -> None:
    context = conversation.context
    for length in (context, context + 1):  # no room, less than none; 3 tokens are the frame
        with pytest.raises(RequestError, match=rf"{length:,} tokens.*holds {context:,}; shorten"):
            conversation.ask("x" * (length - 3), DecodeOptions())
    ask(conversation, "x" * (context - 5), max_tokens=50)
    assert conversation.usage.answer_tokens == 2  # the room that was left
    with pytest.raises(RequestError, match="/reset"):
        ask(conversation, "more")
    conversation.turns.clear()
    ask(conversation, "more")


def test_a_crossing_of_the_rope_boundary_is_counted(tiny_model: Callable[..., Any]) -> None:
    conversation = Conversation(tiny_model(), CharTokenizer())  # type: ignore[arg-type]
    ask(conversation, "x" * 50, max_tokens=5)
    assert conversation.usage.reprefilled == 0
    assert conversation.cache.regime == "short"
    ask(conversation, "y", max_tokens=8)
    assert conversation.usage.reprefilled > 50
    assert conversation.cache.regime == "long"
    ask(conversation, "z")
    assert conversation.usage.reprefilled == 0


def test_another_model_goes_on_with_the_words(conversation: Conversation, tiny_model: Callable[..., Any]) -> None:
    ask(conversation, "hello")
    conversation.turns[0] = Turn("hello", "hi", (300, 301))
    conversation.switch(tiny_model(seed=1), CharTokenizer())  # type: ignore[arg-type]
    assert conversation.turns[0].ids == tuple(encode("hi"))
    ask(conversation, "again")
    assert conversation.usage.cached_tokens == 0


def test_calls_and_their_results_are_part_of_the_prompt(
    conversation: Conversation, tiny_model: Callable[..., Any]
) -> None:
    call = ToolCall("add", {"a": 1})
    conversation.turns = [Turn("q", "irrelevant", (300,), (Round("so", [301, 302], [call], ["3"]),))]
    middle = [END, SYSTEM, *encode("3"), END, ASSISTANT]  # CharFormat has two roles
    assert conversation.ids() == [USER, *encode("q"), END, ASSISTANT, 301, 302, *middle, 300]
    conversation.switch(tiny_model(seed=1), CharTokenizer())  # type: ignore[arg-type]
    written = encode('so<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>')
    assert conversation.ids() == [USER, *encode("q"), END, ASSISTANT, *written, *middle, *encode("irrelevant")]


def test_a_long_result_can_be_stopped_while_it_is_read(conversation: Conversation) -> None:
    def page(x: int) -> str:
        """A page."""
        return "y" * x

    conversation.toolbox = Toolbox([page], strict=False)
    tokens = [*encode('functools[{"name": "page", "arguments": {"x": 200}}]'), END, END]

    def progress(done: int, total: int) -> None:
        if total > 150 and done:
            raise Interrupted

    options = DecodeOptions(
        max_tokens=100,
        sampler=lambda logprobs: mx.array([tokens.pop(0)]),
        prefill_step_size=32,
        prompt_progress_callback=progress,
    )
    events = list(conversation.ask("q", options))
    assert [type(event).__name__ for event in events[-2:]] == ["ToolCall", "ToolResult"]
    (turn,) = conversation.turns
    assert turn.answer == "" and turn.rounds[0].results == ["y" * 200]
    prompt = conversation.prompt_ids("next")
    expected = [token for token, _ in generate_step(prompt, conversation.model, max_tokens=8)]
    ask(conversation, "next")
    assert list(conversation.turns[-1].ids) == expected
