"""The sequence of a job: its model and adapter, its sampler, its guesses and the kind of its cache."""

from __future__ import annotations

from phi4_mlx.errors import RequestError
from phi4_mlx.generation.memory import cache_bytes
from phi4_mlx.generation.options import LogitsMask
from phi4_mlx.generation.sequence import BatchSequence
from phi4_mlx.generation.speculate import make_proposer
from phi4_mlx.models.cache import CacheOptions
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.server.engine.adapters import JobAdapters
from phi4_mlx.server.engine.answer import last_turn
from phi4_mlx.server.engine.protocol import Job
from phi4_mlx.server.engine.settings import Settings
from phi4_mlx.tokens.prompt import Prompt, places_of
from phi4_mlx.tokens.tokenizer import Tokenizer


class JobSequences:
    """Makes the sequences of jobs.

    Args:
        base: the model, without the adapters of the settings.
        tokenizer: of the model.
        settings: of the engine.
        draft: the model that guesses; None for a lookup.

    Raises:
        RequestError: the model cannot do what the settings ask for; names the model and the option.
    """

    def __init__(self, base: LanguageModel, tokenizer: Tokenizer, settings: Settings, draft: LanguageModel | None):
        self._tokenizer, self._settings, self._draft = tokenizer, settings, draft
        self._guesses = _check_options(base, settings, draft)
        self._adapters = JobAdapters(base, settings.adapters, settings.adapter_path)

    @property
    def model(self) -> LanguageModel:
        """The model of jobs that name no adapter."""
        return self._adapters.get(None).model

    @property
    def context_bytes(self) -> tuple[int, int]:
        """Bytes that a context takes before its first token, with one buffer, and those of each token."""
        costs = [self.model.context_cost(self._settings.kv_bits)]
        if self._draft is not None:
            costs.append(self._draft.context_cost())
        return sum(cache_bytes(cost, 0) for cost in costs), sum(cost.token_bytes for cost in costs)

    def of(self, job: Job, constraint: LogitsMask | None) -> BatchSequence:
        """The sequence of a job.

        Raises:
            RequestError: the prompt, the adapter or a setting is not one that the model takes.
        """
        model, adapter = self._adapters.get(job.adapter)
        model.check_ids(job.prompt)
        return BatchSequence(
            model,
            Prompt(job.prompt, places_of(job.prompt)),
            job.max_tokens,
            job.sampling.sampler(),
            job.sampling.processors(),
            constraint,
            last_turn=last_turn(job.prompt, self._tokenizer.eos_ids),
            adapter=adapter,
            kv_bits=self._settings.kv_bits,
            priority=job.priority,
            proposer=make_proposer(self._settings.speculate, model, self._draft) if self._guesses else None,
            end_ids=self._tokenizer.eos_ids,
        )


def _check_options(base: LanguageModel, settings: Settings, draft: LanguageModel | None) -> bool:
    """Checks that the model can do what the settings ask for; returns True if answers are guessed."""
    kind = getattr(base.config, "model_type", "this model")
    try:
        base.layer_caches(CacheOptions(None, settings.kv_bits))
    except RequestError as error:
        raise RequestError(f"{kind}: {error}") from None
    rewindable = base.make_batch_cache("short").rewindable
    asked = "--draft-model" if draft is not None else "--speculate lookup" if settings.speculate == "lookup" else None
    if asked and not rewindable:
        raise RequestError(
            f"{kind} cannot take back wrong guesses of one answer among several: it has recurrent states; leave out "
            f"{asked}"
        )
    make_proposer(settings.speculate, base, draft)
    return rewindable and settings.speculate != "off"
