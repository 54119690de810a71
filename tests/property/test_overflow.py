"""Context overflow of any conversation at any limit: which turns stay, that they fit, how seldom the start moves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4_mlx.server.apis.wire import Ask, WireError
from phi4_mlx.server.service import Service
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.overflow import answer_room, keep_latest, split_turns
from phi4_mlx.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import DATA

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=60)
LIMITS = st.one_of(st.none(), st.integers(1, 5_000))
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}


class Conversation:
    """Turns of given lengths; each prompt is the numbers of its tokens after those of the system prompt."""

    def __init__(self, sizes: Sequence[int], base: int) -> None:
        ends = [*accumulate(sizes, initial=base)]
        self.turns = [range(start, end) for start, end in pairwise(ends)]
        self.base = base
        self.rendered: list[int] = []  # the length of each prompt that was rendered

    def render(self, turns: Sequence[range]) -> list[int]:
        ids = [*range(self.base), *chain.from_iterable(turns)]
        self.rendered.append(len(ids))
        return ids

    def keep(self, context: int, max_tokens: int | None, after: int = 0) -> tuple[list[int], int]:
        return keep_latest(self.turns, self.render, len, context, max_tokens, after)


@given(SIZES, st.integers(0, 600), st.integers(8, 5_000), LIMITS, st.integers(0, 300))
def test_whole_turns_fall_out_from_the_front_and_no_more_than_the_stride_asks(
    sizes: list[int], base: int, context: int, max_tokens: int | None, after: int
) -> None:
    talk = Conversation(sizes, base)
    prompt, dropped = talk.keep(context, max_tokens, after)
    assert prompt == [*range(base), *chain.from_iterable(talk.turns[dropped:])]
    assert 0 <= dropped < len(sizes)  # the last question stays
    assert len(talk.rendered) <= 2  # however many turns there are
    room = context - answer_room(context, max_tokens) - after
    alone = base + sizes[-1]
    assert len(prompt) <= room or dropped == len(sizes) - 1  # it fits, if anything does
    if base + sum(sizes) <= room:
        assert dropped == 0
    elif alone <= room:  # a stride is lost at most, and the rest of a turn
        assert len(prompt) + min(context // 4, (room + after - base) // 2) + max(sizes[:-1]) > room


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(0, 50), LIMITS)
def test_the_start_moves_seldom_and_only_forward(sizes: list[int], base: int, max_tokens: int | None) -> None:
    context = 800
    starts = [Conversation(sizes[: n + 1], base).keep(context, max_tokens)[1] for n in range(len(sizes))]
    assert starts == sorted(starts)
    moves = sum(before != after for before, after in pairwise(starts))
    room = context - answer_room(context, max_tokens) - base  # 350 or more
    stride = min(context / 4, room / 2) / 2  # or more
    assert moves <= sum(sizes[: starts[-1]]) / stride + 1
    assert moves < len(sizes) / 2 or len(sizes) < 4


def test_a_turn_that_just_fits_stays() -> None:
    talk = Conversation([64] * 4, 0)
    assert talk.keep(64 * 3 + 10, 10) == ([*range(64, 256)], 1)
    assert talk.keep(64 * 3 + 9, 10) == ([*range(128, 256)], 2)


@pytest.mark.parametrize(
    ("sizes", "dropped"),
    [
        ([10, 700, 10, 10, 265], 1),  # the long turn still fits
        ([10, 900, 10, 10, 200], 2),  # it does not, and those after it do
        ([10, 200, 10, 10, 10, 900], 2),  # so does what a long question leaves room for
        ([10, 950, 10, 10, 10, 970], 4),
        ([10, 950, 10, 10, 10, 1_010], 5),
    ],
)
def test_a_long_turn_falls_out_alone(sizes: list[int], dropped: int) -> None:
    assert Conversation(sizes, 0).keep(1_000, 10)[1] == dropped


def test_a_question_that_grows_only_drops_more() -> None:
    talk = Conversation([50] * 40, 20)
    starts = [talk.keep(1_000, 100, after)[1] for after in range(0, 900, 7)]
    assert starts == sorted(starts) and starts[-1] == 39


@pytest.mark.parametrize(
    ("context", "max_tokens", "room"),
    [(4096, None, 1024), (4096, 100, 100), (4096, 2048, 2048), (4096, 100_000, 2048), (131_072, 2048, 2048)],
)
def test_an_answer_has_room(context: int, max_tokens: int | None, room: int) -> None:
    assert answer_room(context, max_tokens) == room


FORMATS = {"phi4-mini": "tiny_tokenizer", "phi4-mini-reasoning": "tiny_tokenizer", "phi3.5-mini": "tiny_sentencepiece"}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """A tokenizer for each of these chat formats."""
    found = {name: load_tokenizer(DATA / folder) for name, folder in FORMATS.items()}
    for name, tokenizer in found.items():
        tokenizer.chat_format = CHAT_FORMATS[name]
    return found


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ANSWERS = st.builds(lambda text: [message("assistant", text)], TEXTS)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
CALLS = st.builds(lambda result, text: [CALL, message("tool", result), message("assistant", text)], TEXTS, TEXTS)


def turn(question: str, replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message("user", question), *replies]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[Any], list[list[Any]], list[Any]]:
    """(a chat format, system messages, turns, tools)"""
    name = draw(st.sampled_from(sorted(FORMATS)))
    replies = ANSWERS if name == "phi3.5-mini" else ANSWERS | CALLS
    turns = [*draw(st.lists(st.builds(turn, TEXTS, replies), max_size=20)), turn(draw(TEXTS), [])]
    system = draw(st.sampled_from([[], ["Be brief."], ["Be brief.", "Be kind."]]))
    tools = [] if name == "phi3.5-mini" else draw(st.sampled_from([[], [TOOL]]))
    return name, [message("system", each) for each in system], turns, tools


@given(conversations(), st.integers(1, 600), LIMITS)
def test_the_server_reads_what_a_new_conversation_of_the_kept_turns_would(
    tokenizers: dict[str, Tokenizer], talk: Any, context: int, max_tokens: int | None
) -> None:
    name, system, turns, tools = talk
    tokenizer = tokenizers[name]

    def prompt(first: int) -> list[int]:
        return tokenizer.apply_chat_template([*system, *chain.from_iterable(turns[first:])], tools or None)

    # The rule, from a whole prompt for each turn.
    lengths = [len(prompt(n)) for n in range(len(turns))]
    room = context - answer_room(context, max_tokens)
    before = [lengths[0] - length for length in lengths]
    most = min(context / 4, (room - (lengths[-1] - tokenizer.chat_format.length(tokenizer, turns[-1]))) / 2)
    expected = 0 if lengths[0] <= room else len(turns) - 1
    stride = 2 ** math.floor(math.log2(max(most, 1)))
    while expected == len(turns) - 1 > 0 and stride >= 1:
        after = [
            min((at for at in before if at >= multiple), default=-1)
            for multiple in range(stride, before[-1] + 1, stride)
        ]
        long = [at for at, end in pairwise(before) if end - at >= stride]
        found = [n for n in range(1, len(turns) - 1) if lengths[n] <= room and before[n] in (*after, *long)]
        expected, stride = (found or [expected])[0], stride // 2

    ask = Ask("m", messages=[*system, *chain.from_iterable(turns)], tools=tools, max_tokens=max_tokens)
    ask = replace(ask, tool_choice="auto" if tools else "none")
    service = Service(SimpleNamespace(longest=context, note=""), tokenizer, {}, 0, 60.0, overflow="oldest")  # type: ignore[arg-type]
    if lengths[expected] >= context:
        with pytest.raises(WireError, match=f"prompt is too long: {lengths[-1]} tokens > {context - 1} maximum"):
            asyncio.run(service.prompts(ask))
        return
    answered, prompts = asyncio.run(service.prompts(ask))
    assert answered == replace(ask, dropped=expected) and prompts == [prompt(expected)]


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=30))
def test_a_turn_goes_from_a_question_to_the_next(roles: list[str]) -> None:
    messages = [message(role, str(number)) for number, role in enumerate(roles)]
    head, turns = split_turns(messages)
    assert [*head, *chain.from_iterable(turns)] == messages
    assert all(each["role"] == "system" for each in head) and (not turns or turns[0][0]["role"] != "system")
    for number, each in enumerate(turns):
        kinds = [one["role"] for one in each]
        asked = kinds.count("user")
        assert asked == 1 or (asked == 0 and number == 0)  # messages before the first question
        if asked:
            assert set(kinds[: kinds.index("user")]) <= {"system"}
    assert all(each[-1]["role"] != "system" for each in turns[:-1])  # those belong to the next question
