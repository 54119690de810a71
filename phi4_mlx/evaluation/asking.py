"""Questions that a model answers in its own words, many at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi4_mlx.errors import check_whole
from phi4_mlx.evaluation.answers import Answers, key_of
from phi4_mlx.evaluation.plan import room_for_rows
from phi4_mlx.evaluation.sharing import share_out
from phi4_mlx.evaluation.subject import Progress, Subject
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.generation.answer import AnswerAssembler
from phi4_mlx.generation.batch import PREFILL_STEP_SIZE, Batch
from phi4_mlx.generation.memory import check_context, plan_context
from phi4_mlx.generation.sampling import Sampler, make_sampler
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.generation.thoughts import ThoughtSplitter
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.prefix import shared_length
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.calls import ToolCall

MAX_ROWS = 64


@dataclass(frozen=True)
class Question:
    """A question and the settings of its answer.

    Attributes:
        name: an id for messages; the answer does not depend on it.
        prompt: messages, as for the chat template; text, in which control strings are control tokens; or ids.
        tools: declared to the model, with messages only; their calls are parsed.
        max_tokens: the most tokens to draw.
        stops: strings that end the answer before them, matched while it is drawn, after the thoughts.
        temp: temperature; 0 takes the likeliest token.
        top_p: probability mass to keep.
        seed: of the draws.
    """

    name: str
    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int]
    tools: Sequence[Any] | None = None
    max_tokens: int = 512
    stops: tuple[str, ...] = ()
    temp: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer.

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


def ask(
    subject: Subject, questions: Sequence[Question], answers: Answers, progress: Progress | None = None
) -> list[Answer]:
    """Has questions answered.

    An answer takes at most half of the model's context; where a prompt leaves less room than that, it is cut from the
    left, and a warning says how many were.

    Args:
        subject: the model.
        questions: in any order.
        answers: each answer is written as soon as it is complete, and those found there are not asked again.
        progress: called with (done, in all).

    Returns:
        The answers, in order.

    Raises:
        RequestError: a question is malformed, or does not fit the memory.
        CheckpointError: the model computed NaN or infinity.
    """
    asked = [_Asked.of(subject, question) for question in questions]
    longest = subject.model.config.max_position_embeddings
    for count, what in (
        (sum(each.cut for each in asked), "cut from the left"),
        (sum(each.max_tokens < each.question.max_tokens for each in asked), "left with fewer tokens for the answer"),
    ):
        if count:
            warnings.warn(
                f"{amount(count, 'prompt')} of {len(asked):,} {what}: with its answer, each is longer than the model's "
                f"context of {longest:,} tokens",
                stacklevel=2,
            )
    by_key = {each.key: each for each in asked}

    def run(own: Sequence[str]) -> None:
        _answer_all(subject, [by_key[key] for key in own], answers, progress)

    sizes = {key: len(each.ids) + each.max_tokens for key, each in by_key.items()}
    found = share_out(subject.group, sizes, answers, run)
    return [_read(found[each.key]) for each in asked]


@dataclass(frozen=True)
class _Asked:
    """A question as the model reads it.

    Attributes:
        key: of its answer.
        question: as given.
        ids: the prompt's.
        max_tokens: as given, or what the context has room for.
        cut: the prompt lost its beginning.
    """

    key: str
    question: Question
    ids: list[int]
    max_tokens: int
    cut: bool

    @classmethod
    def of(cls, subject: Subject, question: Question) -> _Asked:
        """Encodes and checks a question."""
        tokenizer, longest = subject.tokenizer, subject.model.config.max_position_embeddings
        check_whole(f"max_tokens of {question.name}", question.max_tokens, 1)
        Sampler(question.temp, question.top_p)
        AnswerText(tokenizer.streaming_decoder(), question.stops)
        ids = _ids(tokenizer, question) or [subject.start_id]
        subject.model.check_ids(ids)
        most = longest - min(question.max_tokens, longest // 2)
        kept = ids[max(0, len(ids) - most) :]
        max_tokens = min(question.max_tokens, longest - len(kept))
        draws = [question.temp, question.top_p, question.seed] if question.temp else None
        settings = [question.max_tokens, question.stops, draws, question.tools]
        return cls(
            key_of(subject.fingerprint, "answer", ids, settings), question, kept, max_tokens, len(kept) < len(ids)
        )

    def sequence(self, model: LanguageModel) -> BatchSequence:
        """The question for the batch."""
        question = self.question
        sampler = make_sampler(question.temp, question.top_p, seed=question.seed) if question.temp else None
        return BatchSequence(model, [*self.ids], self.max_tokens, sampler)


def _ids(tokenizer: Tokenizer, question: Question) -> list[int]:
    """The ids of a prompt."""
    prompt = question.prompt
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, specials=True)
    ids = [each for each in prompt if isinstance(each, int)]
    messages = [each for each in prompt if not isinstance(each, int)]
    return [*tokenizer.apply_chat_template(messages, question.tools)] if messages else ids


def _answer_all(subject: Subject, asked: Sequence[_Asked], answers: Answers, progress: Progress | None) -> None:
    """Answers what has no answer yet."""
    model = subject.model
    queue = deque(sorted((each for each in asked if answers.get(each.key) is None), key=lambda each: each.ids))
    plan = replace(plan_context(model), ways_out=("leave it out, or lower the most tokens of an answer",))
    check_context(plan, max((len(each.ids) + each.max_tokens for each in queue), default=1))
    batch = Batch(MAX_ROWS, room_for_rows(plan, 0), prefixes=_Beginnings())
    drawings: dict[BatchSequence, _Drawing] = {}
    unread: dict[BatchSequence, int] = {}  # tokens of a prompt that its predecessor does not share
    before: list[int] = []
    while queue or drawings:
        if progress is not None:
            progress(len(asked) - len(queue) - len(drawings), len(asked))
        unread = {
            sequence: tokens for sequence, tokens in unread.items() if sequence in drawings and not sequence.drawn
        }
        # The next prompt starts only when the beginning that it shares is in a cache.
        while queue and len(drawings) < MAX_ROWS:
            new = len(queue[0].ids) - shared_length(before, queue[0].ids)
            if unread and sum(unread.values()) + new > PREFILL_STEP_SIZE:
                break
            each = queue.popleft()
            sequence = each.sequence(model)
            if queue:  # models whose caches cannot be trimmed branch off at a snapshot
                sequence.last_turn = shared_length(each.ids, queue[0].ids)
            drawings[sequence], unread[sequence], before = _Drawing(subject.tokenizer, each), new, each.ids
            batch.add(sequence)
        for event in batch.step():
            if isinstance(event, Fault):
                raise event.error
            drawing = drawings[event.sequence]
            drawing.add(event.token)
            if drawing.finish_reason:
                batch.end(event.sequence)
                answers.put(drawing.asked.key, drawing.answer())
                del drawings[event.sequence]
    if progress is not None:
        progress(len(asked), len(asked))


class _Drawing:
    """An answer as it is drawn: the text is decoded, its thoughts are separated, then stop strings are matched."""

    def __init__(self, tokenizer: Tokenizer, asked: _Asked) -> None:
        self.asked = asked
        self.finish_reason = ""
        self._ends = tokenizer.eos_ids
        self._after = _AfterThoughts(tokenizer)
        self._text = AnswerText(self._after, asked.question.stops)
        self._pieces: list[str] = []
        self._tokens = 0

    def add(self, token: int) -> None:
        """Takes the next token, and finds out whether it is the last one."""
        self._tokens += 1
        ended = token in self._ends
        stopped = False
        if not ended:
            piece, stopped = self._text.add(token)
            self._pieces.append(piece)
        if ended or stopped or self._tokens == self.asked.max_tokens:
            self._pieces.append(self._text.finish())
            stopped = stopped or self._text.stopped_by is not None
            self.finish_reason = "stop" if ended or stopped else "length"

    def answer(self) -> JsonObject:
        """The finished answer, as JSON."""
        content = "".join(self._pieces)
        parsed = AnswerAssembler(self.asked.question.tools or ())
        parsed.add(content, self.finish_reason, by_stop_string=self._text.stopped_by is not None)
        return {
            "text": self._after.head + content,
            "content": parsed.text,
            "reasoning": "".join(self._after.thoughts),
            "calls": [[call.name, call.arguments] for call in parsed.calls],
            "finish_reason": self.finish_reason,
            "tokens": self._tokens,
            "prompt_tokens": len(self.asked.ids),
        }


class _AfterThoughts:
    """A decoder of the text after the thoughts, which it keeps."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.streaming_decoder()
        self._splitter = ThoughtSplitter() if tokenizer.chat_format.reasons else None
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
        """See `PrefixStore`; the latest prompt alone is kept."""


def _read(value: JsonObject) -> Answer:
    return Answer(**{**value, "calls": tuple(ToolCall(*call) for call in value["calls"])})
