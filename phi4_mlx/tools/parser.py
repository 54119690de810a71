"""A streaming parser that separates the tool calls in an answer from its text.

The model was trained to write `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`. It also leaves out the
brackets or the closing tag, and prompts of other stacks make it write `functools[...]`, `[TOOL_REQUEST]{...}`, or plain
or fenced JSON. One scanner reads all of these, each character once. A block that breaks off, or does not call a
declared tool, becomes text as a whole; nothing inside it is read as a call.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.calls import NotACall, ToolCall, parse_calls
from phi4_mlx.tools.declarations import flat_tool
from phi4_mlx.tools.json_text import JsonScanner
from phi4_mlx.tools.markup import BARE, FENCED, FENCES, FUNCTOOLS, MARKED, REQUEST, TAGGED, Form

_MARKER = re.compile("|".join(map(re.escape, MARKED)))
_LONGEST_MARKER = max(map(len, MARKED))
_MARKER_STARTS = {opener[:n] for opener in MARKED for n in range(1, len(opener))}
_MARKER_START = re.compile(rf"(?:{'|'.join(map(re.escape, _MARKER_STARTS))})\Z")
_SPACES = re.compile(r"\s*")


class _State(enum.Enum):
    """The part of the answer that the next character belongs to."""

    START = enum.auto()  # white space at the start, up to the character that decides if the answer may be one call
    TEXT = enum.auto()
    BEFORE_VALUE = enum.auto()  # inside a block, after the opener or a comma
    VALUE = enum.auto()
    AFTER_VALUE = enum.auto()  # a comma, the closer, or the end of the block
    AFTER_FENCE = enum.auto()  # only white space, or the block is text
    AFTER_BLOCK = enum.auto()  # white space between a block and the text after it
    CUT = enum.auto()


class ToolCallParser:
    """Parses an answer that arrives in pieces; the result does not depend on how it is cut.

    The parser withholds what may be the start of a marker, a call that is not complete, and, at the start of the
    answer, JSON that may be a call if nothing follows.

    Args:
        tools: the declared tools: names, or each as for `flat_tool`. Without any, everything is text and nothing is
            withheld.
        marked: reads JSON without a marker as text.

    Attributes:
        calls: the calls so far, in their order.
        error: the reason why the first text that looks like a call is left as text (cut off, not JSON, no declared
            tool), or None.

    Raises:
        RequestError: a tool is malformed, or `tools` is not a list.
    """

    def __init__(self, tools: Iterable[Any], marked: bool = False) -> None:
        self._tools = _by_name(tools)
        self.error: str | None = None
        self.calls: tuple[ToolCall, ...] = ()
        self._state = _State.TEXT if marked else _State.START
        self._carried = ""  # the end of a piece, too short to decide on
        self._text = _Text()
        self._block = _Block(BARE, [])

    def add(self, text: str) -> str:
        """Parses the next piece of the answer; returns the text that is now certain to be text."""
        if not self._tools:
            return text
        text, self._carried, at = self._carried + text, "", 0
        while at < len(text):
            at = _READERS[self._state](self, text, at)
        return self._text.take()

    def cut(self) -> None:
        """Cuts the answer where the model did not end it: an incomplete call becomes text, and so does what follows."""
        state, block = self._state, self._block
        if state is _State.AFTER_VALUE and not block.form.whole:
            self._close_at_end()
        elif state in _IN_BLOCK:
            if state is not _State.BEFORE_VALUE or block.values or block.form in (TAGGED, REQUEST):
                self.error = self.error or _CUT_OFF
            self._drop()
        elif state is _State.START and self._carried == "[":
            self.error = self.error or _CUT_OFF
        self._text.add(self._carried)
        self._carried, self._state = "", _State.CUT

    def finish(self) -> str:
        """Ends the answer; returns the withheld text."""
        if self._state in (_State.AFTER_VALUE, _State.AFTER_FENCE):
            self._close_at_end()
        self.cut()
        if not self.calls:
            self._text.keep_space()
        return self._text.take()

    def _read_start(self, text: str, at: int) -> int:
        start = _end_of_space(text, at)
        self._text.add_space(text[at:start])
        head = text[start : start + _LONGEST_MARKER]
        if any(opener != head and opener.startswith(head) for opener in (*MARKED, FENCES[0])):
            return self._carry(text, start)
        fence = next((fence for fence in FENCES if head.startswith(fence)), "")
        self._state = _State.TEXT
        if fence:
            self._open(FENCED, fence)
        elif head[0] in BARE.first:  # also `[TOOL_REQUEST]`: the block is dropped, and read again as text
            self._open(BARE, "")
        return start + len(fence)

    def _read_text(self, text: str, at: int) -> int:
        if found := _MARKER.search(text, at):
            self._text.add(text[at : found.start()])
            self._open(MARKED[found[0]], found[0])
            return found.end()
        cut = _MARKER_START.search(text, max(at, len(text) - _LONGEST_MARKER))
        end = cut.start() if cut else len(text)
        self._text.add(text[at:end])
        return self._carry(text, end)

    def _read_before_value(self, text: str, at: int) -> int:
        block = self._block
        start = _end_of_space(text, at)
        block.after.append(text[at:start])
        if start < len(text):
            if text[start] in block.form.first:
                block.begin_value()
                self._state = _State.VALUE
            elif block.values:
                self._end_block()  # the comma is text
            else:
                self._drop()
        return start

    def _read_value(self, text: str, at: int) -> int:
        block = self._block
        end = block.json.read(text, at)
        block.value.append(text[at:end])
        if block.json.problem:
            if block.json.too_large or (block.json.has_object and not block.form.whole):
                self.error = self.error or f"a tool call is left as text: {block.json.problem}"
            self._drop()
        elif block.json.done:
            block.end_value()
            self._state = _State.AFTER_VALUE
            if block.form is FUNCTOOLS:
                self._close()
        else:
            return self._carry(text, end)
        return end

    def _read_after_value(self, text: str, at: int) -> int:
        block, closer = self._block, self._block.form.closer
        start = _end_of_space(text, at)
        block.after.append(text[at:start])
        if start == len(text):
            return start
        if text[start] == ",":
            block.after.append(",")
            self._state = _State.BEFORE_VALUE
            return start + 1
        if not closer or not closer.startswith(text[start : start + len(closer)]):
            self._end_block()
            return start
        if len(text) - start < len(closer):
            return self._carry(text, start)
        block.after.append(closer)
        self._state = _State.AFTER_FENCE
        if not block.form.whole:
            self._close()
        return start + len(closer)

    def _read_after_fence(self, text: str, at: int) -> int:
        start = _end_of_space(text, at)
        self._block.after.append(text[at:start])
        if start < len(text):
            self._drop()
        return start

    def _read_after_block(self, text: str, at: int) -> int:
        start = _end_of_space(text, at)
        self._text.add_space_after_block(text[at:start])
        if start < len(text):
            self._state = _State.TEXT
        return start

    # A block: how it begins and ends.

    def _open(self, form: Form, opener: str) -> None:
        self._block = _Block(form, [opener])
        self._state = _State.BEFORE_VALUE

    def _close(self) -> bool:
        """Ends a block: all of it becomes calls, or all of it text. True if it became calls."""
        block = self._block
        try:
            self.calls += tuple(parse_calls(block.values, self._tools, block.form.whole))
        except NotACall as why:
            if str(why) and not block.form.whole:
                self.error = self.error or f"a tool call is left as text: {why}"
            self._drop()
            return False
        self._text.end_block()
        self._state = _State.AFTER_BLOCK
        return True

    def _close_at_end(self) -> None:
        self._block.after.append(self._carried)  # the start of the closer
        self._carried = ""
        self._close()

    def _end_block(self) -> None:
        """Ends a block after its last value, because what follows is not part of it."""
        if self._block.form.whole:
            self._drop()
        elif self._close():
            after = "".join(self._block.after)  # white space, or a comma with some
            end = self._read_after_block(after, 0)
            self._text.add(after[end:])

    def _drop(self) -> None:
        """Ends a block that is text."""
        self._text.add(self._block.text())
        self._state = _State.TEXT

    def _carry(self, text: str, at: int) -> int:
        """Keeps the rest of a piece, which is never longer than a marker, until the next piece."""
        self._carried = text[at:]
        return len(text)


_CUT_OFF = "the answer ends inside a tool call, which is left as text; allow it more tokens"
_IN_BLOCK = (_State.BEFORE_VALUE, _State.VALUE, _State.AFTER_VALUE, _State.AFTER_FENCE)


def _read_rest(parser: ToolCallParser, text: str, at: int) -> int:
    parser._text.add(text[at:])
    return len(text)


# One for each state: each reads on from `at`, returns where it stopped, and may set the next state.
_READERS = {
    _State.START: ToolCallParser._read_start,
    _State.TEXT: ToolCallParser._read_text,
    _State.BEFORE_VALUE: ToolCallParser._read_before_value,
    _State.VALUE: ToolCallParser._read_value,
    _State.AFTER_VALUE: ToolCallParser._read_after_value,
    _State.AFTER_FENCE: ToolCallParser._read_after_fence,
    _State.AFTER_BLOCK: ToolCallParser._read_after_block,
    _State.CUT: _read_rest,
}


class _Text:
    """The text around the calls; white space waits until text follows it."""

    def __init__(self) -> None:
        self._ready: list[str] = []  # certain to be text, and not returned yet
        self._space: list[str] = []  # white space that is text only if text follows
        self._last = ""  # the last character of the text so far
        self._needs_space = False  # the text before the last block ends without white space

    def add(self, text: str) -> None:
        if text:
            self._ready += (*self._space, text)
            self._space.clear()
            self._last = text[-1]

    def add_space(self, space: str) -> None:
        self._space.append(space)

    def add_space_after_block(self, space: str) -> None:
        """Keeps white space only where the text before the block has none."""
        if self._needs_space:
            self._space.append(space)

    def end_block(self) -> None:
        if not self._last:
            self._space.clear()  # the white space at the start of the answer
        self._needs_space = bool(self._last) and not self._last.isspace() and not self._space

    def keep_space(self) -> None:
        self._ready += self._space
        self._space.clear()

    def take(self) -> str:
        text = "".join(self._ready)
        self._ready.clear()
        return text


@dataclass
class _Block:
    """Calls in one form, as read so far."""

    form: Form
    before: list[str]  # the text up to the end of the last whole value
    values: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)  # the value that is being read
    after: list[str] = field(default_factory=list)  # the text after the last whole value
    json: JsonScanner = field(default_factory=lambda: JsonScanner(stop=REQUEST.opener))

    def begin_value(self) -> None:
        self.before += self.after
        self.after.clear()
        self.json.restart()

    def end_value(self) -> None:
        self.before += self.value
        self.values.append("".join(self.value))
        self.value.clear()

    def text(self) -> str:
        return "".join((*self.before, *self.value, *self.after))


def _by_name(tools: Iterable[Any]) -> dict[str, Mapping[str, Any] | None]:
    if isinstance(tools, (str, Mapping)):
        raise RequestError(f"tools must be a list, not {tools!r:.100}")
    return dict(map(_named, tools))


def _named(tool: Any) -> tuple[str, Mapping[str, Any] | None]:
    """A tool's name, and its arguments in the flat form if they are known."""
    if isinstance(tool, str):
        return tool, None
    flat = flat_tool(tool)
    return flat["name"], flat["parameters"]


def _end_of_space(text: str, at: int) -> int:
    return found.end() if (found := _SPACES.match(text, at)) else at
