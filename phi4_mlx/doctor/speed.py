"""The speed of this machine beside the ceiling that its memory sets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import TypedDict

import mlx.core as mx
import mlx.nn as nn

from phi4_mlx.checkpoint import load_model
from phi4_mlx.doctor.devices import devices
from phi4_mlx.doctor.forward import ids
from phi4_mlx.doctor.operations import NAMES
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.hub import resolve
from phi4_mlx.models.machine import median_seconds

COPIED = 2**26  # float32 numbers, 268 MB: more than any cache
GATE_UP = 16384, 3072  # the largest matrix of a block of Phi-4-mini
MATRICES = 4  # in turn, so that no cache holds them
RUNS = 5
TOKENS = 32


class Speed(TypedDict):
    """A row of the table.

    Attributes:
        name: of the measurement.
        value: the median of several runs.
        unit: "GB/s" or "tokens/s".
        share: of the read bandwidth; None where there is no ceiling.
    """

    name: str
    value: float
    unit: str
    share: float | None


def speeds() -> Iterator[Speed]:
    """The measurements, on the last device."""
    device = devices()[-1]
    with device.use():
        copied, read = _bandwidth()
        yield {"name": "memory, copied", "value": copied, "unit": "GB/s", "share": None}
        yield {"name": "memory, read", "value": read, "unit": "GB/s", "share": None}
        dtype = mx.float32 if device.name == "cpu" else mx.bfloat16  # a CPU is ten times slower in 16 bits
        rate = _products(dtype)
        name = f"4-bit product of {GATE_UP[0]:,} x {GATE_UP[1]:,}, {NAMES[dtype]}"
        yield {"name": name, "value": rate, "unit": "GB/s", "share": rate / read}
        for package in ("demo", "demo-flash"):
            rate, nbytes = _decode(package)
            yield {"name": f"{package}, decode", "value": rate, "unit": "tokens/s", "share": rate * nbytes / read / 1e9}


def _bandwidth() -> tuple[float, float]:
    """GB/s of a copy, read and written, and of a sum."""
    numbers = mx.zeros(COPIED)
    copied = median_seconds(lambda: mx.eval(numbers + 1), RUNS)
    read = median_seconds(lambda: mx.eval(numbers.sum()), RUNS)
    return 2e-9 * numbers.nbytes / copied, 1e-9 * numbers.nbytes / read


def _products(dtype: mx.Dtype) -> float:
    """GB/s of weights that products of a vector and 4-bit matrices read."""
    rows, width = GATE_UP
    layers = []
    for _ in range(MATRICES):
        layer = nn.QuantizedLinear(64, 1, bias=False, group_size=64, bits=4)
        layer.weight = mx.random.randint(0, 2**31 - 1, (rows, width // 8)).astype(mx.uint32)
        layer.scales = mx.full((rows, width // 64), 0.01, dtype)
        layer.biases = mx.full((rows, width // 64), -0.08, dtype)
        layers.append(layer)
    x = mx.ones((1, 1, width), dtype)
    mx.eval([layer.parameters() for layer in layers], x)
    nbytes = sum(int(layers[0][name].nbytes) for name in ("weight", "scales", "biases"))
    return MATRICES * nbytes / median_seconds(lambda: mx.eval([layer(x) for layer in layers]), RUNS) / 1e9


def _decode(package: str) -> tuple[float, int]:
    """Tokens per second of greedy steps, and the bytes of weights that a step reads."""
    model = load_model(resolve(package))
    model.eval()
    times = []
    for _ in range(RUNS):
        stamps = [time.perf_counter() for _ in generate_step(ids(8, model), model, max_tokens=TOKENS)]
        times.append((TOKENS - 1) / (stamps[-1] - stamps[0]))
    return median(times), model.step_bytes
