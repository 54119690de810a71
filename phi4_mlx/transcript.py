"""A conversation as a file: JSON with the messages, as other programs write them too.

A file is complete or absent, and one that comes from elsewhere is checked before it is believed.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.conversation import Turn
from phi4_mlx.errors import RequestError

if TYPE_CHECKING:
    from phi4_mlx.tokenizer import Tokenizer

LARGEST_FILE = 64 * 2**20  # bytes; the longest context is about half a megabyte of text


def save(path: Path, model_name: str, system: str | None, turns: Sequence[Turn], replace: bool = False) -> None:
    """Writes a conversation, readable by its owner only.

    Args:
        path: the file.
        model_name: told to the reader of the file.
        system: the system prompt, or None.
        turns: the turns.
        replace: whether a file that is there may be replaced.

    Raises:
        RequestError: there is such a file, and it may not be replaced.
        OSError: the file cannot be written; nothing is left behind then.
    """
    content = {"model": model_name, "messages": to_messages(system, turns)}
    if path.exists() and not replace:
        raise RequestError(f"{path} exists; choose another name, or remove it")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, tokenizer: Tokenizer) -> tuple[str | None, list[Turn]]:
    """Reads a conversation.

    Args:
        path: the file.
        tokenizer: encodes the replies; as plain text, so that no control token comes out of a file.

    Returns:
        (system prompt or None, turns)

    Raises:
        RequestError: the file is no conversation.
        OSError: the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(f"{path} is not a file")
    if status.st_size > LARGEST_FILE:
        raise RequestError(f"{path} has {status.st_size:,} bytes; a conversation has at most {LARGEST_FILE:,}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested without end
        raise RequestError(f"{path} is not JSON; /save writes files that /load reads") from None
    if not isinstance(content, dict) or "messages" not in content:
        raise RequestError(f"{path} has no 'messages'; /save writes files that /load reads")
    try:
        return from_messages(content["messages"], tokenizer)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def to_messages(system: str | None, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as messages, {"role": str, "content": str} each."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return messages


def from_messages(messages: Any, tokenizer: Tokenizer) -> tuple[str | None, list[Turn]]:
    """The opposite, for messages from anywhere: each is checked.

    Args:
        messages: an optional system message, then user and assistant in turn, each {"role": str, "content": str}.
        tokenizer: encodes the replies; as plain text, so that no control token comes out of a file.

    Returns:
        (system prompt, turns)

    Raises:
        RequestError: they are anything else.
    """
    if not isinstance(messages, list):
        raise RequestError("the messages are not a list")
    texts: list[str] = []
    system: str | None = None
    for at, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not _is_unicode(content):
            raise RequestError(f"message {at} has no 'content' that is text")
        role = message.get("role")
        if role == "system" and at == 0:
            system = content
            continue
        expected = "assistant" if len(texts) % 2 else "user"
        if role != expected:
            raise RequestError(f"message {at} has the role {role!r}; due is {expected!r}: user and assistant alternate")
        texts.append(content)
    if len(texts) % 2:
        raise RequestError("the last message is the user's, and has no answer")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return system, [Turn(question, answer, tuple(tokenizer.encode(answer))) for question, answer in pairs]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
