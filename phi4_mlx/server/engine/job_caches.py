"""The caches of running jobs, kept for prompts with the same prefix: what the batch asks a prefix store for."""

from __future__ import annotations

from collections.abc import Mapping

from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.models.prompt_cache import PromptCache
from phi4_mlx.server.engine.answer import Answer
from phi4_mlx.server.engine.prefix_cache import PrefixCache


class JobCaches:
    """The prefix store of the engine's batch.

    Args:
        prefixes: where caches go.
        answers: the running jobs.

    Attributes:
        prefilled_tokens: prompt tokens computed so far, without those found in the prefix cache.
    """

    def __init__(self, prefixes: PrefixCache, answers: Mapping[BatchSequence, Answer]) -> None:
        self._prefixes, self._answers = prefixes, answers
        self.prefilled_tokens = 0

    @property
    def failures(self) -> int:
        """Caches that could not be kept, stored or read."""
        return self._prefixes.failures

    def recall(self, sequence: BatchSequence) -> PromptCache | None:
        """The cached prefix of a prompt that is about to be prefilled."""
        answer = self._answers[sequence]
        cache = self._prefixes.find(sequence.model, answer.job.adapter, sequence.ids, sequence.kv_bits)
        if answer.cached_tokens is None:  # else it has found its own cache
            answer.cached_tokens = cache.offset if cache else 0
        return cache

    def keep(self, sequence: BatchSequence) -> None:
        """Stores a prefilled prompt at once, for prompts with the same prefix."""
        answer = self._answers[sequence]
        if not answer.tokens:
            self.prefilled_tokens += len(answer.job.prompt) - (answer.cached_tokens or 0)
        self.put(answer, sequence.cache)

    def set_aside(self, sequence: BatchSequence) -> None:
        """Stores the beginning of a prompt that others wait for, or that returns to the queue."""
        self.put(self._answers[sequence], sequence.cache)

    def put(self, answer: Answer, cache: PromptCache | None) -> None:
        """Stores a cache for prompts with the same prefix; a failure only costs their prefill."""
        try:
            if cache is not None and cache.offset:
                self._prefixes.put(answer.sequence.model, answer.job.adapter, cache)
        except Exception:
            self._prefixes.failures += 1
