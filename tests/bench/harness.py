"""Shared by the scripts here: options, timing, pairs of runs, and the last line."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Generic, ParamSpec, TypeVar

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[2]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """One run of a function.

    Attributes:
        result: what it returned, evaluated.
        seconds: time until the result was evaluated.
        above_bytes: MLX's peak memory, less what was active before the run.
        peak_bytes: MLX's peak memory.
    """

    result: T
    seconds: float
    above_bytes: int
    peak_bytes: int


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def environment(**variables: str) -> dict[str, str]:
    """The environment of a subprocess: this checkout's package, no network, and `variables`."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables


def timed(run: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[T, float]:
    """(result, seconds) of one call."""
    start = time.perf_counter()
    result = run(*args, **options)
    return result, time.perf_counter() - start


def seconds(run: Callable[P, object], *args: P.args, **options: P.kwargs) -> float:
    """Wall-clock time of one call."""
    return timed(run, *args, **options)[1]


def measure(run: Callable[P, T], *args: P.args, **options: P.kwargs) -> Measurement[T]:
    """Time and peak memory of one call, its result evaluated."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = run(*args, **options)
    mx.eval(result)
    peak = mx.get_peak_memory()
    return Measurement(result, time.perf_counter() - start, peak - before, peak)


def alternate(ours: Callable[[], T], theirs: Callable[[], T], runs: int) -> tuple[list[T], list[T]]:
    """Results of both in `runs` pairs. The first of one pair is the second of the next."""
    mine: list[T] = []
    other: list[T] = []
    for run in range(runs):
        for call, results in ((ours, mine), (theirs, other)) if run % 2 == 0 else ((theirs, other), (ours, mine)):
            results.append(call())
    return mine, other


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def with_o200k_files(load: Callable[[Path], T]) -> T:
    """Calls `load` with a temporary folder that holds the tokenizer files of Phi-4-mini-instruct."""
    with tempfile.TemporaryDirectory() as folder:
        return load(runpy.run_path(str(ROOT / "tests" / "data" / "o200k.py"))["write"](Path(folder)))


def last_line(bench: str, **figures: object) -> None:
    """Prints the result of a script."""
    print(json.dumps({"bench": bench, **figures}))
