"""A check: one computation on each device, with its fast paths and with their slow twins, and how far they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from phi4_mlx.doctor.devices import Device
from phi4_mlx.doctor.outcome import Outcome, failed
from phi4_mlx.doctor.tolerance import Tolerance
from phi4_mlx.errors import Phi4Error, message_of
from phi4_mlx.models.safe import FastPath, safe, without

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: of the line.
        paths: the fast paths that the computation takes, the likeliest culprit first.
        compute: the results, on the default device; the same inputs each time.
        tolerance: the allowed difference.
    """

    name: str
    paths: tuple[FastPath, ...]
    compute: Callable[[], Sequence[mx.array]]
    tolerance: Tolerance


def run_check(check: Check, devices: Sequence[Device]) -> Outcome:
    """Runs a check, and where it fails, again without each of its fast paths.

    Args:
        check: the check.
        devices: the first one is the reference.
    """
    outcome = _compared(check, devices)
    if not outcome["passed"]:
        outcome["switch_off"] = _way_out(check, devices)
    return outcome


def _compared(check: Check, devices: Sequence[Device]) -> Outcome:
    outcome = failed(check.name, "")
    outcome["tolerance"], outcome["why"] = check.tolerance.value, check.tolerance.why
    try:
        fast = [_results(check, device) for device in devices]
        slow = [_results(check, device, check.paths) for device in devices] if on_paths(check) else []
    except Exception as error:
        outcome["error"] = _described(error)
        return outcome
    across = [difference(each, fast[0]) for each in fast[1:]]
    twins = [difference(*pair) for pair in zip(fast, slow, strict=False)]
    if not np.isfinite([*across, *twins, *(difference(each, each) for each in fast)]).all():
        outcome["error"] = "a result has NaN, infinity or another shape"
        return outcome
    outcome["devices"], outcome["twins"] = max(across, default=None), max(twins, default=None)
    outcome["passed"], outcome["error"] = max([*across, *twins, 0.0]) <= check.tolerance.value, None
    return outcome


def on_paths(check: Check) -> list[FastPath]:
    """The fast paths of a check that are on."""
    return [path for path in check.paths if not safe(path)]


def ways_out(check: Check) -> Iterator[list[FastPath]]:
    """What to switch off, in the order to try it: each fast path of a check, then all."""
    paths = on_paths(check)
    yield from ([path] for path in paths)
    if len(paths) > 1:
        yield paths


def _way_out(check: Check, devices: Sequence[Device]) -> list[str]:
    """The fast paths without which all devices agree with the slow twins on the first; empty if there are none."""
    try:
        reference = _results(check, devices[0], check.paths)
    except Exception:
        return []
    for paths in ways_out(check):
        try:
            if all(difference(_results(check, each, paths), reference) <= check.tolerance.value for each in devices):
                return [*paths]
        except Exception:  # this path was not the cause
            continue
    return []


def _results(check: Check, device: Device, off: Sequence[FastPath] = ()) -> Arrays:
    with device.use(), without(*off):
        arrays = [array.astype(mx.float32) for array in check.compute()]
        mx.eval(arrays)
        return [np.array(array) for array in arrays]


def difference(found: Arrays, reference: Arrays) -> float:
    """The largest difference of an element, relative to the largest of its array; infinite for other shapes or NaN."""
    if [each.shape for each in found] != [each.shape for each in reference]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, reference, strict=True):
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            return float("inf")
        if one.size:
            largest = max(float(np.abs(other).max()), float(np.finfo(np.float32).tiny))
            worst = max(worst, float(np.abs(one - other).max()) / largest)
    return worst


def _described(error: BaseException) -> str:
    text = message_of(error)
    return text if isinstance(error, Phi4Error) else f"{type(error).__name__}: {text}"
