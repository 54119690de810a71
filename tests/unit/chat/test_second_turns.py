"""Later turns run only what is new, whatever was undone or stopped before: tokens through the model are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.chat.commands import obey
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.chat.session import Chat
from phi4_mlx.checkpoint import load
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import LanguageModel
from tests.kinds import WRITERS
from tests.model_runs import close
from tests.tiny_sambay import write_tiny_sambay
from tests.unit.chat.scripted import Recorder

pytestmark = pytest.mark.slow

LONG = "The quick brown fox jumps over the lazy dog. " * 24  # some 300 tokens, many windows of 16
ANSWER = 12  # tokens


@pytest.fixture(scope="module", params=WRITERS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any]:
    return load(WRITERS[request.param](tmp_path_factory.mktemp("turns") / request.param))


@pytest.fixture
def ran(loaded: tuple[LanguageModel, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The length of each pass of the model."""
    lengths: list[int] = []
    kind = type(loaded[0])
    hidden = kind.hidden

    def counted(self: Any, ids: mx.array, *rest: Any, **more: Any) -> mx.array:
        lengths.append(ids.shape[1])
        return hidden(self, ids, *rest, **more)

    monkeypatch.setattr(kind, "hidden", counted)
    yield lengths


@pytest.fixture
def chat(loaded: tuple[LanguageModel, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(tmp_path)
    settings = {"temp": 0, "max-tokens": ANSWER}
    return Chat(Recorder(), Conversation(*loaded, system=LONG), "tiny", settings, person=True)


def fresh(chat: Chat, turns: int) -> tuple[int, ...]:
    """The answer of a new conversation with the same turns to the last question of the chat."""
    conversation = chat.conversation
    other = Conversation(conversation.model, conversation.tokenizer, conversation.system)
    other.turns = conversation.turns[: turns - 1]
    for _ in other.ask(conversation.turns[turns - 1].question, DecodeOptions(max_tokens=ANSWER)):
        pass
    return other.turns[-1].ids


def asked(chat: Chat, question: str, ran: list[int]) -> int:
    """Asks, checks the answer against that of a new conversation, and returns the tokens that were prefilled."""
    ran.clear()
    obey(chat, question) if question.startswith("/") else chat.answer(question)
    prefilled = sum(ran) - chat.conversation.usage.answer_tokens
    usage = chat.conversation.usage
    assert usage.prompt_tokens - usage.cached_tokens in (prefilled, prefilled + 1)  # the last token may not be run
    assert chat.conversation.turns[-1].ids == fresh(chat, len(chat.conversation.turns))
    return prefilled


def test_turns_undo_and_retry_run_what_is_new(chat: Chat, ran: list[int]) -> None:
    cold = asked(chat, "first question", ran)
    assert cold > 250
    few = 0.1 * cold
    assert asked(chat, "second question", ran) < few
    assert asked(chat, "third question", ran) < few
    assert asked(chat, "/retry", ran) <= 2  # the whole prompt has been run before
    obey(chat, "/undo")
    assert asked(chat, "third again", ran) < few
    obey(chat, "/undo 2")
    assert asked(chat, "second again", ran) < few
    chat.set("temp", 0.9)
    chat.answer("random answer")
    obey(chat, "/retry")
    chat.set("temp", 0)
    assert asked(chat, "after a random one", ran) < few
    obey(chat, "/system another one")
    assert asked(chat, "after another system prompt", ran) < cold
    obey(chat, "/reset")
    assert asked(chat, "first question", ran) < few


@pytest.mark.parametrize("drawn", [1, 2, 7])
def test_a_stopped_answer_costs_its_own_tokens_again(drawn: int, chat: Chat, ran: list[int]) -> None:
    cold, conversation = asked(chat, "first question", ran), chat.conversation
    events = conversation.ask("second question", DecodeOptions(max_tokens=ANSWER))
    for _ in islice(events, drawn):
        pass
    events.close()
    assert len(conversation.turns) == 2 and len(conversation.turns[1].ids) == drawn
    assert asked(chat, "third question", ran) < 0.1 * cold + drawn
    obey(chat, "/undo 2")
    assert asked(chat, "second question", ran) <= 2


def test_a_loaded_conversation_goes_on_from_its_prompt_cache(chat: Chat, ran: list[int]) -> None:
    cold = asked(chat, "first question", ran)
    asked(chat, "second question", ran)
    obey(chat, "/save kept")
    obey(chat, "/reset")
    obey(chat, "/load kept")
    assert asked(chat, "third question", ran) < 0.1 * cold
    obey(chat, "/load kept")
    chat.conversation.forget_cache()
    assert asked(chat, "third question", ran) > cold
    obey(chat, "/load kept")
    obey(chat, "/undo")
    asked(chat, "second again", ran)


def test_rolling_turns_are_answered_as_by_a_new_conversation(chat: Chat, ran: list[int]) -> None:
    chat.conversation.overflow, chat.conversation.system = "oldest", "be brief"
    dropped = 0
    while not (dropped and chat.conversation.dropped > dropped):
        chat.answer("The quick brown fox jumps over the lazy dog. " * 8)
        dropped = dropped or chat.conversation.dropped
        conversation = chat.conversation
        assert conversation.usage.prompt_tokens + ANSWER <= conversation.context
    other = Conversation(conversation.model, conversation.tokenizer, conversation.system)
    other.turns = conversation.turns[conversation.dropped : -1]
    for _ in other.ask(conversation.turns[-1].question, DecodeOptions(max_tokens=ANSWER)):
        pass
    assert other.turns[-1].ids == conversation.turns[-1].ids


def test_a_model_that_refuses_the_cache_does_not_take_over(
    tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flash, before = load(write_tiny_sambay(tmp_path / "flash")), tiny_model(hidden_size=192)
    conversation = Conversation(before, flash[1], cache_options=CacheOptions(None, 4))
    chat = Chat(Recorder(), conversation, "tiny", {"temp": 0}, person=True)
    monkeypatch.setattr("phi4_mlx.chat.session.load_shown", lambda *_: flash)
    with pytest.raises(RequestError, match=r"kv_bits does not apply to this model: .* leave out --kv-bits"):
        obey(chat, "/model flash")
    assert chat.conversation.model is before and chat.model_name == "tiny"
    chat.set("max-tokens", 3)
    chat.answer("hello")
    assert len(chat.conversation.turns[0].ids) <= 3


@pytest.mark.parametrize("length", [64, 65, 300])
def test_the_logits_behind_a_kept_prefix_are_those_of_the_whole(
    length: int, loaded: tuple[LanguageModel, Any]
) -> None:
    model, _ = loaded
    ids = [3 + n * 7 % 500 for n in range(length)]
    cache = model.make_cache()
    list(generate_step(ids, model, max_tokens=5, cache=cache, prefill_step_size=64))
    for prompt in ([*ids, 9, 8, 7], [*ids[:-1], 9], [*ids[: length // 2], 4, 5]):
        rest = cache.fork(cache.reusable(length)).reuse(prompt)
        twin = cache.fork(cache.reusable(length))
        assert twin.reuse(prompt) == rest
        assert close(model(mx.array([rest]), twin)[:, -1], model(mx.array([prompt]))[:, -1])
