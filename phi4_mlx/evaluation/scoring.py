"""Log-probabilities of texts after contexts, in batch: a beginning that several share is run once.

Each score equals that of the whole sequence run alone, under the RoPE table of its own length.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from phi4_mlx.errors import CheckpointError
from phi4_mlx.evaluation.answers import Answers, key_of
from phi4_mlx.evaluation.plan import Ids, Node, packs
from phi4_mlx.evaluation.rolling import windows
from phi4_mlx.evaluation.sharing import share_out
from phi4_mlx.evaluation.subject import Progress, Subject
from phi4_mlx.generation.memory import PREFILL_STEP_SIZE, cache_bytes, check_context, plan_context, room_for_rows
from phi4_mlx.generation.steps import finish_chunk
from phi4_mlx.models.batch_cache import BatchCache
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.models.rope import Regime
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.amount import amount

MAX_ROWS = 64
LOGITS = 2**24  # logits in float32 that are in memory at a time, 64 MB


@dataclass(frozen=True)
class Score:
    """The score of a continuation.

    Attributes:
        logprob: the sum of the natural log-probabilities of its tokens.
        greedy: True if each of its tokens is the likeliest one.
        tokens: the number of its tokens.
    """

    logprob: float
    greedy: bool
    tokens: int


def scores(
    subject: Subject,
    requests: Sequence[tuple[list[int], list[int]]],
    answers: Answers,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores continuations.

    The RoPE table is that of the tokens that are run: those of context and continuation without the last one. An empty
    context stands for the token that begins a text. A sequence that is longer than the model's context is cut from the
    left; a continuation that is longer is scored in windows. A warning says how many there were.

    Args:
        subject: the model.
        requests: (ids of the context, ids of the continuation).
        answers: each score is written before the next pass, and those found there are not computed again.
        progress: called with (done, in all).

    Returns:
        The scores, in order.

    Raises:
        RequestError: ids are outside the vocabulary, or a sequence does not fit the memory.
        CheckpointError: the model computed NaN or infinity.
    """
    pairs = [(list(context) or [subject.start_id], list(continuation)) for context, continuation in requests]
    longest = subject.model.config.max_position_embeddings
    for context, continuation in pairs:
        subject.model.check_ids([*context, *continuation])
    cut = sum(len(context) + len(continuation) > longest + 1 for context, continuation in pairs)
    if cut:
        warnings.warn(
            f"{amount(cut, 'sequence')} of {len(pairs):,} longer than the model's context of {longest:,} tokens: cut "
            "from the left, or scored in windows",
            stacklevel=2,
        )
    keys = [key_of(subject.fingerprint, "score", pair) for pair in pairs]

    requests_by_key = dict(zip(keys, pairs, strict=True))

    def run(own: Sequence[str]) -> None:
        _Scoring(subject.model, {key: requests_by_key[key] for key in own}, answers, progress).run()

    sizes = {key: len(context) + len(continuation) for key, (context, continuation) in requests_by_key.items()}
    found = share_out(subject.group, sizes, answers, run)
    return [Score(**found[key]) for key in keys]


@dataclass(eq=False)
class _Request:
    """A continuation under way.

    Attributes:
        key: of its answer.
        tokens: of the continuation.
        left: tokens without a log-probability.
    """

    key: str
    tokens: int
    left: int
    logprob: float = 0.0
    greedy: bool = True

    def take(self, logprob: float, greedy: bool) -> None:
        """Takes the log-probability of one token."""
        if not math.isfinite(logprob):
            raise CheckpointError(
                "the model computed NaN or infinity instead of logits: its weights or the adapter's are damaged, or "
                "too large for their dtype; get them again, or convert with --dtype float32"
            )
        self.logprob, self.greedy, self.left = self.logprob + logprob, self.greedy and greedy, self.left - 1

    @property
    def score(self) -> dict[str, float | bool | int]:
        """The finished score, as JSON."""
        return {"logprob": self.logprob, "greedy": self.greedy, "tokens": self.tokens}


@dataclass(frozen=True)
class _Target:
    """The tokens of a request that one sequence predicts: from position `first` on."""

    request: _Request
    first: int
    tokens: Ids


@dataclass(frozen=True)
class _Wanted:
    """A token whose log-probability a pass computes, at a row and a position of its sequence."""

    row: int
    at: int
    token: int
    request: _Request


class _Scoring:
    """The passes over the requests of one process."""

    def __init__(
        self,
        model: LanguageModel,
        requests: Mapping[str, tuple[list[int], list[int]]],
        answers: Answers,
        progress: Progress | None,
    ) -> None:
        self._model, self._answers, self._progress = model, answers, progress
        self._plan = plan_context(model)
        # By the tokens that are run; those of answered requests too, so that a resumed run has the same passes.
        self._targets: dict[Ids, list[_Target]] = {}
        empty = []
        for key, (context, continuation) in requests.items():
            request = None if answers.get(key) is not None else _Request(key, len(continuation), len(continuation))
            for window in windows(context, continuation, model.config.max_position_embeddings):
                targets = self._targets.setdefault(window.ids, [])
                if request is not None:
                    targets.append(_Target(request, window.first, window.targets))
            if request is not None and not continuation:
                empty.append(request)
        self._total, self._done = len(requests), sum(answers.get(key) is not None for key in requests)
        self._put(empty)

    def run(self) -> None:
        """Scores everything that has not been answered."""
        check_context(replace(self._plan, ways_out=("leave it out",)), max(map(len, self._targets), default=1))
        for regime in ("short", "long"):
            sequences = sorted(ids for ids in self._targets if self._model.regime(len(ids)) == regime)
            if sequences:
                self._run_tree(sequences, regime)

    def _run_tree(self, sequences: list[Ids], regime: Regime) -> None:
        """Runs the sequences of one RoPE table."""
        stack = [(Node(sequences, 0), self._model.make_cache(regime))]
        while stack:
            node, cache = stack.pop()
            if not any(map(self._waits, node.sequences)):
                continue
            stop = node.stop
            self._extend(cache, node.sequences, node.start, stop)
            rows, nodes = node.split()
            # The largest is run last, so that the caches held for others are few.
            stack += [(below, cache.fork(stop)) for below in reversed(nodes)]
            for pack in packs(rows, stop, self._most_rows, PREFILL_STEP_SIZE):
                waiting = [ids for ids in pack if self._waits(ids)]
                if len(waiting) == 1:
                    self._extend(cache.fork(stop), waiting, stop, len(waiting[0]))
                elif waiting:
                    self._run_rows(cache, waiting, stop)

    def _waits(self, ids: Ids) -> bool:
        return any(target.request.left for target in self._targets[ids])

    def _extend(self, cache: PromptCache, sequences: list[Ids], start: int, stop: int) -> None:
        """Runs the tokens from start to stop, which all sequences share, in one row."""
        ids = sequences[0]
        for begin in range(start, stop, PREFILL_STEP_SIZE):
            end = min(begin + PREFILL_STEP_SIZE, stop)
            wanted = [each for other in sequences for each in self._wanted(0, other, begin, end)]
            with shared_stream():
                rows = end - min((each.at for each in wanted), default=end - 1)
                hidden = self._model.hidden(mx.array([ids[begin:end]]), cache, rows=rows)
                finish_chunk(cache, False)
                self._score(hidden, end - rows, wanted)

    def _run_rows(self, cache: PromptCache, sequences: list[Ids], start: int) -> None:
        """Runs what is left of each sequence as a row of one pass, padded on the right."""
        stop = max(map(len, sequences))
        wanted = [each for row, ids in enumerate(sequences) for each in self._wanted(row, ids, start, stop)]
        begin = min(each.at for each in wanted)
        with shared_stream():
            batch: PromptCache | BatchCache = self._model.make_cache(cache.regime)
            if start:
                batch = self._model.make_batch_cache(cache.regime)
                batch.join([cache] * len(sequences))
            padded = mx.array([[*ids[start:], *[0] * (stop - len(ids))] for ids in sequences])
            self._score(self._model.hidden(padded, batch, rows=stop - begin), begin, wanted)

    def _wanted(self, row: int, ids: Ids, start: int, stop: int) -> Iterator[_Wanted]:
        """The tokens that the positions from start to stop of a sequence predict."""
        for target in self._targets[ids]:
            if target.request.left:
                for at in range(max(start, target.first), min(stop, target.first + len(target.tokens))):
                    yield _Wanted(row, at, target.tokens[at - target.first], target.request)

    def _score(self, hidden: mx.array, begin: int, wanted: Sequence[_Wanted]) -> None:
        """Takes log-probabilities from hidden states [B, rows, D], the first of position `begin`, and writes scores."""
        places: dict[tuple[int, int], list[_Wanted]] = {}
        for each in wanted:
            places.setdefault((each.row, each.at - begin), []).append(each)
        at_once = max(1, LOGITS // self._model.config.vocab_size)
        some_places = list(places.items())
        for first in range(0, len(places), at_once):
            some = some_places[first : first + at_once]
            rows, columns = mx.array([row for (row, _), _ in some]), mx.array([column for (_, column), _ in some])
            logits = self._model.logits(hidden[rows, columns]).astype(mx.float32)  # [n, V]
            likeliest, total = mx.argmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)
            numbers = [n for n, (_, here) in enumerate(some) for _ in here]
            here = [each for _, here in some for each in here]
            index = mx.array(numbers)
            logprobs = logits[index, mx.array([each.token for each in here])] - total[index]
            mx.eval(likeliest, logprobs)
            best: list[int] = likeliest.tolist()
            for n, each, logprob in zip(numbers, here, logprobs.tolist(), strict=True):
                each.request.take(logprob, best[n] == each.token)
        mx.clear_cache()
        if wanted:
            self._put([request for request in {each.request: None for each in wanted} if not request.left])

    def _put(self, finished: Sequence[_Request]) -> None:
        """Writes scores."""
        if finished:
            self._answers.put_all({request.key: request.score for request in finished})
        self._done += len(finished)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _most_rows(self, length: int) -> int:
        """Rows of `length` tokens that fit the memory beside the caches of two single ones, and logits."""
        free = room_for_rows(self._plan, length) - self._plan.cache_bytes(length) - 2 * 4 * LOGITS
        return max(1, min(MAX_ROWS, free // cache_bytes(self._plan.cost, length, snapshots=0)))
