"""Progress between two milestones, and the time that is left."""

from __future__ import annotations

import pytest

from phi4_mlx.lora.pace import Pace


def test_a_pace_expects_what_the_last_batch_took() -> None:
    pace = Pace(0, 10, None, 0.0)
    pace.reach(0, 0.5, 0.0)
    assert pace.estimate(3.0) == (0, 3.0, None, None)
    pace.reach(0.5, 1, 4.0)
    done, spent, batch_s, left = pace.estimate(5.0)
    assert (done, spent, batch_s, left) == (0.5 + 1 / 8, 5.0, 8.0, pytest.approx(75.0))
    pace.reach(1, 1, 10.0)
    pace.reach(1, 1.5, 13.0)  # something else was done in between
    done, spent, batch_s, _ = pace.estimate(18.0)
    assert (done, spent, batch_s) == (1.5, 5.0, 10.0)
    assert pace.estimate(60.0)[:3] == (1.5, 47.0, 47.0)  # never less than what it has taken
