"""Limits of the settings of an answer, which command-line options, API requests and samplers all check.

Both ends of a range are included. `phi4_mlx.terminal.options` has the defaults.
"""

from __future__ import annotations

MAX_TOKENS_LIMIT = 1_000_000  # of one answer
TEMPERATURE_LIMIT = 100
TOP_K_LIMIT = 2**31 - 1
SEED_LIMIT = 2**64 - 1  # MLX seeds its generator with 64 bits
REPETITION_PENALTY_RANGE = (0.01, 100)
PENALTY_RANGE = (-100, 100)  # of the presence and frequency penalties
