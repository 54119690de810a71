"""An evaluation of a model that kills itself at a moment: before, within or after the n-th write.

    python tests/unit/evaluation/killed_run.py MODEL FILE MOMENT

Each write has four moments: before it, after half of its bytes, before it is on the disk, and after. MOMENT 0 kills
nothing. Prints the scores and texts as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.scoring import scores
from phi4_mlx.evaluation.subject import load_subject

model, file, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
passed = 0
write, sync = os.write, os.fsync


def pass_moment() -> None:
    """Counts a moment; ends the process at the chosen one as `kill -9` does."""
    global passed
    passed += 1
    if passed == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def slow_write(descriptor: int, data: Any) -> int:
    """`os.write` in two halves."""
    pass_moment()
    done = write(descriptor, data[: len(data) // 2])
    pass_moment()
    return done + write(descriptor, data[done:])


def slow_sync(descriptor: int) -> None:
    """`os.fsync` between two moments."""
    pass_moment()
    sync(descriptor)
    pass_moment()


os.write, os.fsync = slow_write, slow_sync
subject = load_subject(model)
shots = [40 + n for n in range(20)]
requests = [(shots + [100 + n] * 20, [50 + m, 60 + n]) for n in range(4) for m in range(3)]
questions = [Question(str(n), f"question {n}", max_tokens=1 + n % 3, temp=n % 2) for n in range(12)]
with Answers(file) as answers:
    found = [asdict(score) for score in scores(subject, requests, answers)]
    texts = [answer.text for answer in ask(subject, questions, answers)]
print(json.dumps([found, texts]))
