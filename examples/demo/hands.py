"""Digits as pen strokes, in many hands: each hand has its own forms, slant, width and unsteadiness."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

Point = tuple[float, float]
Line = list[Point]


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> Line:
    """Points on an ellipse, clockwise, with angles in turns from the top."""
    count = 14
    angles = (2 * math.pi * (start + (stop - start) * step / count) for step in range(count + 1))
    return [(x + rx * math.sin(angle), y - ry * math.cos(angle)) for angle in angles]


# digit -> its forms, each a list of lines in a box 0.7 wide and 1 high
FORMS: dict[int, list[list[Line]]] = {
    0: [[_arc(0.35, 0.5, 0.3, 0.48, 0, 1)], [_arc(0.35, 0.5, 0.22, 0.48, 0.05, 1.05)]],
    1: [
        [[(0.35, 0.02), (0.35, 0.98)]],
        [[(0.15, 0.25), (0.38, 0.02), (0.38, 0.98)]],
        [[(0.15, 0.25), (0.38, 0.02), (0.38, 0.98)], [(0.15, 0.98), (0.6, 0.98)]],
    ],
    2: [
        [[*_arc(0.35, 0.29, 0.28, 0.27, -0.25, 0.37), (0.06, 0.97), (0.65, 0.97)]],
        [[*_arc(0.35, 0.26, 0.27, 0.24, -0.2, 0.42), (0.1, 0.95), (0.2, 0.88), (0.4, 0.97), (0.66, 0.93)]],
    ],
    3: [
        [[*_arc(0.33, 0.26, 0.26, 0.24, -0.2, 0.5), *_arc(0.33, 0.73, 0.3, 0.25, 0, 0.72)]],
        [[(0.08, 0.03), (0.62, 0.03), (0.3, 0.42), *_arc(0.33, 0.69, 0.29, 0.28, 0.02, 0.72)]],
    ],
    4: [
        [[(0.45, 0.98), (0.45, 0.02), (0.04, 0.68), (0.68, 0.68)]],
        [[(0.12, 0.04), (0.08, 0.55), (0.64, 0.55)], [(0.5, 0.04), (0.5, 0.98)]],
    ],
    5: [
        [[(0.6, 0.03), (0.14, 0.03), (0.1, 0.46), *_arc(0.33, 0.67, 0.3, 0.29, -0.08, 0.7)]],
        [[(0.14, 0.06), (0.13, 0.42), *_arc(0.32, 0.69, 0.29, 0.28, -0.02, 0.68)], [(0.13, 0.05), (0.62, 0.03)]],
    ],
    6: [
        [[*_arc(0.45, 0.5, 0.36, 0.48, 0.03, -0.33), *_arc(0.36, 0.7, 0.27, 0.27, -0.2, 0.85)]],
        [[(0.5, 0.03), (0.22, 0.35), (0.09, 0.68), *_arc(0.36, 0.71, 0.27, 0.26, -0.25, 0.78)]],
    ],
    7: [
        [[(0.06, 0.03), (0.64, 0.03), (0.25, 0.98)]],
        [[(0.06, 0.03), (0.64, 0.03), (0.25, 0.98)], [(0.22, 0.5), (0.58, 0.5)]],
        [[(0.08, 0.16), (0.08, 0.03), (0.62, 0.03), (0.4, 0.45), (0.32, 0.98)]],
    ],
    8: [
        [_arc(0.35, 0.25, 0.23, 0.23, 0, 1), _arc(0.35, 0.73, 0.29, 0.25, 0, 1)],
        [[*_arc(0.35, 0.26, 0.24, 0.24, 0.3, -0.5), *_arc(0.35, 0.74, 0.28, 0.24, 0, 1), (0.5, 0.42), (0.58, 0.2)]],
    ],
    9: [
        [[*_arc(0.34, 0.29, 0.26, 0.27, 0.22, 1.2), (0.6, 0.3), (0.58, 0.98)]],
        [[*_arc(0.34, 0.29, 0.26, 0.27, 0.2, 1.22), *_arc(0.24, 0.5, 0.37, 0.47, 0.2, 0.52)]],
    ],
}


@dataclass(frozen=True)
class Hand:
    """A way to write, made from a number."""

    number: int

    @property
    def width(self) -> float:
        """Of the pen, in pixels, for a digit of 45 pixels."""
        return random.Random(self.number * 3 + 1).uniform(2.6, 6.0)

    def form(self, digit: int) -> list[Line]:
        """This hand's lines of a digit, before slant and unsteadiness."""
        return random.Random(self.number * 10 + digit).choice(FORMS[digit])

    def style(self) -> tuple[float, float, float, float]:
        """(slant, turn in radians, width, unsteadiness), the last two relative to the box."""
        rng = random.Random(self.number * 7 + 2)
        return rng.uniform(-0.12, 0.3), rng.uniform(-0.1, 0.1), rng.uniform(0.8, 1.1), rng.uniform(0.004, 0.02)


def strokes(digit: int, hand: Hand, rng: random.Random) -> list[Line]:
    """The lines of a digit as a hand writes it this time, in a box 0.7 wide and 1 high."""
    slant, turn, wide, unsteady = hand.style()
    slant, turn = slant + rng.uniform(-0.05, 0.05), turn + rng.uniform(-0.05, 0.05)
    lines = []
    for line in hand.form(digit):
        moved = []
        for x, y in line:
            x, y = (x - 0.35) * wide - slant * (y - 0.5), y - 0.5
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            moved.append((0.35 + x + rng.gauss(0, unsteady), 0.5 + y + rng.gauss(0, unsteady)))
        lines.append(moved)
    return lines
