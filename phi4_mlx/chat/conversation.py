"""A conversation: its turns, the token ids that the model made for them, and the cache that remembers both.

A reply is kept as the ids that were drawn, never encoded again from its text, so that the next prompt begins with what
the cache holds and only the new tokens are prefilled. The prompt is put together anew from the turns each time, and the
cache finds out for itself how much of it is known: to undo, retry or change the system prompt is to change the turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from phi4_mlx.agent import Approval, Event, Round, ToolLoop
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import check_context, plan_context
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.tokens.tokenizer import Control
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.tokenizer import Tokenizer


class Interrupted(Exception):
    """Raised out of a long prefill by its progress callback, when the user has had enough."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: what the user wrote.
        answer: the reply's text.
        ids: the reply's tokens as they were drawn, without the end marker.
        rounds: the replies before that one, each with calls of tools and their results.
    """

    question: str
    answer: str
    ids: tuple[int, ...]
    rounds: tuple[Round, ...] = ()


@dataclass
class Usage:
    """What an answer cost; after calls of tools, what its last round did.

    Attributes:
        prompt_tokens: the whole prompt, in tokens.
        cached_tokens: those of it that were in the cache already.
        answer_tokens: tokens drawn.
        prompt_tps: tokens prefilled a second.
        answer_tps: tokens drawn a second.
        reprefilled: tokens run again because the conversation has outgrown its RoPE table.
        peak_memory: peak of MLX's memory in GB (10^9 bytes).
        finish_reason: "stop", "length", "max_rounds", or None for an answer that was cut off.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_tps: float = 0.0
    answer_tps: float = 0.0
    reprefilled: int = 0
    peak_memory: float = 0.0
    finish_reason: str | None = None


@dataclass
class Conversation:
    """Turns with one model.

    Attributes:
        model: what `load` returned.
        tokenizer: what `load` returned.
        system: the system prompt, or None for none.
        toolbox: the tools that the model may call.
        turns: the finished turns; change them as you like between two questions.
        usage: what the last answer cost.
        cache_options: the kind of cache; see `make_cache`.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    system: str | None = None
    toolbox: Toolbox = field(default_factory=Toolbox)
    turns: list[Turn] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    cache_options: CacheOptions = field(default_factory=CacheOptions)

    def __post_init__(self) -> None:
        self.forget_cache()

    @property
    def context(self) -> int:
        """How many tokens a conversation with this model can hold."""
        return self.model.config.max_position_embeddings

    def switch(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        """Goes on with another model, whose tokenizer may be another one too."""
        self.model, self.tokenizer = model, tokenizer
        self.forget_cache()
        self.turns = [
            Turn(
                turn.question,
                turn.answer,
                tuple(reply_ids(tokenizer, turn.answer)),
                tuple(replace(each, ids=reply_ids(tokenizer, each.text, each.calls)) for each in turn.rounds),
            )
            for turn in self.turns
        ]

    def forget_cache(self) -> None:
        """Drops what the model remembers; the next prompt is prefilled whole."""
        self.cache = self.model.make_cache(**vars(self.cache_options))

    def ids(self) -> list[int]:
        """All turns as token ids, as the model saw and made them."""
        ids: list[int] = []
        for turn in self.turns:
            ids = self._with_question(ids, turn.question)
            for each in turn.rounds:
                drawn = [*ids, *each.ids]
                ids = self.tokenizer.chat_format.extend(self.tokenizer, drawn, each.result_messages())
            ids = [*ids, *turn.ids]
        return ids

    def prompt_ids(self, question: str) -> list[int]:
        """The prompt of the next turn: all turns, `question`, and the start of an answer."""
        return self._with_question(self.ids(), question)

    def _with_question(self, ids: list[int], question: str) -> list[int]:
        message = {"role": "user", "content": question}
        chat_format = self.tokenizer.chat_format
        if ids:  # also closes a reply that was cut before its end marker
            return chat_format.extend(self.tokenizer, ids, [message])
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_format.render(self.tokenizer, [*system, message], self.toolbox.declarations or None)

    def ask(
        self,
        question: str,
        options: DecodeOptions,
        *,
        grammar: Grammar | None = None,
        approve: Approval | None = None,
    ) -> Generator[Event, None, None]:
        """Asks, and yields the answer as it comes; what was yielded becomes a turn, also when the caller stops early.

        Args:
            question: what the user wrote.
            options: of the answer; it is shorter than `max_tokens` where the context ends before. The progress callback
                may raise `Interrupted`, which ends the answer without a trace.
            grammar: what the answer must obey.
            approve: as in `run_tools`; it may raise `Interrupted` too, and what was said before stays.

        Yields:
            A response a token, and each call of a tool before and after it is run.

        Raises:
            RequestError: the question is empty, or the context has no room for it.
        """
        if not question.strip():
            raise RequestError("the question is empty; it needs at least one character that is not white space")
        prompt = self.prompt_ids(question)
        if len(prompt) >= self.context:
            raise RequestError(
                f"the conversation would come to {len(prompt):,} tokens, and the context holds {self.context:,}; "
                "/reset starts anew, /undo takes back a turn"
            )
        plan = plan_context(self.model, self.cache_options.kv_bits, self.cache_options.max_kv_size)
        check_context(plan, len(prompt))
        loop = ToolLoop(
            self.model,
            self.tokenizer,
            prompt,
            self.toolbox,
            self.cache,
            options,
            grammar=grammar,
            approve=approve,
        )
        return self._answer(question, loop)

    def _answer(self, question: str, loop: ToolLoop) -> Generator[Event, None, None]:
        self.usage = Usage()
        events = loop.events()
        try:
            with contextlib.closing(events):
                for event in events:
                    if isinstance(event, GenerationResponse):
                        _count(self.usage, event, loop.prompt_tokens)
                    elif isinstance(event, ToolCall):
                        self.usage = Usage(reprefilled=self.usage.reprefilled)
                    yield event
                self.usage.finish_reason = loop.finish_reason or None
        except Interrupted:
            return
        except BaseException as error:
            # Anywhere else an exception may leave the layers of the cache at different lengths. GeneratorExit is the
            # caller's way to stop between two tokens.
            if not isinstance(error, GeneratorExit):
                self.forget_cache()
            raise
        finally:
            if any(each.ids for each in loop.rounds) or self.usage.finish_reason:
                self.turns.append(_turn(question, loop.rounds))


def _turn(question: str, rounds: Sequence[Round]) -> Turn:
    """A turn of its rounds, of which the last is the answer unless it calls tools."""
    *before, last = rounds
    if last.calls:
        return Turn(question, "", (), tuple(rounds))
    return Turn(question, last.text, tuple(last.ids), tuple(before))


def reply_ids(tokenizer: Tokenizer, text: str, calls: Sequence[ToolCall] = ()) -> list[int]:
    """A reply that was not drawn here as ids: its text as text, and behind it its calls as the model writes them."""
    if not calls:
        return tokenizer.encode(text)
    written = json_text([{"name": call.name, "arguments": call.arguments} for call in calls])
    return tokenizer.encode_pieces([text, Control("<|tool_call|>"), written, Control("<|/tool_call|>")])


def _count(usage: Usage, event: GenerationResponse, prompt_tokens: int) -> None:
    usage.prompt_tokens = prompt_tokens
    usage.cached_tokens = prompt_tokens - event.prompt_tokens
    usage.answer_tokens = event.generation_tokens
    usage.prompt_tps = event.prompt_tps
    usage.answer_tps = event.generation_tps
    usage.reprefilled += event.reprefilled
    usage.peak_memory = event.peak_memory
    usage.finish_reason = event.finish_reason
