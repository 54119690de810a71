"""Questions that a model answers in its own words, many at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi4_mlx.errors import check_whole
from phi4_mlx.evaluation.answers import Answers, key_of
from phi4_mlx.evaluation.sharing import share_out
from phi4_mlx.evaluation.subject import Progress, Subject
from phi4_mlx.generation.answer_batch import Answer, AnswerBatch, AnswerRequest
from phi4_mlx.generation.memory import check_context, plan_context
from phi4_mlx.generation.sampling import Sampler, Sampling
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.tokenizer import Tokenizer


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
    return [Answer.from_json(found[each.key]) for each in asked]


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

    def request(self, tokenizer: Tokenizer) -> AnswerRequest:
        """The question for the batch."""
        question = self.question
        return AnswerRequest(
            self.key,
            self.ids,
            self.max_tokens,
            Sampling(question.temp, question.top_p, seed=question.seed),
            question.stops,
            question.tools or (),
            thinks=tokenizer.chat_format.reasons,
        )


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
    queue = deque(
        each.request(subject.tokenizer)
        for each in sorted(asked, key=lambda each: each.ids)
        if answers.get(each.key) is None
    )
    plan = replace(plan_context(subject.model), ways_out=("leave it out, or lower the most tokens of an answer",))
    check_context(plan, max((len(each.ids) + each.max_tokens for each in queue), default=1))
    batch = AnswerBatch(subject.model, subject.tokenizer, plan)
    while queue or batch:
        if progress is not None:
            progress(len(asked) - len(queue) - len(batch), len(asked))
        batch.fill(queue)
        for request, answer in batch.step():
            if isinstance(answer, Exception):
                raise answer
            answers.put(request.key, answer.to_json())
    if progress is not None:
        progress(len(asked), len(asked))
