"""Agreement between the processes of a data-parallel run; None stands for a run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import mlx.core as mx

from phi4_mlx.errors import RequestError

Group: TypeAlias = mx.distributed.Group


def all_sum(value: mx.array, group: Group | None) -> mx.array:
    """Sums an array over all processes.

    Args:
        value: this process's array.
        group: the processes.

    Returns:
        The sum, in the shape of `value`; `value` itself for one process.
    """
    return value if group is None else mx.distributed.all_sum(value, group=group)


def any_process(flag: bool, group: Group | None) -> bool:
    """True if the flag is set in any process."""
    return flag if group is None else bool(all_sum(mx.array(int(flag)), group).item())


def check_same_step(step: int, group: Group | None, checkpoints: Path) -> None:
    """Checks that all processes resume from the same step.

    Args:
        step: of this process's newest checkpoint; -1 if there is none.
        group: the processes.
        checkpoints: the folder of the checkpoints, for the message.

    Raises:
        RequestError: the steps differ.
    """
    if group is None:
        return
    steps = mx.distributed.all_gather(mx.array([step]), group=group).tolist()
    if len({*steps}) > 1:
        raise RequestError(
            f"the processes have checkpoints of the steps {steps}, -1 for none; only the first one writes checkpoints, "
            f"so copy the folder {checkpoints} to the other machines"
        )
