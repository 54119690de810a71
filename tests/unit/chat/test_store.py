"""A conversation with a store: its beginning is found again by the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phi4_mlx.chat.__main__ import main as chat
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.chat.stored_caches import StoredCaches
from phi4_mlx.generation.cache_store.store import CacheStore, store_settings
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.server.__main__ import main as serve
from tests.conftest import make_tiny_model
from tests.kinds import MAKERS
from tests.stores import SOON_S, TOKENIZER, files

SYSTEM = "You are a careful teller of numbers and of names."
Begin = Callable[..., Conversation]


def opened(folder: Path, model: LanguageModel) -> CacheStore:
    settings = store_settings(str(folder), 2**30)
    assert settings is not None
    return settings.make_store(model, TOKENIZER, pytest.fail)


@pytest.fixture(params=MAKERS)
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Begin:
    """`begin()` -> a conversation with one model and one store."""
    model: LanguageModel = MAKERS[request.param](seed=2)

    def make(model: LanguageModel = model, **options: int) -> Conversation:
        store = opened(tmp_path / "s", model)
        cache_options = CacheOptions(**options)  # type: ignore[arg-type]  # of its integers
        return Conversation(model, TOKENIZER, SYSTEM, cache_options=cache_options, store=StoredCaches(store))  # type: ignore[arg-type]

    return make


def ask(conversation: Conversation, question: str, max_tokens: int = 5) -> int:
    """Asks, and returns the tokens that were cached before."""
    for _ in conversation.ask(question, DecodeOptions(max_tokens=max_tokens)):
        pass
    return conversation.usage.cached_tokens


def test_the_next_chat_finds_the_conversation(begin: Begin) -> None:
    first = begin()
    assert ask(first, "one question about numbers") == 0
    assert ask(first, "and another one") > 40
    first.close()
    second = begin()
    second.turns = first.turns[:1]
    assert ask(second, "and another one") >= 40
    assert second.turns[1].ids == first.turns[1].ids
    again = begin()
    again.turns = [*first.turns]
    assert ask(again, "a third") >= first.cache.offset - 1 > 80
    second.close()
    again.close()


def test_a_conversation_is_stored_while_it_goes_on(begin: Begin, tmp_path: Path) -> None:
    first = begin()
    ask(first, "one question about numbers")
    assert first.store.store is not None and first.store.store.flush(SOON_S)
    second = begin()  # the first has not ended
    second.turns = [*first.turns]
    assert ask(second, "another question") > 60
    ask(first, "and another one")
    assert first.store.store.gauges()["prefix_cache_disk_hits_total"] == 0  # it has its own cache
    first.close()
    second.close()
    assert len(files(tmp_path / "s")) >= 1


def test_switching_the_model_switches_the_store(tmp_path: Path) -> None:
    model, other = make_tiny_model(seed=1), make_tiny_model(seed=2)
    store = opened(tmp_path / "s", model)
    conversation = Conversation(model, TOKENIZER, SYSTEM, store=StoredCaches(store))  # type: ignore[arg-type]
    ask(conversation, "one question about numbers")
    conversation.switch(other, TOKENIZER)  # type: ignore[arg-type]
    assert len(files(tmp_path / "s")) == 1
    assert ask(conversation, "another") == 0
    conversation.switch(model, TOKENIZER)  # type: ignore[arg-type]
    assert len(files(tmp_path / "s")) == 2
    assert ask(conversation, "a third") > 40
    conversation.close()


def test_a_cache_that_has_dropped_tokens_is_not_stored(tmp_path: Path) -> None:
    model = make_tiny_model(seed=1)
    store = opened(tmp_path / "s", model)
    options = CacheOptions(max_kv_size=512)
    conversation = Conversation(model, TOKENIZER, SYSTEM, cache_options=options, store=StoredCaches(store))  # type: ignore[arg-type]
    ask(conversation, "long " * 130)
    assert not conversation.cache.is_trimmable()
    conversation.close()
    assert not files(tmp_path / "s")


@pytest.mark.parametrize("command", ["chat", "server"])
def test_a_folder_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    options = ["--model", "demo", "--prompt-cache-dir", str(tmp_path / "file")]
    code = chat([*options, "--prompt", "hello"]) if command == "chat" else serve([*options, "--port", "0"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and "exists and is not a folder; name another one" in lines[0]
