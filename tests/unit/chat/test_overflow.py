"""A chat past the end of its context: it is refused, or goes on without its oldest turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.chat import conversation as conversation_module
from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.chat.session import Chat
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import ContextPlan, plan_context
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.tools.toolbox import Toolbox
from tests.char_tokenizer import ASSISTANT, END, SYSTEM, USER, CharTokenizer
from tests.unit.chat.scripted import Script, questions, shown

CONTEXT = 1024


def make(model: Any, **options: Any) -> Conversation:
    options = {"overflow": "oldest", **options}
    return Conversation(model, CharTokenizer(), **options)  # type: ignore[arg-type]


@pytest.fixture
def conversation(tiny_model: Callable[..., Any]) -> Conversation:
    return make(tiny_model(original_max_position_embeddings=512), system="be brief")


def ask(conversation: Conversation, question: str, max_tokens: int = 8, **options: Any) -> list[int]:
    """The tokens of an answer."""
    list(conversation.ask(question, DecodeOptions(max_tokens=max_tokens, **options)))
    return [*conversation.turns[-1].ids]


def encode(text: str) -> list[int]:
    return CharTokenizer().encode(text)


def fresh(conversation: Conversation, question: str, max_tokens: int = 8) -> list[int]:
    """The answer in a new conversation of the turns that were kept for the last question."""
    kept = make(conversation.model, system=conversation.system, overflow="stop", toolbox=conversation.toolbox)
    kept.turns = conversation.turns[conversation.dropped : -1]
    return ask(kept, question, max_tokens)


@pytest.mark.slow
def test_a_chat_of_three_contexts_goes_on_as_a_new_one_of_the_kept_turns(conversation: Conversation) -> None:
    asked, served = 0, 0
    read: list[int] = []
    while asked < 3 * CONTEXT:
        question = f"question {len(conversation.turns)} {'x' * 80}"
        answer = ask(conversation, question)
        asked += len(question) + len(answer) + 4
        if len(conversation.turns) % 7 == 0 or conversation.dropped not in read:  # others take as long
            assert answer == fresh(conversation, question)
        read.append(conversation.dropped)
        served += conversation.usage.cached_tokens > conversation.usage.prompt_tokens / 2
        assert conversation.usage.prompt_tokens + 8 <= CONTEXT
    assert len(read) == len(conversation.turns) >= 30 and conversation.turns[0].question.startswith("question 0 ")
    assert read == sorted(read) and 5 < len(set(read)) < len(read) / 2  # several turns at a time
    assert conversation.ids()[:11] == [SYSTEM, *encode("be brief"), END, USER]
    assert served > len(read) / 2  # between two moves of the start, the cache serves


def test_by_default_a_full_context_refuses_and_names_the_way_on(conversation: Conversation) -> None:
    conversation.overflow = "stop"
    way_on = "--context-overflow oldest leaves out the oldest turns"
    with pytest.raises(RequestError, match=r"holds 1,024; shorten the question$"):  # no turn is there
        ask(conversation, "x" * CONTEXT)
    ask(conversation, "x" * 900)
    with pytest.raises(RequestError, match=f"would be 1,0.. tokens long, .* holds 1,024; /reset .* {way_on}$"):
        ask(conversation, "y" * 100)
    conversation.overflow = "oldest"
    ask(conversation, "y" * 100)
    assert conversation.dropped == 1


def test_a_question_that_fits_no_context_is_refused_by_its_own_length(conversation: Conversation) -> None:
    for question in ("one", "two", "x" * 800):
        ask(conversation, question)
    ids, turns = conversation.ids(), [*conversation.turns]
    length = len("be brief") + 2 + CONTEXT + 3
    for _ in range(2):
        with pytest.raises(RequestError, match=f"without any earlier turn, the prompt is still {length:,} tokens"):
            ask(conversation, "x" * CONTEXT)
        assert conversation.turns == turns and conversation.ids() == ids
    ask(conversation, "x" * (CONTEXT - 16), max_tokens=50)  # all but 3 tokens
    assert conversation.usage.answer_tokens == 3 and conversation.dropped == 3


def test_an_answer_has_the_room_it_asks_for_up_to_half_of_the_context(conversation: Conversation) -> None:
    for _ in range(12):
        ask(conversation, "x" * 70)
    assert conversation.dropped == 0
    ask(conversation, "y", max_tokens=400)
    assert conversation.usage.answer_tokens == 400 and 0 < conversation.dropped < 12
    conversation.turns.pop()
    ask(conversation, "y", max_tokens=1_000)
    assert conversation.usage.answer_tokens >= CONTEXT // 2 and conversation.dropped < 12


def test_turns_taken_back_bring_older_ones_into_the_prompt(conversation: Conversation) -> None:
    for _ in range(20):
        ask(conversation, "x" * 70)
    dropped = conversation.dropped
    assert dropped > 5
    del conversation.turns[10:]
    assert ask(conversation, "y") == fresh(conversation, "y") and conversation.dropped == 0
    assert conversation.usage.prompt_tokens == len(conversation.prompt_ids("")) - 8 - 4


def test_what_is_left_comes_back_under_the_short_rope_table(tiny_model: Callable[..., Any]) -> None:
    conversation = make(tiny_model(original_max_position_embeddings=256))
    ask(conversation, "x" * 900)
    assert conversation.cache.regime == "long"
    assert ask(conversation, "y" * 110) == fresh(conversation, "y" * 110)
    assert conversation.dropped == 1 and conversation.cache.regime == "short"


def test_results_of_tools_push_out_older_turns(conversation: Conversation) -> None:
    def page(x: int) -> str:
        """A page."""
        return "z" * x

    for _ in range(8):
        ask(conversation, "x" * 70)
    conversation.toolbox = Toolbox([page], strict=False)
    tokens = [*encode('functools[{"name": "page", "arguments": {"x": 300}}]'), END, END]

    def sampler(logprobs: mx.array) -> mx.array:
        return mx.array([tokens.pop(0)]) if tokens else logprobs.argmax(axis=-1)

    answer = ask(conversation, "q", max_tokens=100, sampler=sampler)
    turn = conversation.turns[-1]
    assert turn.rounds[0].results == ["z" * 300] and len(answer) == 100 and conversation.dropped > 0
    kept = Conversation(conversation.model, conversation.tokenizer, "be brief", conversation.toolbox)
    kept.turns = [*conversation.turns[conversation.dropped : -1], replace(turn, answer="", ids=())]
    prompt = kept.ids()
    assert conversation.usage.prompt_tokens == len(prompt) <= CONTEXT - 100
    assert answer == [token for token, _ in generate_step(prompt, conversation.model, max_tokens=100)]


def test_a_result_too_long_for_the_context_ends_the_turn(conversation: Conversation) -> None:
    def page(x: int) -> str:
        """A page."""
        return "z" * x

    ask(conversation, "x" * 70)
    conversation.toolbox = Toolbox([page], strict=False)
    tokens = [*encode('functools[{"name": "page", "arguments": {"x": 2000}}]'), END, END]
    ask(conversation, "q", max_tokens=100, sampler=lambda logprobs: mx.array([tokens.pop(0)]))
    assert conversation.usage.finish_reason == "length" and conversation.turns[-1].answer == ""
    with pytest.raises(RequestError, match=r"/reset .* oldest turns"):
        conversation.overflow = "stop"
        ask(conversation, "next")
    conversation.overflow = "oldest"
    ask(conversation, "next")
    assert conversation.dropped == 2


def test_a_bounded_cache_goes_on_too(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(original_max_position_embeddings=512)
    conversation = make(model, cache_options=CacheOptions(max_kv_size=512))
    for _ in range(15):
        ask(conversation, "x" * 70)
    assert conversation.dropped > 0
    again = make(model, cache_options=CacheOptions(max_kv_size=512))
    again.turns = conversation.turns[:-1]
    assert ask(again, "x" * 70) == [*conversation.turns[-1].ids]


def test_the_end_of_the_memory_is_an_end_of_the_context(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(*given: Any) -> ContextPlan:
        plan = plan_context(*given)
        return replace(plan, limit_bytes=plan.peak_bytes(500))

    monkeypatch.setattr(conversation_module, "plan_context", small)
    for _ in range(10):
        ask(conversation, "x" * 70)
        assert conversation.usage.prompt_tokens <= 500 - 8
    conversation.overflow = "stop"
    with pytest.raises(RequestError, match="this machine allows"):
        ask(conversation, "x" * 70)


@pytest.fixture
def rolling(new_chat: Callable[..., Chat]) -> Chat:
    chat = new_chat()
    chat.conversation.overflow = "oldest"
    return chat


FULL = "the context of 1,024 tokens is full: from now on the oldest turns are left out of the prompt, {} of {} so far"


def test_the_chat_says_once_that_turns_are_left_out(rolling: Chat, script: Script, tmp_path: Path) -> None:
    chat = rolling
    said = []
    for number in range(30):
        chat.answer(f"{number:02} {'x' * 77}")
        said.append("is full" in shown(chat))
    assert said.count(True) == 1 and said.index(True) == 10
    notes = chat.screen.notes  # type: ignore[attr-defined]
    assert FULL.format(3, 11) in notes

    obey(chat, "/stats")
    dropped = chat.conversation.dropped
    assert f"in {30 - dropped} turns, without the oldest {dropped}\n" in shown(chat)

    obey(chat, "/save talk")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert len(messages) == 60 and messages[0]["content"].startswith("00 ")

    obey(chat, f"/undo {30 - dropped}")  # more turns come back than fit
    shown(chat)
    obey(chat, "/stats")
    assert f"in {dropped} turns; the next question leaves out the oldest\n" in shown(chat)
    obey(chat, f"/undo {dropped - 5}")
    shown(chat)
    obey(chat, "/stats")
    assert "in 5 turns\n" in shown(chat)
    chat.answer("short again")
    assert len(questions(chat)) == 6 and chat.conversation.dropped == 0
    obey(chat, "/load talk")
    chat.answer("one more")
    assert notes.count(FULL.format(dropped, 31)) == 1


def test_a_saved_chat_goes_on_with_the_cache_of_the_turns_it_kept(
    rolling: Chat, new_chat: Callable[..., Chat], tmp_path: Path
) -> None:
    rolling.set("max-tokens", 8)
    for number in range(12):
        rolling.answer(f"{number:02} {'x' * 77}")
    obey(rolling, "/save talk")
    chat = new_chat()
    chat.conversation.overflow = "oldest"
    chat.set("max-tokens", 8)
    for _ in range(2):  # saved again unchanged, the cache is still whole
        obey(chat, "/load talk")
        assert chat.conversation.dropped == rolling.conversation.dropped > 0
        obey(chat, "/save talk")
    rolling.answer("and then?")
    chat.answer("and then?")
    assert chat.conversation.turns[-1] == rolling.conversation.turns[-1]
    assert chat.conversation.usage.cached_tokens == rolling.conversation.usage.cached_tokens > 300


def test_without_a_person_the_line_goes_where_the_caller_says(new_chat: Callable[..., Chat], script: Script) -> None:
    lines: list[str] = []
    first = new_chat()
    first.conversation.overflow = "oldest"
    chat = Chat(first.screen, first.conversation, "demo", first.settings, person=False, warn=lines.append)
    for _ in range(20):
        chat.answer("x" * 80)
    assert lines == [FULL.format(3, 11)] and "is full" not in shown(chat)


def test_a_cut_at_the_end_of_the_context_is_no_fault_of_max_tokens(
    new_chat: Callable[..., Chat], script: Script
) -> None:
    chat, script.finish_reason, script.replies = new_chat(max_tokens=2_000), "length", ["a" * 421, "a" * 421]
    chat.answer("x" * 600)
    assert "cut at 421 tokens, the end of the context of 1,024; /undo and /reset make room; a" in shown(chat)
    chat.conversation.overflow = "oldest"
    chat.answer("y" * 600)
    text = shown(chat)
    assert "cut at 421 tokens, the end of the context of 1,024; the next question makes room" in text
    chat.set("max-tokens", 5)
    chat.answer("z")  # the script's reply
    assert "cut at 5 tokens; /set max-tokens N changes the limit" in shown(chat)


def test_the_prompt_ends_with_the_question(conversation: Conversation) -> None:
    for _ in range(20):
        ask(conversation, "x" * 70)
    tail = conversation.ids()[-len(encode("x" * 70)) - 11 : -8]
    assert tail == [USER, *encode("x" * 70), END, ASSISTANT]
