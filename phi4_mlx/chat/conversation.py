"""A conversation: its turns, the token ids that the model drew for them, and the prompt cache of both.

A reply is kept as the ids that were drawn and never encoded again from its text, so that the next prompt begins with
the cached tokens and only the new ones are prefilled. Each prompt is built from the turns, and the cache reuses the
prefix that it shares: to undo, retry or change the system prompt, change the turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from phi4_mlx.agent import AgentEvent, Approval, Message, Round, ToolLoop
from phi4_mlx.chat.stored_caches import StoredCaches
from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import ContextPlan, check_context, plan_context
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.stream import GenerationResponse
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.tokens.overflow import Overflow, keep_latest
from phi4_mlx.tokens.prompt import Prompt
from phi4_mlx.tokens.tokenizer import Control
from phi4_mlx.tools.calls import ToolCall
from phi4_mlx.tools.json_text import json_text
from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN
from phi4_mlx.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from phi4_mlx.grammar.grammars import Grammar
    from phi4_mlx.models.model import LanguageModel
    from phi4_mlx.tokens.media.media_file import MediaFile
    from phi4_mlx.tokens.tokenizer import Tokenizer


class Interrupted(Exception):
    """Raised by the progress callback of a long prefill to stop it."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: the user's text.
        answer: the reply's text, with the thoughts at its start.
        ids: the reply's tokens as they were drawn, without the end marker.
        rounds: the replies before that one, each with its tool calls and their results.
        media: the pictures and sounds before the question's text.
    """

    question: str
    answer: str
    ids: tuple[int, ...]
    rounds: tuple[Round, ...] = ()
    media: tuple[MediaFile, ...] = ()

    @property
    def message(self) -> Message:
        """The question as a message for the chat format."""
        media = [each.part for each in self.media if each.medium is not None]
        text = {"type": "text", "text": self.question}
        return {"role": "user", "content": [*media, text] if media else self.question}


@dataclass
class Usage:
    """Token counts, speeds and memory of an answer; after tool calls, of its last round.

    Attributes:
        prompt_tokens: of the whole prompt.
        cached_tokens: those of the prompt that were cached before.
        answer_tokens: drawn.
        prompt_tps: prefilled tokens per second.
        answer_tps: drawn tokens per second.
        reprefilled: tokens run again because the conversation crossed the RoPE boundary; of all rounds.
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
        model: from `load`.
        tokenizer: from `load`.
        system: the system prompt, or None.
        toolbox: the tools that the model may call.
        turns: the finished turns; may be changed between two questions.
        usage: of the last answer.
        cache_options: the kind of cache to make.
        overflow: at the end of the context, "stop" refuses a question and "oldest" leaves out the oldest turns.
        store: keeps prompt caches for the next start.
        cache: the prompt cache.
        dropped: number of turns at the front that the cached prompt leaves out.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    system: str | None = None
    toolbox: Toolbox = field(default_factory=Toolbox)
    turns: list[Turn] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    cache_options: CacheOptions = field(default_factory=CacheOptions)
    overflow: Overflow = "stop"
    store: StoredCaches = field(default_factory=StoredCaches)

    def __post_init__(self) -> None:
        self.forget_cache()

    @property
    def context(self) -> int:
        """The longest conversation with this model, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def plan(self) -> ContextPlan:
        """The memory plan of a conversation, with the most tokens that this machine has room for."""
        return plan_context(self.model, self.cache_options.kv_bits, self.cache_options.max_kv_size)

    def switch(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        """Continues with another model, unless it refuses `cache_options` or no media; replies are encoded again."""
        cache = model.make_cache(**vars(self.cache_options))
        turns = [
            replace(
                turn,
                ids=tuple(reply_ids(tokenizer, turn.answer)),
                rounds=tuple(replace(each, ids=reply_ids(tokenizer, each.text, each.calls)) for each in turn.rounds),
                media=tuple(each.switched(self.tokenizer, tokenizer) for each in turn.media),
            )
            for turn in self.turns
        ]
        self.close()
        self.store.switch(model, tokenizer)
        self.model, self.tokenizer, self.turns, self.cache, self.dropped = model, tokenizer, turns, cache, 0

    def close(self) -> None:
        """Stores the prompt cache for the next start."""
        self.store.close(self.model, self.cache)

    def forget_cache(self) -> None:
        """Replaces the cache with an empty one; the next prompt is prefilled whole."""
        self.cache, self.dropped = self.model.make_cache(**vars(self.cache_options)), 0

    def drop_other_tokens(self) -> None:
        """Drops cached tokens that are not part of the turns, such as those of a turn taken back.

        A cache that has dropped its oldest tokens stays as it is.
        """
        if self.cache.is_trimmable() or self.cache.needs_snapshots:
            self.cache.keep_shared(self.ids())

    def check_tools(self) -> None:
        """Checks that the chat format has a place for the tools, by rendering a prompt.

        Raises:
            RequestError: it has none.
        """
        if self.toolbox:
            self.prompt_ids("")

    def ids(self) -> Prompt:
        """The ids of the turns that are not dropped, as the model read and drew them."""
        return self._ids(self.turns[self.dropped :])

    def prompt_ids(self, question: str) -> Prompt:
        """The ids of all turns, `question`, and the start of an answer."""
        return self._ids([*self.turns, _open_turn(question)])

    def _ids(self, turns: Sequence[Turn]) -> Prompt:
        ids = Prompt()
        for turn in turns:
            self._ask(ids, turn)
            self._reply(ids, turn)
        return ids

    def _length(self, turn: Turn) -> int:
        """The tokens of a turn in a prompt."""
        ids = Prompt()
        self._continue(ids, turn)
        self._reply(ids, turn)
        return len(ids)

    def _reply(self, ids: Prompt, turn: Turn) -> None:
        """Appends the replies of a turn and the results of their calls."""
        for each in turn.rounds:
            ids += each.ids
            self.tokenizer.chat_format.append(self.tokenizer, ids, each.result_messages())
        ids += turn.ids

    def _ask(self, ids: Prompt, turn: Turn) -> None:
        """Appends a question to the ids of the turns before it; without any, the system prompt comes first."""
        if ids:
            return self._continue(ids, turn)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, turn.message]
        ids += self.tokenizer.chat_format.render(self.tokenizer, messages, self.toolbox.declarations or None)

    def _continue(self, ids: Prompt, turn: Turn) -> None:
        """Appends a question; also closes a reply that was cut before its end marker."""
        self.tokenizer.chat_format.append(self.tokenizer, ids, [turn.message])

    def ask(
        self,
        question: str,
        options: DecodeOptions,
        media: Sequence[MediaFile] = (),
        *,
        grammar: Grammar | None = None,
        approve: Approval | None = None,
    ) -> Generator[AgentEvent, None, None]:
        """Yields the answer to a question as it is drawn. It becomes a turn, even if the caller closes it early.

        Args:
            question: the user's text; with media, it may be empty.
            options: of the answer, which is shorter than `max_tokens` if the context or the memory ends earlier. The
                progress callback may raise `Interrupted`, which ends the answer; without a drawn token there is no
                turn.
            media: the pictures and sounds before the text.
            grammar: the grammar of the first answer, or None.
            approve: as in `run_tools`; may raise `Interrupted` too.

        Yields:
            A `GenerationResponse` for each token, a `ToolCall` before each call is run, and its `ToolResult`.

        Raises:
            RequestError: the question is empty, or the context or the memory has no room for it.
        """
        if not question.strip() and not media:
            raise RequestError("the question is empty; it needs at least one character that is not white space")
        plan = self.plan
        asked = _open_turn(question, media)
        turns = [*self.turns, asked]

        def fitted(after: int = 0) -> tuple[list[int], int]:
            if self.overflow == "stop":
                return self._ids(turns), 0
            return keep_latest(turns, self._ids, self._length, plan.most_tokens, options.max_tokens, after)

        def shorten(after: int) -> list[int]:
            prompt, self.dropped = fitted(after)
            return prompt

        prompt, dropped = fitted()
        if len(prompt) >= self.context:
            raise RequestError(_too_long(self, len(prompt)))
        check_context(plan, len(prompt))
        self.dropped = dropped
        self.cache = self.store.recalled(self.model, self.cache, prompt)
        loop = ToolLoop(
            self.model, self.tokenizer, prompt, self.toolbox, self.cache, options,
            grammar=grammar, approve=approve, longest=plan.most_tokens,
            thinks=self.tokenizer.chat_format.reasons, shorten=None if self.overflow == "stop" else shorten,
        )  # fmt: skip
        return self._answer(asked, loop)

    def _answer(self, asked: Turn, loop: ToolLoop) -> Generator[AgentEvent, None, None]:
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
            # An exception within a step may leave the layers of the cache at different lengths. GeneratorExit comes
            # between two steps, from a caller who closes the answer.
            if not isinstance(error, GeneratorExit):
                self.forget_cache()
            raise
        finally:
            if any(each.ids for each in loop.rounds) or self.usage.finish_reason:
                self.turns.append(_answered(asked, loop.rounds))
            self.store.keep(self.model, self.cache)


def _too_long(conversation: Conversation, length: int) -> str:
    """The message for a question that does not fit."""
    holds = f"tokens long, and the context holds {conversation.context:,}{conversation.model.config.context_note}"
    if conversation.overflow == "oldest":
        return f"without any earlier turn, the prompt is still {length:,} {holds}; shorten the question"
    if not conversation.turns:
        return f"the prompt is {length:,} {holds}; shorten the question"
    message = f"the conversation would be {length:,} {holds}; /reset begins a new one, /undo takes back a turn"
    return f"{message}; a chat started with --context-overflow oldest leaves out the oldest turns"


def _open_turn(question: str, media: Sequence[MediaFile] = ()) -> Turn:
    """A question without an answer."""
    return Turn(question, "", (), media=tuple(media))


def _answered(asked: Turn, rounds: Sequence[Round]) -> Turn:
    """A question with its rounds. The last one is the answer, unless it calls tools."""
    *before, last = rounds
    if last.calls:
        return replace(asked, rounds=tuple(rounds))
    return replace(asked, answer=last.text, ids=tuple(last.ids), rounds=tuple(before))


def reply_ids(tokenizer: Tokenizer, text: str, calls: Sequence[ToolCall] = ()) -> list[int]:
    """The ids of a reply known only by its text and calls: plain text, then the calls as the model writes them."""
    if not calls:
        return tokenizer.encode(text)
    written = json_text([{"name": call.name, "arguments": call.arguments} for call in calls])
    return tokenizer.encode_pieces([text, Control(CALLS_OPEN), written, Control(CALLS_CLOSE)])


def _count(usage: Usage, event: GenerationResponse, prompt_tokens: int) -> None:
    usage.prompt_tokens = prompt_tokens
    usage.cached_tokens = prompt_tokens - event.prompt_tokens
    usage.answer_tokens = event.generation_tokens
    usage.prompt_tps = event.prompt_tps
    usage.answer_tps = event.generation_tps
    usage.reprefilled += event.reprefilled
    usage.peak_memory = event.peak_memory
    usage.finish_reason = event.finish_reason
