"""A conversation as a file: a JSON object with its messages in OpenAI's form.

Pictures and sounds are named by the paths and the SHA-256 of their files, and read again from there. A written file is
complete or absent; every message that is read is checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phi4_mlx.agent import Round, call_ids, round_messages
from phi4_mlx.chat.conversation import Turn, reply_ids
from phi4_mlx.errors import RequestError
from phi4_mlx.files.atomic import replacing
from phi4_mlx.files.user_file import read_file
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.json_text import json_text

if TYPE_CHECKING:
    from phi4_mlx.tokens.media.media_file import MediaFile
    from phi4_mlx.tokens.tokenizer import Tokenizer

Waiting = deque[tuple[int, Any]]  # (number, message) pairs, not read yet

LARGEST_FILE = 64 * 2**20  # bytes; the longest context is about half a megabyte of text


def save(path: Path, model_name: str, system: str | None, turns: Sequence[Turn], replace: bool = False) -> None:
    """Writes a conversation, readable by its owner only.

    Args:
        path: the file.
        model_name: for readers of the file; `load` ignores it.
        system: the system prompt, or None.
        turns: the turns.
        replace: True to replace an existing file.

    Raises:
        RequestError: the file exists and may not be replaced, or the path is not a regular file.
        OSError: the file cannot be written; an older one is still there.
    """
    content = {"model": model_name, "messages": to_messages(system, turns)}
    if path.exists() and not replace:
        raise RequestError(f"{path} exists; choose another name, or remove it")
    with replacing(path) as partial, open(partial, "x", encoding="utf-8", opener=_open_private) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def _open_private(path: str, flags: int) -> int:
    """Opens a file that only its owner can read."""
    return os.open(path, flags, 0o600)


def load(path: Path, tokenizer: Tokenizer) -> tuple[str | None, list[Turn]]:
    """Reads a conversation.

    Args:
        path: the file.
        tokenizer: encodes the replies as plain text, so that a file cannot bring in control tokens.

    Returns:
        (system prompt or None, turns)

    Raises:
        RequestError: the file cannot be read, is not a conversation, or is over `LARGEST_FILE` bytes.
    """
    data = read_file(path, LARGEST_FILE)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deep
        raise RequestError(f"{path} is not a saved conversation: it is not JSON; /save writes one") from None
    if not isinstance(content, dict) or "messages" not in content:
        raise RequestError(f"{path} is not a saved conversation: it has no 'messages'; /save writes one")
    try:
        return from_messages(content["messages"], tokenizer)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def to_messages(system: str | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of the turns in OpenAI's form, with tool calls and their results."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    ids = call_ids()
    for turn in turns:
        parts = [*(each.record for each in turn.media), {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": parts if turn.media else turn.question})
        for each in turn.rounds:
            messages += round_messages(each, ids)
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def from_messages(messages: object, tokenizer: Tokenizer) -> tuple[str | None, list[Turn]]:
    """The turns of messages from any source; each message is checked.

    Args:
        messages: an optional system message, then user and assistant alternate, each {"role": str, "content": str}. The
            content of a user's may be a list of parts: media as `MediaFile.record` writes them, then a text. An
            assistant message with "tool_calls" is followed by a tool message for each call, and by another assistant
            message.
        tokenizer: encodes the replies as plain text, and says how its model reads media.

    Returns:
        (system prompt or None, turns). The medium of a file that is gone or has changed is None.

    Raises:
        RequestError: they are anything else; names the first message that is wrong.
    """
    if not isinstance(messages, list):
        raise RequestError("the messages are not a list")
    waiting = deque(enumerate(messages))
    system: str | None = None
    turns: list[Turn] = []
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system = _content(*waiting.popleft())
    while waiting:
        number, message = waiting[0]
        media, waiting[0] = _media(number, message, tokenizer)
        question = _next(waiting, "user").content
        turns.append(dataclasses.replace(_turn(question, waiting, tokenizer), media=media))
    return system, turns


def _media(number: int, message: object, tokenizer: Tokenizer) -> tuple[tuple[MediaFile, ...], tuple[int, Any]]:
    """The media of a message, and (number, the message with its text alone)."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(content, list) or not content:
        return (), (number, message)
    from phi4_mlx.tokens.media.media_file import of_record

    *parts, last = content
    text = last.get("text") if isinstance(last, dict) and last.get("type") == "text" else None
    try:
        media = tuple(of_record(part, tokenizer) for part in parts)
    except RequestError as error:
        raise RequestError(f"message {number}: {error}") from None
    return media, (number, {**message, "content": text})


def _turn(question: str, waiting: Waiting, tokenizer: Tokenizer) -> Turn:
    """Reads the messages that answer a question."""
    rounds: list[Round] = []
    while True:
        reply = _next(waiting, "assistant")
        if not reply.tool_calls:
            return Turn(question, reply.content, tuple(reply_ids(tokenizer, reply.content)), tuple(rounds))
        named = _calls(reply)
        calls = [call for _, call in named]
        found = [_next(waiting, "tool") for _ in named]
        by_id = {str(result.tool_call_id): result.content for result in found}
        results = [result.content for result in found]
        if by_id.keys() == {name for name, _ in named}:
            results = [by_id[name] for name, _ in named]
        rounds.append(Round(reply.content, reply_ids(tokenizer, reply.content, calls), calls, results))


class _Message(NamedTuple):
    """The fields of a message; only the content is checked yet."""

    number: int
    content: str
    tool_calls: object
    tool_call_id: object


def _next(waiting: Waiting, role: str) -> _Message:
    """Reads the next message, which must have the given role."""
    if not waiting:
        missing = "the user's, and has no answer" if role == "assistant" else "a call of a tool, and has no result"
        raise RequestError(f"the last message is {missing}")
    number, message = waiting.popleft()
    content = _content(number, message)
    if message.get("role") != role:
        raise RequestError(
            f"message {number} has the role {message.get('role')!r:.100}; it must be {role!r}: user and assistant "
            "alternate, and results follow calls"
        )
    return _Message(number, content, message.get("tool_calls"), message.get("tool_call_id"))


def _content(number: int, message: object) -> str:
    """The text of a message; empty for tool calls alone."""
    content = message.get("content") if isinstance(message, dict) else None
    if content is None and isinstance(message, dict) and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str) or not _is_unicode(content):
        raise RequestError(f"message {number} has no 'content' that is text")
    return content


def _calls(message: _Message) -> list[tuple[str, ToolCall]]:
    """The (id, call) pairs of a message."""
    try:
        if not isinstance(message.tool_calls, list):
            raise TypeError
        return [_call(call) for call in message.tool_calls]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise RequestError(f"message {message.number} has 'tool_calls' other than names with JSON arguments") from None


def _call(call: Any) -> tuple[str, ToolCall]:
    function = call["function"]
    name, arguments = function["name"], function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    json_text([name, arguments]).encode()  # raises unless both are JSON and Unicode
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError
    return str(call.get("id")), ToolCall(name, arguments)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
