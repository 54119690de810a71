"""A leader and a follower in one process, each with the whole model: what is replayed, without ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import mlx.core as mx
from mlx.utils import tree_flatten

from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.snapshot import Snapshot
from phi4_mlx.models.split_logits import LEAST, SplitLogits
from phi4_mlx.ranks.follower import Follower, HeldBatch
from phi4_mlx.ranks.leader import Leader, LedBatchCache, LedModel, LedPromptCache, lead


class Ended(Exception):
    """The job has been ended."""


class Candidates(LanguageModel):
    """A model that computes candidates by itself, as one whose head is split."""

    def candidates(self, hidden: mx.array, count: int = LEAST, temps: Sequence[float] = ()) -> mx.array | SplitLogits:
        logits: mx.array = super().logits(hidden)  # type: ignore[safe-super]
        logits = logits.reshape(-1, logits.shape[-1])
        assert len(temps) in (0, 1, len(logits)), f"{len(temps)} temperatures for {len(logits)} rows"
        return logits


class Pair:
    """A model that leads, and a follower that obeys each command when it is told.

    Args:
        make: makes the model, twice the same.
        splits_head: as in tensor parallel.

    Attributes:
        model: the leader's.
        follower: the follower.
        commands: those told, as they cross.
    """

    def __init__(self, make: Callable[[], LanguageModel], *, splits_head: bool = False) -> None:
        self.commands: list[dict[str, Any]] = []
        self.leader = Leader(self, splits_head=splits_head)
        whole, share = make(), make()
        if splits_head:
            whole.__class__ = type("Split", (Candidates, type(whole)), {})
        self.model: LedModel = lead(whole, self.leader, lambda hidden: hidden)
        self.follower = Follower(share)
        self._embeddings: list[mx.array | None] = []
        self._hand_over(self.model, share)

    def tell(
        self, command: Mapping[str, Any], counter: int | None = None, tokens: int = 1, *, new: bool = False
    ) -> None:
        """Sends a command as JSON to the follower, which obeys it at once."""
        assert counter == command["number"] and tokens > 0
        self.commands.append(json.loads(json.dumps(command)))
        self.follower.obey(self.commands[-1])

    def end(self, line: str) -> NoReturn:
        """Raises `Ended`."""
        raise Ended(line)

    def flush(self) -> None:
        """Makes the follower obey what waits for an operation."""
        mx.eval(self.model.hidden(mx.array([[1]])))

    def check(self, caches: list[LedPromptCache | LedBatchCache]) -> None:
        """Compares every cache and every snapshot with its twin, array by array."""
        self.flush()
        kept = {cache.number for cache in caches}
        for cache in caches:
            twin = self.follower.held[cache.number]
            assert [len(each) for each in twin.digests] == [len(each) for each in cache.digests]
            assert [each.value for each in twin.digests] == [each.value for each in cache.digests]
            assert [layer.offset for layer in twin.cache] == [layer.offset for layer in cache]
            assert same([layer.state for layer in cache], [layer.state for layer in twin.cache])
            if isinstance(cache, LedPromptCache):
                for snapshot in cache.snapshots:
                    number = self.leader.number_of(snapshot)
                    kept.add(number)
                    assert same(snapshot.layers, self.follower.held[number].layers)
            else:
                assert isinstance(twin, HeldBatch) and twin.cache.lengths == cache.lengths
        held = {number for number, each in self.follower.held.items() if not isinstance(each, Snapshot)}
        assert held == {cache.number for cache in caches}, "a cache that the leader has freed is still held"
        assert self.follower.held.keys() == kept, "a snapshot that the leader has freed is still held"

    def _hand_over(self, model: LanguageModel, share: LanguageModel) -> None:
        """Gives the follower the embeddings that the leader reads of media, as a pipeline's first hand-over does."""
        decoder, follower_decoder = type(model.model), share.model
        embeddings = self._embeddings

        class Giving(decoder):  # type: ignore[misc, valid-type]
            def __call__(self, ids: mx.array, *arguments: Any, **options: Any) -> mx.array:
                embeddings.append(options.get("embeddings"))
                found: mx.array = super().__call__(ids, *arguments, **options)
                return found

        class Taking(decoder):  # type: ignore[misc, valid-type]
            def __call__(self, ids: mx.array, *arguments: Any, **options: Any) -> mx.array:
                options["embeddings"] = embeddings.pop() if embeddings else None
                found: mx.array = super().__call__(ids, *arguments, **options)
                return found

        model.model.__class__, follower_decoder.__class__ = Giving, Taking


def same(one: Any, other: Any) -> bool:
    """True if two trees of arrays and numbers are equal to the bit."""
    ones, others = tree_flatten([one]), tree_flatten([other])
    return [name for name, _ in ones] == [name for name, _ in others] and all(
        mx.array_equal(mine, theirs, equal_nan=True).item() if isinstance(mine, mx.array) else mine == theirs
        for (_, mine), (_, theirs) in zip(ones, others, strict=True)
    )
