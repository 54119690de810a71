"""The chat and the server past the end of the context, on the embedded model with a context of 512 tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from phi4_mlx import load
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.generation.options import DecodeOptions
from tests.conftest import ROOT
from tests.e2e.server_process import serving

CONTEXT = 512
OLDEST = ["--context-overflow", "oldest"]
LONG = [f"question {number}: " + "what is 12 * 31? " * 6 for number in range(18)]
# The RoPE boundary stays at 256 tokens. A first question over it falls out, and the others are under it.
CROSSING = ["hi", "lamps and ropes, " * 45, *["what are you?"] * 3, "ropes " * 30, "hello"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small") / "demo"
    shutil.copytree(ROOT / "phi4_mlx" / "demo", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return str(folder)


def chat(model: str, questions: Sequence[str], *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx.chat", "--model", model, "--max-tokens", "12", *options],
        input="\n".join(questions),
        capture_output=True,
        timeout=300,
        cwd="/",
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr
    return done


def asked(model: str, questions: Sequence[str]) -> tuple[Conversation, list[tuple[int, str]]]:
    """A conversation, and after each answer (turns left out, RoPE table).

    Every sixth answer, and the last one, is that of a new conversation of the turns that are left.
    """
    conversation = Conversation(*load(model), "Be kind.", overflow="oldest")
    states: list[tuple[int, str]] = []
    for number, question in enumerate(questions, 1):
        list(conversation.ask(question, DecodeOptions(max_tokens=12)))
        states.append((conversation.dropped, conversation.cache.regime))
        if number % 6 == 0 or number == len(questions):
            kept = conversation.turns[conversation.dropped : -1]
            fresh = Conversation(conversation.model, conversation.tokenizer, "Be kind.", turns=[*kept])
            list(fresh.ask(question, DecodeOptions(max_tokens=12)))
            assert conversation.turns[-1] == fresh.turns[-1] and conversation.cache.regime == fresh.cache.regime
    return conversation, states


def test_a_chat_of_three_contexts_goes_on_and_says_so_once(small: str) -> None:
    conversation, states = asked(small, LONG)
    assert len(conversation.prompt_ids("")) > 3 * CONTEXT and 8 < states[-1][0] < 18
    done = chat(small, LONG, "--system-prompt", "Be kind.", *OLDEST)
    assert done.stdout == "".join(f"{turn.answer}\n" for turn in conversation.turns)
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m phi4_mlx.chat: the context of 512 tokens is full: from now on the oldest turns ")


def test_by_default_it_ends_with_a_line_that_names_the_option(small: str) -> None:
    refused = chat(small, LONG, code=2)
    assert len(refused.stderr.splitlines()) == 1 and refused.stdout
    assert "takes back a turn; a chat started with --context-overflow oldest leaves out the oldest" in refused.stderr
    alone = chat(small, ["hi"], "--prompt", "hi", *OLDEST)
    assert alone.stderr == "python -m phi4_mlx.chat: --context-overflow has no effect with --prompt: one question\n"


def test_the_rope_table_follows_the_turns_that_are_left(small: str) -> None:
    conversation, states = asked(small, CROSSING)
    assert [table for _, table in states[:2]] == ["short", "long"]
    assert any(dropped and table == "short" for dropped, table in states)  # back under the short table
    done = chat(small, CROSSING, "--system-prompt", "Be kind.", *OLDEST)
    assert done.stdout == "".join(f"{turn.answer}\n" for turn in conversation.turns)


def test_the_server_answers_as_it_answers_the_kept_turns(small: str) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be kind."}]
    for question in LONG:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "That is 372."}]
    messages.append({"role": "user", "content": "hello"})
    with serving("--model", small, *OLDEST) as server:
        body = {"messages": messages, "max_tokens": 20, "temperature": 0}
        long = server.post("/v1/chat/completions", body)
        dropped = int(long.headers["x-phi4-ignored"].removesuffix(" oldest turns"))
        assert 8 < dropped < 18
        kept = [messages[0], *messages[1 + 2 * dropped :]]
        short = server.post("/v1/chat/completions", body | {"messages": kept})
        assert "x-phi4-ignored" not in short.headers
        assert long.json()["choices"] == short.json()["choices"]
        assert long.json()["usage"]["prompt_tokens"] == short.json()["usage"]["prompt_tokens"] <= CONTEXT - 20
    assert [line for line in server.lines if f'ignored="{dropped} oldest turns"' in line]
