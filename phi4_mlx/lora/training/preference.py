"""Preference tuning: of two answers to one prompt, the better one becomes the likelier one.

DPO measures both from the base, which is the model itself with its adapter off, so that there is no second model in
memory. ORPO needs no base, and learns the better answer as plain fine-tuning does besides. In either, the head runs on
the tokens of the answers alone, a few at a time.

Source: DPO (arXiv 2305.18290), equation 7; ORPO (arXiv 2403.07691), equations 6 and 7.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from phi4_mlx.adapters.layers import adapter_off, adapter_parameters
from phi4_mlx.errors import RequestError
from phi4_mlx.lora.data.batches import Batch
from phi4_mlx.lora.settings import OPTIONS
from phi4_mlx.lora.training.loss import token_losses
from phi4_mlx.models.model import LanguageModel

REMEMBERED = 1000  # batches that figures are of, for a caller who never asks for them
SURE = 1e-6  # nats a token: an answer likelier than this has odds of a million to one, and no gradient of them


@dataclass(frozen=True)
class Figures:
    """How the pairs of some batches fared; all 0 where there were none.

    Attributes:
        pairs: how many.
        accuracy: the share of them whose chosen answer is ahead, from 0 to 1.
        margin: by how much it is, on average: DPO's reward, that is beta times how much likelier than under the base
            the chosen answer has become, less the same of the rejected one; in ORPO the log of the odds ratio. In nats.
    """

    pairs: int = 0
    accuracy: float = 0.0
    margin: float = 0.0


class PreferenceLoss:
    """What DPO or ORPO minimises: a loss of the trainer's, which remembers how the pairs fared.

    Args:
        task: "dpo" or "orpo".
        beta: how dear it is to DPO to leave the base, or the weight of ORPO's preference; from 1e-6 to 100.

    Raises:
        RequestError: the task is not known, or beta out of range.
    """

    def __init__(self, task: str, beta: float = 0.1):
        if task not in _TASKS:
            raise RequestError(f"task {task!r} is no preference tuning; known are {', '.join(_TASKS)}")
        OPTIONS["beta"].check("beta", beta)
        self._compare, self._beta = _TASKS[task], beta
        self._margins: deque[mx.array] = deque(maxlen=REMEMBERED)

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
        """Mean loss over the pairs of a batch; differentiable.

        Args:
            model: the model; for DPO with an adapter on it, and nothing else to be trained.
            batch: rows of pairs, as `Batches` makes them.

        Returns:
            (mean loss, number of pairs), both scalars; 0 and 0 where there is no pair.

        Raises:
            RequestError: the batch is not one of pairs, or DPO's base would be trained.
        """
        answers = _Answers(batch)
        if not answers.starts:
            return mx.array(0.0), mx.array(0)
        losses, margins = self._compare(model, answers, self._beta)  # [P] each
        self._margins.append(mx.stop_gradient(margins))
        return losses.mean(), mx.array(margins.size)

    def figures(self) -> Figures:
        """How the pairs fared that this process has seen since the last call, but for those of more than 1,000 batches.

        Takes no further pass of the model.
        """
        if not self._margins:
            return Figures()
        margins = mx.concatenate([*self._margins])
        self._margins.clear()
        return Figures(margins.size, (margins > 0).sum().item() / margins.size, margins.mean().item())


class _Answers:
    """The answers of a batch in their order: chosen, rejected, chosen, ...; P pairs, N target tokens.

    Attributes:
        starts: where each answer begins among the target tokens.
        lengths: target tokens of each answer, [P, 2].
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        at = np.flatnonzero(np.array(batch.mask))
        width = batch.mask.shape[1]
        # A number for each answer, rising from row to row, and odd for the chosen ones.
        numbers = 2 * width * (at // width) + np.array(batch.segments).ravel()[at]
        answers, starts = np.unique(numbers, return_index=True)
        chosen, rejected = answers[::2], answers[1::2]
        if not np.array_equal(rejected, chosen + 1) or (chosen % 2 == 0).any():
            raise RequestError("preference tuning takes pairs of answers, each with something to learn; see load_pairs")
        self._at = mx.array(at.astype(np.int32))  # [N]
        self.starts: list[int] = starts.tolist()
        self.lengths = mx.array(np.diff(starts, append=len(at)).reshape(-1, 2).astype(np.float32))

    def token_losses(self, model: LanguageModel) -> mx.array:
        """Cross-entropy of each target token in nats, [N]."""
        hidden = model.hidden(self._batch.inputs, segments=self._batch.segments)  # [B, T, D]
        targets = self._batch.targets.reshape(-1)[self._at]
        return token_losses(model, hidden.reshape(-1, hidden.shape[-1])[self._at], targets)

    def sums(self, tokens: mx.array) -> mx.array:
        """Of something that each target token has [N], the sum over each answer, [P, 2]."""
        # Not a scatter: on a GPU that adds in an order of its own, and a resumed run would differ in the last bits.
        parts = mx.split(tokens, self.starts[1:])
        return mx.stack([part.sum() for part in parts]).reshape(-1, 2)


def _dpo(model: LanguageModel, answers: _Answers, beta: float) -> tuple[mx.array, mx.array]:
    """Losses and margins of the pairs, [P] each."""
    _check_base(model)
    # No gradient, so nothing is kept for one; and no `mx.eval`, which inside a gradient would keep it all.
    with adapter_off(model):
        base = mx.stop_gradient(answers.token_losses(model))
    # Token by token, where the two are close: the difference of their sums would be rounded like the sums.
    gains = answers.sums(base - answers.token_losses(model))  # log(p / p_base), [P, 2]
    margins = beta * (gains[:, 0] - gains[:, 1])
    return nn.softplus(-margins), margins


def _orpo(model: LanguageModel, answers: _Answers, beta: float) -> tuple[mx.array, mx.array]:
    """Losses and margins of the pairs, [P] each."""
    losses = answers.sums(answers.token_losses(model)) / answers.lengths  # -log p of the mean token, [P, 2]
    unsure = mx.maximum(losses, SURE)
    log_odds = -unsure - mx.log(-mx.expm1(-unsure))  # log(p / (1 - p))
    margins = log_odds[:, 0] - log_odds[:, 1]
    return losses[:, 0] + beta * nn.softplus(-margins), margins


_TASKS: dict[str, Callable[[LanguageModel, _Answers, float], tuple[mx.array, mx.array]]] = {"dpo": _dpo, "orpo": _orpo}


def _check_base(model: LanguageModel) -> None:
    """Refuses a model whose base would not stay as it is."""
    adapter = adapter_parameters(model)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters()) if name not in adapter]
    if trained or not adapter:
        reason = f"{trained[0]} would be trained" if trained else "there is no adapter"
        raise RequestError(
            f"DPO measures from the base, which is the model with its adapter off, and here {reason}; take "
            "--fine-tune-type lora or dora, or --task orpo, which needs no base"
        )
