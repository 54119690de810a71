"""The difference that rounding allows between two computations of one result.

A result is the largest difference of an element, divided by the largest element of the reference.

After n roundings in a row, a result is off by at most lambda sqrt(n) u, with a probability of 1 - 2 n exp(-lambda^2/2):
u is the unit roundoff, and lambda is 4 here. Two computations, which add in any order, may both be off: 8 sqrt(n) u. A
sum of products has a rounding a term. Sums of 16-bit numbers are float32, and only their results are rounded to 16
bits; but MLX's quantised products on a CPU sum in 16 bits, and those of 256 terms were seen to be off by 15 u.

Source: Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
SIDES = 8  # twice lambda
PRODUCT = 9  # roundings to 16 bits in a quantised product of 256 terms on a CPU

# Metal's fast sine and cosine, which its RoPE kernel uses, may be off by as much within one turn; its fast exponential
# of x by 3 + 2 |x| units in the last place, here for the |x| of up to 32 whose exponential matters beside 1.
# Source: Metal Shading Language Specification, accuracy of single precision with fast math.
SINE, EXPONENTIAL = 2.0**-13, 2.0**-17


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference, and its derivation.

    Attributes:
        value: relative to the largest element.
        why: the derivation as a formula.
    """

    value: float
    why: str

    def __add__(self, other: Tolerance) -> Tolerance:
        return Tolerance(self.value + other.value, f"{self.why} + {other.why}")


EXACT = Tolerance(0.0, "copies, equal to the bit")


def rounding(dtype: mx.Dtype, terms: int, operations: int = 1, results: int = 1) -> Tolerance:
    """The tolerance of operations in a row.

    Args:
        dtype: of their results; sums are float32.
        terms: products in the longest sum.
        operations: in a row.
        results: rounded to `dtype` in a row, if it is not float32.
    """
    value = SIDES * math.sqrt(operations * terms) * ROUNDOFF[mx.float32]
    why = f"8 x sqrt({operations} x {terms}) x 2^-24"
    if dtype != mx.float32:
        value += SIDES * math.sqrt(results) * ROUNDOFF[dtype]
        why += f" + 8 x sqrt({results}) x {_power(ROUNDOFF[dtype])}"
    return Tolerance(value, why)


def sines(layers: int = 1) -> Tolerance:
    """The tolerance of rotations in so many layers; see `SINE`."""
    return Tolerance(2 * layers * SINE, f"2 x {layers} x {_power(SINE)}")


def exponentials(layers: int = 1) -> Tolerance:
    """The tolerance of a softmax or a gate in so many layers; see `EXPONENTIAL`."""
    return Tolerance(2 * layers * EXPONENTIAL, f"2 x {layers} x {_power(EXPONENTIAL)}")


def steps(bits: int) -> Tolerance:
    """A quantised value between two steps may fall on either side: a quarter of a step, once it is averaged."""
    return Tolerance(2.0 ** -(bits + 2), f"{_power(2.0 ** -(bits + 2))}")


def _power(value: float) -> str:
    return f"2^{round(math.log2(value))}"
