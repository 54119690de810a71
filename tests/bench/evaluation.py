"""Tokens that lm-eval makes the demo run: `phi4_mlx.evaluation` beside mlx-lm's own class.

    python tests/bench/evaluation.py [--documents 100] [--model demo]

A task of four choices with the same five examples before each question, through lm-eval's `evaluate`. Both run the same
model; a token counts each time that it goes through the model, padding included. The examples alone are longer than the
demo's RoPE boundary: at a crossing, mlx-lm's class runs all tokens again, and its first token keeps the short table.
Bars: 0.3 of mlx-lm's tokens, equal acc and acc_norm, log-likelihoods within 1e-4. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from harness import last_line, option_parser

from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.harness import Harness
from phi4_mlx.evaluation.subject import load_subject
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel

SEED = 3
UNITS = ("apples", "books", "green bottles", "long wooden boats")
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, validation: {folder}/shots.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def document(draw: random.Random) -> dict[str, Any]:
    """A question with four choices of different lengths."""
    a, b, unit = draw.randrange(2, 60), draw.randrange(2, 60), draw.choice(UNITS)
    sums = draw.sample([each for each in range(a + b - 9, a + b + 9) if each != a + b], 3)
    sums.insert(draw.randrange(4), a + b)
    return {
        "question": f"What is {a} + {b}? Count the {unit} one by one.",
        "choices": [f"{each} {unit}" for each in sums],
        "label": sums.index(a + b),
    }


def write_task(folder: Path, documents: int) -> None:
    """Writes the task and its data."""
    draw = random.Random(SEED)
    for name, count in (("shots", 5), ("test", documents)):
        lines = [json.dumps(document(draw)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "sums.yaml").write_text(TASK.format(folder=folder))


@contextmanager
def counted(model: LanguageModel) -> Iterator[list[int]]:
    """Counts the tokens of each pass of a model."""
    kind, passes = type(model), []
    whole = kind.hidden

    def hidden(self: LanguageModel, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        passes.append(ids.size)
        return whole(self, ids, *args, **options)

    kind.hidden = hidden  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        kind.hidden = whole  # type: ignore[method-assign]


def evaluated(lm: Any, folder: Path) -> tuple[dict[str, float], list[float]]:
    """(metrics, log-likelihood of each choice) of the task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluate(lm, manager.load(["sums"]), bootstrap_iters=0)
    metrics = {name: found["results"]["sums"][f"{name},none"] for name in ("acc", "acc_norm")}
    samples = sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])
    return metrics, [float(response[0][0]) for sample in samples for response in sample["resps"]]


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    subject = load_subject(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, args.documents)
        with Answers(folder / "answers.jsonl") as answers, counted(subject.model) as ours:
            own, own_scores = evaluated(Harness(subject, answers), folder)
        from mlx_lm.evaluate import MLXLM

        peer = MLXLM(str(resolve(args.model)), use_chat_template=False)
        peer._model = subject.model  # the same maths: mlx-lm has the long RoPE table alone
        with counted(subject.model) as theirs:
            other, other_scores = evaluated(peer, folder)
    furthest = max(abs(a - b) for a, b in zip(own_scores, other_scores, strict=True))
    ratio = sum(ours) / sum(theirs)
    print(f"tokens {sum(ours):,} in {len(ours):,} passes; mlx-lm {sum(theirs):,} in {len(theirs):,}")
    print(f"metrics {own}; mlx-lm {other}; log-likelihoods differ by at most {furthest:.1e}")
    last_line(
        "evaluation",
        tokens_ratio=round(ratio, 3),
        tokens=sum(ours),
        tokens_mlx_lm=sum(theirs),
        **own,
        same_metrics=own == other,
        furthest=furthest,
        passed=ratio <= 0.3 and own == other and furthest < 1e-4,
    )


if __name__ == "__main__":
    main()
