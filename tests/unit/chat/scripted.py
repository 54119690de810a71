"""A chat on a screen that records, with a script in place of a model's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.chat.session import Chat
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.terminal.options import SAMPLING
from phi4_mlx.terminal.screen import Screen
from tests.char_tokenizer import FIRST_CHAR, CharTokenizer


class Recorder(Screen):
    """A terminal that records what is written.

    Attributes:
        notes: every note so far, unwrapped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terminal = True
        self.shown = ""
        self.notes: list[str] = []

    def write(self, text: str) -> None:
        self.shown += text

    def note(self, text: str) -> None:
        self.notes.append(text)
        super().note(text)


class Script:
    """Stands in for `stream`: the replies to give, one a question, and what happens on the way.

    Attributes:
        prompt: the ids of the last question that were not cached.
    """

    def __init__(self) -> None:
        self.replies: list[str] = []
        self.finish_reason = "stop"
        self.at_token: Callable[[int], None] = lambda number: None
        self.options = DecodeOptions()
        self.prompt_length = 0
        self.prompt: list[int] = []

    def __call__(
        self, model: Any, tokenizer: Any, prompt: list[int], cache: PromptCache, options: DecodeOptions
    ) -> Iterator[GenerationResponse]:
        self.options, self.prompt = options, prompt
        self.progress(0, self.prompt_length or len(prompt))
        reply = self.replies.pop(0) if self.replies else "reply"
        for number, char in enumerate(reply, 1):
            self.at_token(number)
            reason = self.finish_reason if number == len(reply) else None
            token = FIRST_CHAR + ord(char)
            yield GenerationResponse(char, token, mx.zeros(1), len(prompt), 1.0, number, 1.0, 0.1, 0, reason)

    def progress(self, done: int, total: int) -> None:
        """Reports the progress of a prefill, as generation does."""
        assert self.options.prompt_progress_callback is not None
        self.options.prompt_progress_callback(done, total)


def make_chat(model: LanguageModel, max_tokens: int) -> Chat:
    """A person's chat with a model and the tokenizer of single characters."""
    settings = {name: option.default for name, option in SAMPLING.items()} | {"max-tokens": max_tokens}
    conversation = Conversation(model, CharTokenizer())  # type: ignore[arg-type]
    return Chat(Recorder(), conversation, "demo", settings, person=True)


def shown(chat: Chat) -> str:
    """Everything on the screen since the last call."""
    assert isinstance(chat.screen, Recorder)
    text, chat.screen.shown = chat.screen.shown, ""
    return text


def type_lines(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Stands in for the line editor: lines, and exceptions to raise."""
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    return read


def questions(chat: Chat) -> list[str]:
    return [turn.question for turn in chat.conversation.turns]
