"""The lines of a file of prompts, read and checked before a model is loaded.

A line is a JSON string, or an object with one of

    {"prompt": "..."}                               a user's message
    {"messages": [{"role": ..., "content": ...}]}   a conversation; may have "tools"

and, where wanted, an "id" that its answer repeats, and "max_tokens" and "seed" of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4_mlx.data.jsonl import read_lines
from phi4_mlx.errors import RequestError, check_whole
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT, SEED_LIMIT
from phi4_mlx.terminal.suggestion import suggestion
from phi4_mlx.tokens.messages import check_messages

_KEYS = ("prompt", "messages", "tools", "id", "max_tokens", "seed")


@dataclass(frozen=True)
class PromptLine:
    """A line of a file of prompts.

    Attributes:
        number: of the line, from 1.
        prompt: text, or messages.
        tools: declared to the model, with messages only.
        id: repeated in the answer; None for none.
        max_tokens: of its answer; None for that of all.
        seed: of its draws; None for that of all.
    """

    number: int
    prompt: str | Sequence[Mapping[str, Any]]
    tools: Sequence[Any] = ()
    id: str | int | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: the file.
        lines: of the file, in order.
        digest: SHA-256 of what the lines hold; white space does not count.
    """

    path: Path
    lines: list[PromptLine]
    digest: str


def read_prompts(path: Path) -> PromptFile:
    """Reads a file of prompts.

    Raises:
        RequestError: it cannot be read, or has bad lines; gives the reason of the first and the numbers of the others.
    """
    digest = hashlib.sha256()

    def read(record: dict[str, Any], source: str) -> PromptLine:
        try:
            digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:
            raise RequestError("the line has half of a surrogate pair, which is no text; remove it") from None
        return _line(record, int(source.rpartition(":")[2]))

    return PromptFile(path, read_lines(path, read, bare="prompt"), digest.hexdigest())


def _line(record: Mapping[str, Any], number: int) -> PromptLine:
    for key in record:
        if key not in _KEYS:
            raise RequestError(f"key {key!r:.60} is not known; the keys are {', '.join(_KEYS)}{suggestion(key, _KEYS)}")
    if ("prompt" in record) == ("messages" in record):
        found = "both" if "prompt" in record else "neither"
        raise RequestError(f"a line has either prompt or messages, and this one has {found}")
    if "prompt" in record:
        prompt = _text(record["prompt"])
        if record.get("tools"):
            raise RequestError('tools go with messages; write the prompt as {"role": "user", "content": "..."}')
    else:
        prompt = record["messages"]
        check_messages([_without_media(message) for message in prompt] if isinstance(prompt, list) else prompt)
    tools = record.get("tools")
    tools = () if tools is None else tools
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {tools!r:.60}")
    given = record.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise RequestError(f"id must be a text or a whole number, not {given!r:.60}")
    max_tokens, seed = record.get("max_tokens"), record.get("seed")
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, 1, MAX_TOKENS_LIMIT)
    if seed is not None:
        check_whole("seed", seed, 0, SEED_LIMIT)
    return PromptLine(number, prompt, tools, given, max_tokens, seed)


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RequestError(f"prompt must be a text, not {prompt!r:.60}; a conversation is written as messages")
    if not prompt.strip():
        raise RequestError("the prompt is empty; it needs at least one character that is not white space")
    return prompt


def _without_media(message: Any) -> Any:
    """A message, refused if it has pictures or sounds, which are read one prompt at a time."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    kinds = [part.get("type") for part in parts if isinstance(part, Mapping)]
    found = next((kind for kind in kinds if kind in ("image", "audio")), None)
    if found is not None:
        raise RequestError(
            f"a message has a part of type {found}, and --prompts reads only text; ask about it with --prompt and "
            f"--{found}"
        )
    return message
