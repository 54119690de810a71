"""Drawing tokens for several sequences from the logits of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from phi4_mlx.generation.draws import Draws, apply_processors, draw
from phi4_mlx.generation.sampling import Draw
from phi4_mlx.generation.sequence import BatchSequence, Token
from phi4_mlx.models.queued import queue
from phi4_mlx.models.split_logits import Logits, array_of


class Drawing:
    """The logits of a pass, from which sequences draw.

    Args:
        logits: [n, V].
    """

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self._greedy: dict[Draw | None, Draws] = {}  # by the sampler: the likeliest token of each row

    def draw(self, due: Sequence[tuple[BatchSequence, int]]) -> Iterator[tuple[BatchSequence, list[Token] | Exception]]:
        """Draws and appends a token for each sequence.

        Args:
            due: sequences, and their rows of the logits.

        Yields:
            Each sequence with its token and those that a grammar forces after it, or with the reason of its failure.
        """
        queue(array_of(self._logits))  # the device computes them while the host computes grammar masks
        drawn: list[tuple[BatchSequence, int, Draws]] = []
        for sequence, n in due:
            try:
                drawn.append((sequence, n, self._one(sequence, n)))
            except Exception as error:
                yield sequence, error
        mx.eval([(draws.tokens, draws.scores) for *_, draws in drawn])
        for sequence, n, draws in drawn:
            try:
                while (tokens := sequence.take(draws.numbers()[0])) is None:
                    draws = self._one(sequence, n)
            except Exception as error:
                yield sequence, error
            else:
                logprobs = draws.logprobs[0]
                yield sequence, [Token(sequence, each, None if i else logprobs) for i, each in enumerate(tokens)]

    def _one(self, sequence: BatchSequence, n: int) -> Draws:
        """A token for row n, as its sequence wants it drawn."""
        if sequence.is_greedy:
            if sequence.sampler not in self._greedy:
                self._greedy[sequence.sampler] = draw(self._logits, sequence.sampler)
            return Draws(*(each[n : n + 1] for each in self._greedy[sequence.sampler]))
        row: Logits = self._logits[n : n + 1]
        if sequence.processors:
            row = apply_processors(sequence.processors, mx.array(sequence.ids), row)
        return draw(row, sequence.sampler, sequence.logits_mask.mask() if sequence.logits_mask is not None else None)
