"""One process of a shared evaluation of the demo; prints what it found as JSON.

mlx.launch -n 2 --backend ring tests/unit/evaluation/shared_run.py FOLDER [fail | differ]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.scoring import scores
from phi4_mlx.evaluation.sharing import answers_path
from phi4_mlx.evaluation.subject import load_subject

folder, manner = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
subject = load_subject("demo")
group = subject.group
rank = group.rank() if group else 0
requests = [([40 + n, 50, 60], [70 + m]) for n in range(6) for m in range(2)]
if manner == "differ" and rank:
    requests.pop()
questions = [Question(str(n), f"What is {n} + 4?", max_tokens=3) for n in range(5)]
passes = 0
hidden = type(subject.model).hidden


def counted(*args, **options):  # type: ignore[no-untyped-def]
    """`hidden`, counted; it fails in the second process where the test says so."""
    global passes
    passes += 1
    if manner == "fail" and rank:
        raise RequestError("the disk is full")
    return hidden(*args, **options)


type(subject.model).hidden = counted  # type: ignore[method-assign]
result = {"rank": rank, "error": ""}
try:
    with Answers(answers_path(folder, "task", group)) as answers:
        result["scores"] = [asdict(score) for score in scores(subject, requests, answers)]
        result["texts"] = [answer.text for answer in ask(subject, questions, answers)]
        result["own"] = len(answers)
except RequestError as error:
    result["error"] = str(error)
print(json.dumps({**result, "passes": passes}), flush=True)
