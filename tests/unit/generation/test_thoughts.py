"""Thoughts apart from the answer, however the text is cut into pieces."""

from __future__ import annotations

import random

import pytest

from phi4_mlx.generation.answer import AnswerAssembler
from phi4_mlx.generation.thoughts import ThoughtSplitter

CALL = '[{"name": "add", "arguments": {"a": 1}}]'
CASES = [
    ("<think>a</think>b", "a", "b"),
    ("<think>\n17 + 4 = 21\n</think>\n\nIt is $\\boxed{21}$.\n", "17 + 4 = 21", "It is $\\boxed{21}$.\n"),
    ("\n <think> a \n\n b </think> \n c", "a \n\n b", "c"),
    ("<think>never closed", "never closed", ""),
    ("<think>\nnever closed \n", "never closed", ""),
    ("<think>cut in the tag </thi", "cut in the tag </thi", ""),
    ("<think>a</think>", "a", ""),
    ("<think>a</think>\n\n", "a", ""),
    ("<think></think>b", "", "b"),
    ("<think> \n </think>\nb", "", "b"),
    ("<think>", "", ""),
    ("<thi", "", "<thi"),
    ("  \n", "", "  \n"),
    ("", "", ""),
    ("  no thoughts ", "", "  no thoughts "),
    ("<thinking>a</thinking>b", "", "<thinking>a</thinking>b"),
    ("a</think>b", "", "a</think>b"),  # text already shown does not become a thought
    ("</think>b", "", "</think>b"),
    ("b <think>c</think>", "", "b <think>c</think>"),
    ("<think>a</think>b <think>c</think> d", "a", "b <think>c</think> d"),
    ("<think>a <think> b</think>c", "a <think> b", "c"),
    ("<think>if x </t or x </think", "if x </t or x </think", ""),
    ("<think>1 < 2 <<</think>yes", "1 < 2 <<", "yes"),
]


def split(pieces: list[str]) -> tuple[str, str, str]:
    splitter = ThoughtSplitter()
    parts = [*map(splitter.add, pieces), splitter.finish()]
    return "".join(part.thought for part in parts), "".join(part.answer for part in parts), splitter.head


@pytest.mark.parametrize(("text", "thought", "answer"), CASES)
def test_the_pieces_do_not_matter(text: str, thought: str, answer: str) -> None:
    draw = random.Random(0)
    for pieces in ([text], list(text), *([text[:n], text[n:]] for n in range(1, len(text)))):
        assert split(pieces) == (thought, answer, text[: len(text) - len(answer)])
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text) + 1), k=4))
        assert split([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])[:2] == (thought, answer)


def test_thoughts_and_the_answer_come_at_once() -> None:
    """Nothing but white space and what may be a tag waits for the next piece."""
    splitter = ThoughtSplitter()
    assert splitter.add("<think>one") == ("one", "") and splitter.add(" two <") == (" two", "")
    assert splitter.add(" three</think> It") == (" < three", "It") and splitter.add(" is <") == ("", " is <")


@pytest.mark.parametrize("markup", [CALL, f"<|tool_call|>{CALL}<|/tool_call|>"])
def test_calls_follow_thoughts_and_are_none_in_them(markup: str) -> None:
    text = f"<think>I could write {markup}.</think>\n\n{markup}"
    answer = AnswerAssembler(["add"], thinks=True)
    shown = "".join(map(answer.add, text)) + answer.add("", "stop")
    assert shown == answer.text == "" and answer.thought == f"I could write {markup}."
    assert [call.name for call in answer.calls] == ["add"] and answer.complaint is None
    assert answer.reply == f"<think>I could write {markup}.</think>\n\n"


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(("text", "thought", "said"), CASES)
def test_an_assembled_reply_is_what_the_model_wrote(text: str, thought: str, said: str, thinks: bool) -> None:
    answer = AnswerAssembler((), thinks=thinks)
    thoughts = []
    for char in text:
        answer.add(char)
        thoughts.append(answer.new_thought())
    answer.finish()
    assert "".join(thoughts) + answer.new_thought() == answer.thought == (thought if thinks else "")
    assert answer.text == (said if thinks else text) and answer.reply == text
