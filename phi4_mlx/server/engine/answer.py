"""One job of the engine while it is answered, and the values that its events are made of."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import mlx.core as mx

from phi4_mlx.errors import CheckpointError, Phi4Error, message_of
from phi4_mlx.generation.options import LogitsMask, is_forced
from phi4_mlx.generation.sequence import BatchSequence, Token
from phi4_mlx.generation.stream import AnswerText
from phi4_mlx.server.engine.protocol import Failure, Job, TokenLogprob
from phi4_mlx.terminal.printable import one_line
from phi4_mlx.tokens.tokenizer import Tokenizer

MESSAGE_CHARS = 400  # of an exception's message


@dataclass(eq=False)
class Answer:
    """A running job.

    Attributes:
        job: as it was submitted.
        sequence: its prompt and its tokens so far.
        text: the text of its tokens, up to a stop string.
        ends_at: its time limit, on the monotonic clock.
        cached_tokens: of the prompt; None until they are looked up.
        tokens: sent so far.
    """

    job: Job
    sequence: BatchSequence
    text: AnswerText
    ends_at: float
    cached_tokens: int | None = None
    tokens: int = 0

    @property
    def forced(self) -> bool:
        """True once its grammar forces it to its end, at max_tokens."""
        return is_forced(self.sequence.logits_mask)


def last_turn(prompt: Sequence[int], end_ids: Container[int]) -> int:
    """Tokens of a prompt before its last turn; 0 if there is no earlier one."""
    starts = [0, 0, *(n + 1 for n, token in enumerate(prompt) if token in end_ids)]
    return starts[-2]


def compiled_constraint(tokenizer: Tokenizer, vocab_size: int, job: Job) -> LogitsMask:
    """The constraint of a job's grammar; slow, so it runs in a thread."""
    from phi4_mlx.grammar.constraint import Constraint
    from phi4_mlx.grammar.grammars import Grammar

    return Constraint(Grammar(job.grammar or ""), tokenizer, vocab_size, job.max_tokens)


def token_logprob(tokenizer: Tokenizer, event: Token, count: int) -> TokenLogprob:
    """The log-probability of a drawn token, and the `count` likeliest alternatives."""
    text = tokenizer.token_bytes(event.token)
    if event.logprobs is None:  # forced by a grammar
        return TokenLogprob(text, 0.0, ((text, 0.0),) if count else ())
    likeliest = mx.argpartition(-event.logprobs, max(count - 1, 0))[:count]
    top = [(tokenizer.token_bytes(token), event.logprobs[token].item()) for token in likeliest.tolist()]
    top.sort(key=lambda each: -each[1])
    return TokenLogprob(text, event.logprobs[event.token].item(), tuple(top))


def failure_of(job: Job, error: Exception) -> Failure:
    """The failure of a job: 400 for a mistake of its client, 500 for ours or the model's."""
    if isinstance(error, Phi4Error):
        return Failure(job.id, 500 if isinstance(error, CheckpointError) else 400, short_message(error))
    return Failure(job.id, 500, f"the engine could not answer: {type(error).__name__}: {short_message(error)}")


def short_message(error: Exception) -> str:
    """The message of an exception in one line, cut at `MESSAGE_CHARS`."""
    message = one_line(message_of(error))
    return message if len(message) <= MESSAGE_CHARS else message[:MESSAGE_CHARS] + "..."
