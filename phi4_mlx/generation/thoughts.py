"""The thoughts that a reasoning model writes before its answer, `<think>...</think>`, separated as they stream."""

from __future__ import annotations

import enum
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Part(NamedTuple):
    """The next piece of the thoughts, and the next piece of the answer after them."""

    thought: str = ""
    answer: str = ""


class _State(enum.Enum):
    START = enum.auto()  # only white space and a beginning of the tag so far
    THOUGHT = enum.auto()
    AFTER = enum.auto()  # white space between the thoughts and the answer
    ANSWER = enum.auto()


class ThoughtSplitter:
    """Separates the thoughts at the start of an answer; the result does not depend on how the text is cut into pieces.

    An answer that begins with anything but `<think>` has no thoughts, and tags further on are text. White space around
    the thoughts is dropped. Thoughts that are never closed last to the end. Text that may be part of a tag is withheld.
    """

    def __init__(self) -> None:
        self._state = _State.START
        self._before: list[str] = []  # everything before the answer
        self._space: list[str] = []  # white space that may be dropped
        self._tail = ""  # withheld: the beginning of a tag
        self._begun = False  # thoughts have been returned

    @property
    def head(self) -> str:
        """The text before the answer so far, with the tags."""
        return "".join(self._before)

    def add(self, text: str) -> Part:
        """Reads the next piece of the answer."""
        if self._state is _State.ANSWER or not text:
            return Part(answer=text)
        self._before.append(text)
        part = self._read(text)
        if part.answer:  # its first piece was appended with the text before it
            head = self.head
            self._before = [head[: len(head) - len(part.answer)]]
        return part

    def finish(self) -> Part:
        """Ends the answer; returns the text that was withheld."""
        state, self._state = self._state, _State.ANSWER
        if state is _State.START:
            whole, self._before = self.head, []
            return Part(answer=whole)
        return Part(thought=self._shown(self._tail) if state is _State.THOUGHT else "")

    def _read(self, text: str) -> Part:
        if self._state is _State.START:
            start = (self._tail + text).lstrip()
            if start != OPEN and OPEN.startswith(start):
                self._tail = start
                return Part()
            if not start.startswith(OPEN):
                self._state = _State.ANSWER
                return Part(answer=self.head)
            self._state, self._tail, text = _State.THOUGHT, "", start[len(OPEN) :]
        thought = ""
        if self._state is _State.THOUGHT:
            text, self._tail = self._tail + text, ""
            inside, closed, text = text.partition(CLOSE)
            if not closed:
                inside, self._tail = _before_tag(inside)
                return Part(self._shown(inside))
            thought, self._state = self._shown(inside), _State.AFTER
        answer = text.lstrip()
        if answer:
            self._state = _State.ANSWER
        return Part(thought, answer)

    def _shown(self, text: str) -> str:
        """The text of the thoughts without white space at their start, and at their end until more follows."""
        if not self._begun:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._space += [text] if self._begun else []
            return ""
        shown = "".join(self._space) + body
        self._begun, self._space = True, [text[len(body) :]]
        return shown


def _before_tag(text: str) -> tuple[str, str]:
    """Splits off the beginning of a closing tag at the end of a text; returns both parts."""
    for length in range(min(len(text), len(CLOSE) - 1), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return text[:-length], text[-length:]
    return text, ""
