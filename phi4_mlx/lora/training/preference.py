"""Preference tuning: losses that make the chosen one of two answers likelier than the rejected one.

DPO compares both answers with the base, which is the model with its adapter off, so no second model is in memory. ORPO
needs no base, and adds the loss of plain fine-tuning on the chosen answer. In both, the head runs on the tokens of the
answers only, a few at a time.

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
from phi4_mlx.lora.settings import OPTIONS
from phi4_mlx.lora.training.batches import Batch
from phi4_mlx.lora.training.loss import Loss, token_losses
from phi4_mlx.lora.training.processes import Group, all_sum
from phi4_mlx.models.model import LanguageModel

REMEMBERED = 1000  # most batches that figures cover, if `figures` is never called
SURE = 1e-6  # nats per token: below this loss, odds above a million to one, the log odds have no gradient


@dataclass(frozen=True)
class Figures:
    """Accuracy and margin of the pairs of some batches; all 0 without pairs.

    Attributes:
        pairs: number of pairs.
        accuracy: share of pairs whose chosen answer is ahead (margin above 0), from 0 to 1.
        margin: mean margin in nats. In DPO, the reward of the chosen answer minus that of the rejected one, where a
            reward is beta * log(p / p_base); in ORPO, the log of the odds ratio.
    """

    pairs: int = 0
    accuracy: float = 0.0
    margin: float = 0.0


class PreferenceLoss:
    """The loss of DPO or ORPO, which also records accuracy and margin of the pairs.

    Args:
        task: "dpo" or "orpo".
        beta: in DPO, how strongly the model is kept near the base; in ORPO, the weight of the preference term; from
            1e-6 to 100.

    Raises:
        RequestError: the task is not known, or beta is out of range.
    """

    def __init__(self, task: str, beta: float = 0.1):
        if task not in _TASKS:
            raise RequestError(f"task {task!r} is not a preference task; known are {', '.join(_TASKS)}")
        OPTIONS["beta"].check("beta", beta)
        self._compare, self._beta = _TASKS[task], beta
        self._margins: deque[mx.array] = deque(maxlen=REMEMBERED)

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[mx.array, mx.array]:
        """Mean loss over the pairs of a batch; differentiable.

        Args:
            model: the model; for DPO with an adapter, and nothing but the adapter unfrozen.
            batch: rows of pairs, as `Batches` makes them.

        Returns:
            (mean loss in nats, fp32 []; number of pairs, int32 []); 0 and 0 without pairs.

        Raises:
            RequestError: the batch does not consist of pairs, or DPO's base would be trained.
        """
        answers = _Answers(batch)
        if not answers.starts:
            return mx.array(0.0), mx.array(0)
        losses, margins = self._compare(model, answers, self._beta)  # [P] each
        self._margins.append(mx.stop_gradient(margins))
        return losses.mean(), mx.array(margins.size)

    def figures(self) -> Figures:
        """Figures of this process's pairs since the last call; of the last 1,000 batches if there were more.

        Runs no forward pass.
        """
        if not self._margins:
            return Figures()
        margins = mx.concatenate([*self._margins])
        self.reset()
        return Figures(margins.size, (margins > 0).sum().item() / margins.size, margins.mean().item())

    def reset(self) -> None:
        """Discards the pairs that `figures` would count."""
        self._margins.clear()


def pair_figures(loss: Loss, group: Group | None = None) -> tuple[float | None, float | None]:
    """Accuracy and margin over all processes of the pairs since the last call.

    Args:
        loss: the loss of the run.
        group: the processes that train together; None for this one alone.

    Returns:
        (accuracy, margin), see `Figures`; (None, None) without pairs, or for another loss than `PreferenceLoss`.
    """
    if not isinstance(loss, PreferenceLoss):
        return None, None
    found = loss.figures()
    sums = all_sum(mx.array([found.pairs, found.pairs * found.accuracy, found.pairs * found.margin]), group)
    pairs, ahead, margin = sums.tolist()
    return (ahead / pairs, margin / pairs) if pairs else (None, None)


class _Answers:
    """The answers of a batch in their order: chosen, rejected, chosen, ...; P pairs, N target tokens.

    Attributes:
        starts: index of the first target token of each answer.
        lengths: target tokens of each answer, fp32 [P, 2].
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        at = np.flatnonzero(np.array(batch.mask))
        width = batch.mask.shape[1]
        # A number for each answer, increasing from row to row, odd for the chosen ones.
        numbers = 2 * width * (at // width) + np.array(batch.segments).ravel()[at]
        answers, starts = np.unique(numbers, return_index=True)
        chosen, rejected = answers[::2], answers[1::2]
        if not np.array_equal(rejected, chosen + 1) or (chosen % 2 == 0).any():
            raise RequestError("preference tuning takes pairs of answers, each with a target; see load_pairs")
        self._at = mx.array(at.astype(np.int32))  # [N]
        self.starts: list[int] = starts.tolist()
        self.lengths = mx.array(np.diff(starts, append=len(at)).reshape(-1, 2).astype(np.float32))

    def token_losses(self, model: LanguageModel) -> mx.array:
        """Cross-entropy of each target token in nats, fp32 [N]."""
        hidden = model.hidden(self._batch.inputs, segments=self._batch.segments)  # [B, T, D]
        targets = self._batch.targets.reshape(-1)[self._at]
        return token_losses(model, hidden.reshape(-1, hidden.shape[-1])[self._at], targets)

    def sums(self, tokens: mx.array) -> mx.array:
        """Sums of a value of each target token [N] over each answer, [P, 2]."""
        # Not a scatter: a GPU adds in no fixed order, and a resumed run would differ in the last bits.
        parts = mx.split(tokens, self.starts[1:])
        return mx.stack([part.sum() for part in parts]).reshape(-1, 2)


def _dpo(model: LanguageModel, answers: _Answers, beta: float) -> tuple[mx.array, mx.array]:
    """Losses and margins of the pairs, [P] each."""
    _check_base(model)
    # Without a gradient, no activations are saved. `mx.eval` inside a gradient would keep them, so there is none.
    with adapter_off(model):
        base = mx.stop_gradient(answers.token_losses(model))
    # Subtract token by token, where the two are close: the difference of two sums has the rounding error of the sums.
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
    """Refuses a model whose base would be trained."""
    adapter = adapter_parameters(model)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters()) if name not in adapter]
    if trained or not adapter:
        reason = f"{trained[0]} would be trained" if trained else "there is no adapter"
        raise RequestError(
            f"DPO compares with the base, which is the model with its adapter off, and here {reason}; use "
            "--fine-tune-type lora or dora, or --task orpo, which needs no base"
        )
