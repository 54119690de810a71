"""A tokenizer and a chat format of single characters, for tests of the rooms below tokens/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phi4_mlx.tokens.prompt import MediaSettings, Prompt, slots

END, USER, ASSISTANT, SYSTEM = 2, 3, 4, 5
SLOTS = {"image": 6, "audio": 7}
FIRST_CHAR = 10


class OneCharDecoder:
    def add(self, token: int) -> str:
        return chr(token - FIRST_CHAR) if token >= FIRST_CHAR else ""

    def finish(self) -> str:
        return ""


class CharFormat:
    """Role, media and text, end marker."""

    name = "chars"
    reasons = False

    def render(self, tokenizer: Any, messages: Sequence[Any], tools: Any = None) -> Prompt:
        ids = Prompt()
        for message in messages:
            ids.append(USER if message["role"] == "user" else SYSTEM)
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = part["type"]
                ids += tokenizer.encode(part["text"]) if kind == "text" else slots(part[kind], SLOTS[kind])
            ids.append(END)
        ids.append(ASSISTANT)
        return ids

    def append(self, tokenizer: Any, ids: list[int], messages: Sequence[Any]) -> None:
        ids += [] if ids[-1:] == [END] else [END]
        ids += self.render(tokenizer, messages)


class CharTokenizer:
    chat_format = CharFormat()
    media: MediaSettings | None = None
    eos_ids = frozenset({END})

    def encode(self, text: str) -> list[int]:
        return [FIRST_CHAR + ord(c) for c in text]

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        return self.encode("".join(pieces))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - FIRST_CHAR) for token in ids if token >= FIRST_CHAR)

    def streaming_decoder(self) -> OneCharDecoder:
        return OneCharDecoder()

    def fingerprint(self) -> str:
        return "chars"
