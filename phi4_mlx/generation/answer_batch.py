"""Answers to many requests, drawn in one batch; each is the answer that its request gets alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.answer import AnswerAssembler
from phi4_mlx.generation.batch import PREFILL_STEP_SIZE, Batch
from phi4_mlx.generation.memory import ContextPlan, room_for_rows
from phi4_mlx.generation.options import LogitsMask, is_forced
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.generation.thoughts import ThoughtSplitter
from phi4_mlx.grammar.grammars import Grammar
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.tokens.prefix import shared_length
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.calls import ToolCall

MAX_ROWS = 64


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """A prompt and the settings of its answer.

    Attributes:
        key: tells requests apart; the answer does not depend on it.
        ids: the prompt's.
        max_tokens: the most tokens to draw.
        sampling: settings of the draws.
        stops: strings that end the answer before them, matched while it is drawn, after the thoughts.
        tools: declared to the model; their calls are parsed.
        grammar: restricts the answer; None allows any.
        thinks: True separates the thoughts at the start.
    """

    key: str
    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    tools: Sequence[Any] = ()
    grammar: Grammar | None = None
    thinks: bool = False


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: as drawn, up to the stop string or the end marker.
        content: without reasoning, and without the calls of declared tools.
        reasoning: the thoughts.
        calls: of declared tools.
        finish_reason: "stop" or "length".
        tokens: drawn.
        prompt_tokens: of the prompt.
    """

    text: str
    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    tokens: int
    prompt_tokens: int

    def to_json(self) -> JsonObject:
        """The answer as JSON."""
        return {**vars(self), "calls": [[call.name, call.arguments] for call in self.calls]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Answer:
        """The answer of `to_json`."""
        return cls(**{**value, "calls": tuple(ToolCall(*call) for call in value["calls"])})


class AnswerBatch:
    """The answers that are being drawn.

    Args:
        model: the model that answers.
        tokenizer: of the model.
        plan: of the model's memory; the caches take half of what it leaves.
        kv_bits: of keys and values; None leaves them unquantised.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, plan: ContextPlan, kv_bits: int | None = None
    ) -> None:
        self._model, self._tokenizer, self._kv_bits = model, tokenizer, kv_bits
        self._batch = Batch(MAX_ROWS, room_for_rows(plan, 0), prefixes=_Beginnings())
        self._drawings: dict[BatchSequence, _Drawing] = {}
        self._unread: dict[BatchSequence, int] = {}  # tokens of a prompt that its predecessor does not share
        self._before: Sequence[int] = []

    def __len__(self) -> int:
        return len(self._drawings)

    def fill(self, queue: deque[AnswerRequest]) -> None:
        """Starts requests from the left of a queue while there is room for them.

        A request starts only when the beginning that it shares with the one before it is in a cache.
        """
        self._unread = {
            sequence: tokens
            for sequence, tokens in self._unread.items()
            if sequence in self._drawings and not sequence.drawn
        }
        while queue and len(self._drawings) < MAX_ROWS:
            new = len(queue[0].ids) - shared_length(self._before, queue[0].ids)
            if self._unread and sum(self._unread.values()) + new > PREFILL_STEP_SIZE:
                return
            request = queue.popleft()
            sequence = self._sequence(request)
            if queue:  # models whose caches cannot be trimmed branch off at a snapshot
                sequence.last_turn = shared_length(request.ids, queue[0].ids)
            self._drawings[sequence] = _Drawing(self._tokenizer, request, sequence)
            self._unread[sequence], self._before = new, request.ids
            self._batch.add(sequence)

    def step(self) -> list[tuple[AnswerRequest, Answer | Exception]]:
        """Draws a token of each answer; returns the requests that are finished, or cannot be."""
        finished: list[tuple[AnswerRequest, Answer | Exception]] = []
        for event in self._batch.step():
            if isinstance(event, Fault):
                finished.append((self._drawings.pop(event.sequence).request, event.error))
            else:
                self._drawings[event.sequence].add(event.token)
        for sequence, drawing in [*self._drawings.items()]:
            if drawing.finish_reason:
                self._batch.end(sequence)
                del self._drawings[sequence]
                finished.append((drawing.request, drawing.answer()))
        return finished

    def _sequence(self, request: AnswerRequest) -> BatchSequence:
        sampling = request.sampling
        sampler = sampling.sampler() if sampling.temp else None
        return BatchSequence(
            self._model, [*request.ids], request.max_tokens, sampler, sampling.processors(), self._mask(request),
            kv_bits=self._kv_bits,
        )  # fmt: skip

    def _mask(self, request: AnswerRequest) -> LogitsMask | None:
        if request.grammar is None:
            return None
        from phi4_mlx.grammar.constraint import Constraint

        return Constraint(request.grammar, self._tokenizer, self._model.config.vocab_size, request.max_tokens)


class _Drawing:
    """An answer as it is drawn: the text is decoded, its thoughts are separated, then stop strings are matched."""

    def __init__(self, tokenizer: Tokenizer, request: AnswerRequest, sequence: BatchSequence) -> None:
        self.request = request
        self.finish_reason = ""
        self._sequence = sequence
        self._ends = tokenizer.eos_ids
        self._after = _AfterThoughts(tokenizer, request.thinks)
        self._text = AnswerText(self._after, list(request.stops))
        self._pieces: list[str] = []
        self._tokens = 0

    def add(self, token: int) -> None:
        """Takes the next token, and finds out whether it is the last one; what a grammar forces after it is left."""
        if self.finish_reason:
            return
        self._tokens += 1
        ended = token in self._ends
        stopped = False
        if not ended:
            piece, stopped = self._text.add(token)
            self._pieces.append(piece)
        if ended or stopped or self._tokens == self.request.max_tokens:
            self._pieces.append(self._text.finish())
            stopped = stopped or self._text.stopped_by is not None
            whole = (ended or stopped) and not is_forced(self._sequence.logits_mask)
            self.finish_reason = "stop" if whole else "length"

    def answer(self) -> Answer:
        """The finished answer."""
        content = "".join(self._pieces)
        parsed = AnswerAssembler(self.request.tools)
        parsed.add(content, self.finish_reason, by_stop_string=self._text.stopped_by is not None)
        return Answer(
            text=self._after.head + content,
            content=parsed.text,
            reasoning="".join(self._after.thoughts),
            calls=parsed.calls,
            finish_reason=self.finish_reason,
            tokens=self._tokens,
            prompt_tokens=len(self.request.ids),
        )


class _AfterThoughts:
    """A decoder of the text after the thoughts, which it keeps."""

    def __init__(self, tokenizer: Tokenizer, thinks: bool) -> None:
        self._decoder = tokenizer.streaming_decoder()
        self._splitter = ThoughtSplitter() if thinks else None
        self.thoughts: list[str] = []

    @property
    def head(self) -> str:
        """The text of the thoughts, with their tags."""
        return self._splitter.head if self._splitter else ""

    def add(self, token: int) -> str:
        """The text after the thoughts that a token makes final."""
        return self._without_thoughts(self._decoder.add(token))

    def finish(self) -> str:
        """The rest of the text."""
        last = self._without_thoughts(self._decoder.finish())
        if self._splitter is None:
            return last
        thought, answer = self._splitter.finish()
        self.thoughts.append(thought)
        return last + answer

    def _without_thoughts(self, text: str) -> str:
        if self._splitter is None:
            return text
        thought, answer = self._splitter.add(text)
        self.thoughts.append(thought)
        return answer


class _Beginnings:
    """The cache of the latest prompt, whose beginning the next one may share."""

    def __init__(self) -> None:
        self._latest: PromptCache | None = None

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        """See `PrefixStore`."""
        latest = self._latest
        if latest is None or latest.regime != sequence.regime:
            return None
        length = latest.reusable(shared_length(latest.keys, sequence.ids[:-1]))
        return latest.fork(length) if length else None

    def keep(self, sequence: BatchSequence) -> None:
        """See `PrefixStore`."""
        assert sequence.cache is not None
        self._latest = sequence.cache.fork(sequence.cache.offset)

    def set_aside(self, sequence: BatchSequence) -> None:
        """See `PrefixStore`."""
        self.keep(sequence)
