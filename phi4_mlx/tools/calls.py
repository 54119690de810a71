"""The calls of tools in an answer, whole or as it comes; everything else in it is text, and none of that is lost.

The model was trained to write `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`. It also leaves brackets
or the closing tag out, and prompts of other stacks make it write `functools[...]`, `[TOOL_REQUEST]{...}`, or plain or
fenced JSON. One scanner reads them all, each character once: JSON from its first bracket to its last, with strings
skipped. What breaks off, or is no call of a declared tool, is text as a whole, and nothing within it is a call.

Source: the forms are listed with their origins in vLLM's, BFCL's and LM Studio's parsers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.tools.declarations import flat_tool
from phi4_mlx.tools.json_text import JsonScanner, json_text


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: dict[str, Any]

    def message(self, call_id: str) -> dict[str, Any]:
        """The call as it stands in "tool_calls" of an assistant's message in OpenAI's form.

        Args:
            call_id: the name that the result will be given back under.
        """
        function = {"name": self.name, "arguments": json_text(self.arguments)}
        return {"id": call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolReply:
    """An answer, taken apart.

    Attributes:
        text: what is no call; the whole answer, to the character, where there is none.
        calls: in the order in which they stand.
        error: one line on what looks like a call and is none: cut off, no JSON, or of a tool that is not declared. It
            is in `text`. The first of them, or None.
    """

    text: str
    calls: tuple[ToolCall, ...]
    error: str | None


def parse_tool_calls(text: str, tools: Iterable[Any]) -> ToolReply:
    """Takes a whole answer apart into text and calls.

    Args:
        text: what the model wrote, without the marker that ended it.
        tools: those declared: names, or each as for `flat_tool`. With none, all is text.
    """
    parser = ToolCallParser(tools)
    shown = parser.add(text) + parser.finish()
    return ToolReply(shown, parser.calls, parser.error)


@dataclass(frozen=True)
class _Form:
    """A way to write calls: what stands before the JSON and behind it, and what the JSON may begin with."""

    opener: str
    closer: str
    first: str = '[{"'
    whole: bool = False  # counts only if it is the entire answer


_TAGGED = _Form("<|tool_call|>", "<|/tool_call|>")
_REQUEST = _Form("[TOOL_REQUEST]", "[END_TOOL_REQUEST]")
_FUNCTOOLS = _Form("functools", "", "[")
_MARKED = {form.opener: form for form in (_TAGGED, _REQUEST, _FUNCTOOLS)}
_BARE = _Form("", "", "[{", whole=True)
_FENCED = _Form("```", "```", "[{", whole=True)
_FENCES = ("```json", "```")

_MARKER = re.compile("|".join(map(re.escape, _MARKED)))
_LONGEST = max(map(len, _MARKED))
_STARTS = {opener[:n] for opener in _MARKED for n in range(1, len(opener))}  # of which only one ends a text
_MARKER_START = re.compile(rf"(?:{'|'.join(map(re.escape, _STARTS))})\Z")
_SPACES = re.compile(r"\s*")
_DECODER = json.JSONDecoder(strict=False)  # a model writes line breaks in strings


class ToolCallParser:
    """Takes an answer apart while it comes in pieces; how it is cut into pieces makes no difference.

    Held back is what may be the start of a marker, a call that is not at its end, and, at the start of the answer, JSON
    that may be a call if nothing follows.

    Args:
        tools: those declared: names, or each as for `flat_tool`. With none, all is text and nothing is held back.
        marked: whether JSON without a marker is text.

    Attributes:
        error: as in `ToolReply`, so far.
    """

    def __init__(self, tools: Iterable[Any], marked: bool = False) -> None:
        if isinstance(tools, (str, Mapping)):
            raise RequestError(f"tools must be a list, not {tools!r:.100}")
        self._tools = dict(map(_named, tools))
        self.error: str | None = None
        self._calls: list[ToolCall] = []
        start = self._read_text if marked else self._read_start
        self._read: Callable[[str, int], int] = start if self._tools else self._read_plain
        self._carried = ""  # too short yet to be judged
        self._out: list[str] = []  # certain to be text, and not returned yet
        self._space: list[str] = []  # white space that is text only if text follows
        self._last = ""  # the last character of the text so far
        self._joins = False  # the text so far ends without white space, so the next needs some
        self._block = _Block(_BARE, [])

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(self._calls)

    def add(self, text: str) -> str:
        """Takes the next piece of the answer, and returns what it makes certain to be text."""
        text, self._carried = self._carried + text, ""
        at = 0
        while at < len(text):
            at = self._read(text, at)
        return self._taken()

    def finish(self) -> str:
        """Ends the answer, and returns what was held back and is text."""
        rest, self._carried = self._carried, ""
        if self._read in (self._read_behind, self._read_end):  # what is carried is the start of the closing tag
            self._block.after.append(rest)
            rest = ""
            self._close()
        elif (
            self._read in (self._read_value, self._read_comma)
            or (self._read == self._read_first and self._block.form in (_TAGGED, _REQUEST))
            or (self._read == self._read_start and rest == "[")
        ):
            self._complain("the answer ends inside a tool call, which is left as text; allow it more tokens")
        if self._read in (self._read_first, self._read_value, self._read_comma):
            self._drop()
        self._say(rest)
        if not self._calls:
            self._out += self._space
        return self._taken()

    # Each of these reads on from `at`, and returns how far it came; the last that one of them set reads next.

    def _read_plain(self, text: str, at: int) -> int:
        self._say(text[at:])
        return len(text)

    def _read_start(self, text: str, at: int) -> int:
        """White space at the start of the answer, and what decides whether the answer may be a call as a whole."""
        start = _end_of_space(text, at)
        self._space.append(text[at:start])
        head = text[start : start + _LONGEST]
        if any(opener != head and opener.startswith(head) for opener in (*_MARKED, _FENCES[0])):
            return self._carry(text, start)
        fence = next((fence for fence in _FENCES if head.startswith(fence)), "")
        self._read = self._read_text
        if fence:
            self._open(_FENCED, fence)
        elif head[0] in _BARE.first:  # `[TOOL_REQUEST]` as well, which is text, and so a marker, once it is looked at
            self._open(_BARE, "")
        return start + len(fence)

    def _read_text(self, text: str, at: int) -> int:
        if found := _MARKER.search(text, at):
            self._say(text[at : found.start()])
            self._open(_MARKED[found[0]], found[0])
            return found.end()
        cut = _MARKER_START.search(text, max(at, len(text) - _LONGEST))
        end = cut.start() if cut else len(text)
        self._say(text[at:end])
        return self._carry(text, end)

    def _read_first(self, text: str, at: int) -> int:
        """What stands before a block's first value."""
        return self._read_until_value(text, at, self._drop)

    def _read_value(self, text: str, at: int) -> int:
        block = self._block
        end = block.json.read(text, at)
        block.value.append(text[at:end])
        if block.json.problem:
            if block.json.too_large or (block.json.has_object and not block.form.whole):
                self._complain(f"a tool call is left as text, since {block.json.problem}")
            self._drop()
        elif block.json.done:
            block.end_value()
            self._read = self._read_behind
            if block.form is _FUNCTOOLS:
                self._close()
        else:
            return self._carry(text, end)
        return end

    def _read_behind(self, text: str, at: int) -> int:
        """What stands behind a value: a comma, the closing tag, or what is no part of the block."""
        block, closer = self._block, self._block.form.closer
        start = _end_of_space(text, at)
        block.after.append(text[at:start])
        if start == len(text):
            return start
        if text[start] == ",":
            block.after.append(",")
            self._read = self._read_comma
            return start + 1
        if not closer or not closer.startswith(text[start : start + len(closer)]):
            self._leave()
            return start
        if len(text) - start < len(closer):
            return self._carry(text, start)
        block.after.append(closer)
        self._read = self._read_end
        if not block.form.whole:
            self._close()
        return start + len(closer)

    def _read_comma(self, text: str, at: int) -> int:
        """What stands behind a comma: the next value, or else the comma is text."""
        return self._read_until_value(text, at, self._leave)

    def _read_until_value(self, text: str, at: int, otherwise: Callable[[], object]) -> int:
        start = _end_of_space(text, at)
        self._block.after.append(text[at:start])
        if start < len(text) and text[start] in self._block.form.first:
            self._block.begin_value()
            self._read = self._read_value
        elif start < len(text):
            otherwise()
        return start

    def _read_end(self, text: str, at: int) -> int:
        """What stands behind a fence: nothing, or else it is no call."""
        start = _end_of_space(text, at)
        self._block.after.append(text[at:start])
        if start < len(text):
            self._drop()
        return start

    def _read_gap(self, text: str, at: int) -> int:
        """White space behind a block: it goes where the text before has some, and where no more text follows."""
        start = _end_of_space(text, at)
        if self._joins:
            self._space.append(text[at:start])
        if start < len(text):
            self._read = self._read_text
        return start

    # A block: how it begins and ends.

    def _open(self, form: _Form, opener: str) -> None:
        self._block = _Block(form, [opener])
        self._read = self._read_first

    def _close(self) -> bool:
        """Ends a block: it is calls as a whole, or text."""
        block = self._block
        try:
            self._calls += _calls(block.values, self._tools, block.form.whole)
        except _NoCall as why:
            if str(why) and not block.form.whole:
                self._complain(f"a tool call is left as text, since {why}")
            self._drop()
            return False
        if not self._last:
            self._space.clear()  # what the answer begins with
        self._joins = bool(self._last) and not self._last.isspace() and not self._space
        self._read = self._read_gap
        return True

    def _leave(self) -> None:
        """Ends a block behind its last value, since what follows is no part of it."""
        if self._block.form.whole:
            self._drop()
        elif self._close():
            behind = "".join(self._block.after)  # white space, or a comma with some
            end = self._read_gap(behind, 0)
            self._say(behind[end:])

    def _drop(self) -> None:
        """The block so far is text."""
        self._say("".join((*self._block.held, *self._block.value, *self._block.after)))
        self._read = self._read_text

    def _say(self, text: str) -> None:
        if text:
            self._out += (*self._space, text)
            self._space.clear()
            self._last = text[-1]

    def _complain(self, error: str) -> None:
        self.error = self.error or error

    def _carry(self, text: str, at: int) -> int:
        """Leaves the rest of a piece until there is more; it is never longer than a marker."""
        self._carried = text[at:]
        return len(text)

    def _taken(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text


@dataclass
class _Block:
    """Calls in one form, as far as they have come."""

    form: _Form
    held: list[str]  # up to its last value, as it stands
    values: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)  # the one that is being read
    after: list[str] = field(default_factory=list)  # what stands behind the last value
    json: JsonScanner = field(default_factory=lambda: JsonScanner(stop=_REQUEST.opener))

    def begin_value(self) -> None:
        self.held += self.after
        self.after.clear()
        self.json.restart()

    def end_value(self) -> None:
        self.held += self.value
        self.values.append("".join(self.value))
        self.value.clear()


# From JSON to calls.


class _NoCall(Exception):
    """Why a value is no call; without a text if it does not look like one."""


def _named(tool: Any) -> tuple[str, Mapping[str, Any] | None]:
    """A tool's name, and its arguments in the flat form if they are known."""
    if isinstance(tool, str):
        return tool, None
    flat = flat_tool(tool)
    return flat["name"], flat["parameters"]


def _calls(values: list[str], tools: Mapping[str, Any], whole: bool) -> list[ToolCall]:
    """The calls that JSON values are, all of them."""
    items: list[Any] = []
    for text in values:
        value = _decoded(text)
        items += value if isinstance(value, list) else [value]
    if not items:
        raise _NoCall  # an empty list
    return [_call(item, tools, whole) for item in items]


def _call(item: Any, tools: Mapping[str, Any], whole: bool) -> ToolCall:
    if isinstance(item, str):
        item = _scanned(item)
    if not isinstance(item, dict):
        raise _NoCall
    function = item.get("function")
    if isinstance(function, dict) and item.get("type", "function") == "function" and item.keys() <= _WRAPPER_KEYS:
        item = function
    name = item.get("name")
    if not isinstance(name, str):
        raise _NoCall
    if name not in tools:
        raise _NoCall(f"{name[:100]!r} is none of the tools: {', '.join(map(repr, tools))[:200]}")
    given = [item[key] for key in ("arguments", "parameters") if key in item]
    if not item.keys() <= _CALL_KEYS or len(given) > 1:
        raise _NoCall(f"it is no call of {name!r} but has the keys {', '.join(item)[:200]!r}")
    if whole and not given:
        raise _NoCall
    arguments = given[0] if given else {}
    if isinstance(arguments, str) and arguments.strip():
        arguments = _scanned(arguments)
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise _NoCall(f"the arguments of {name!r} are no object")
    if _repeats(arguments, tools[name]):
        raise _NoCall(f"it repeats the declaration of {name!r}")
    try:
        json_text(arguments).encode()
    except (ValueError, RecursionError):
        raise _NoCall(f"the arguments of {name!r} hold half a surrogate pair or a number beyond all") from None
    return ToolCall(name, arguments)


_WRAPPER_KEYS, _CALL_KEYS = {"id", "index", "type", "function"}, {"id", "name", "arguments", "parameters"}
_SCHEMA_KEYS = {"type", "description", "default", "enum", "items", "format"}


def _repeats(arguments: Mapping[str, Any], declared: Mapping[str, Any] | None) -> bool:
    """Whether arguments are the tool's declaration, which the model sometimes writes instead of a call."""
    known = declared or {}
    if arguments.get("type") == "object" and isinstance(arguments.get("properties"), dict):
        return not {"type", "properties"} <= known.keys()
    return bool(arguments) and all(_is_schema(value, known.get(name)) for name, value in arguments.items())


def _is_schema(value: Any, declared: Any) -> bool:
    """Whether an argument is its own schema; one that may be an object must be that to the letter."""
    if not isinstance(value, dict):
        return False
    if declared is not None:
        known = declared if isinstance(declared, dict) else {}
        if {**value, "type": _flat_type(value)} == {**known, "type": _flat_type(known)}:
            return True
        if _flat_type(known) not in _NO_OBJECTS:
            return False
    return value.keys() <= _SCHEMA_KEYS and (isinstance(value.get("type"), str) or "description" in value)


def _flat_type(schema: Mapping[str, Any]) -> Any:
    return "str" if schema.get("type") == "string" else schema.get("type")


# Types, in both spellings, of arguments that are no objects.
_NO_OBJECTS = ("str", "int", "integer", "float", "number", "bool", "boolean", "array", "list", "null")


def _scanned(text: str) -> Any:
    """The object that a string of JSON holds."""
    text = text.strip()
    scanner = JsonScanner()
    if scanner.read(text, 0) < len(text) or not scanner.done:
        raise _NoCall("a string in it that should hold JSON does not")
    return _decoded(text)


def _decoded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):  # more digits or brackets than this Python takes
        raise _NoCall("it is larger than JSON can be read here") from None


def _end_of_space(text: str, at: int) -> int:
    return found.end() if (found := _SPACES.match(text, at)) else at
