"""A program for the ranks of a ring: answers of models that they hold together, all ranks doing the same.

Its argument is a JSON file: case -> the folder of a model, the way to share it, and what to run. Each rank writes what
it found beside it, with the calls that crossed between ranks.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.adapters.layers import put_adapter
from phi4_mlx.checkpoint_share import load_share, share_adapter
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.sequence import BatchSequence, Token
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.share import Share
from phi4_mlx.models.split_logits import array_of
from tests.media import picture, prompt_of

COUNTED = ("all_sum", "all_gather", "send", "recv")
DRAWN = 8  # by each sequence of a batch
PROMPT = [7, *range(30, 69)]  # 40 tokens: 64 more cross the tiny models' boundary


class EverySecond:
    """A mask that allows every second id, and at times only unlikely ones."""

    def __init__(self, V: int) -> None:
        self.V, self.drawn = V, 0

    def mask(self) -> mx.array:
        ids = mx.arange(self.V)
        return ids < 9 if self.drawn % 5 == 4 else ids % 2 == self.drawn % 2

    def accept(self, token: int) -> list[int]:
        self.drawn += 1
        return []


def answers(model: LanguageModel, run: dict[str, Any]) -> dict[str, Any]:
    """Tokens of one answer and of a batch, and logits of the whole prompt."""
    found: dict[str, Any] = {}
    if count := run.get("tokens"):
        cache = model.make_cache()
        cache.adapter = run.get("named")
        hidden = model.hidden(cache.admit(mx.array([PROMPT])), cache)
        found["logits"] = model.logits(hidden).tolist()
        found["tokens"] = [token for token, _ in generate_step(PROMPT, model, max_tokens=count, prefill_step_size=16)]
    if run.get("picture"):
        prompt = prompt_of([490, 5, 6], picture(0), [20, 21, 22])
        found["picture"] = [token for token, _ in generate_step(prompt, model, max_tokens=DRAWN)]
    for number, settings in enumerate(run.get("sampling", ())):
        bias = {int(token): amount for token, amount in settings.get("logit_bias", {}).items()}
        sampling = Sampling(**{**settings, "logit_bias": bias})
        mask = EverySecond(model.config.vocab_size) if run.get("masked") else None
        drawn = generate_step(
            PROMPT, model, max_tokens=DRAWN, sampler=sampling.sampler(), logits_processors=sampling.processors(),
            logits_mask=mask,
        )  # fmt: skip
        found[f"sampled {number}"] = [token for token, _ in drawn]
    if adapters := run.get("batch"):
        sequences = [
            BatchSequence(model, [5 + n, *PROMPT[: 3 + 5 * n]], DRAWN, adapter=name) for n, name in enumerate(adapters)
        ]
        batch = Batch(prefill_step_size=32)
        for sequence in sequences:
            batch.add(sequence)
        while batch.active or batch.waiting:
            for event in batch.step():
                assert isinstance(event, Token), event
                if event.sequence.drawn >= DRAWN:
                    batch.end(event.sequence)
        found["batch"] = [sequence.ids for sequence in sequences]
    return found


def following(kind: type[LanguageModel]) -> type[LanguageModel]:
    """A stage that takes part, and whose own tokens are all 0: only their number matters."""

    def hidden(model: Any, ids: mx.array, cache: Any = None, rows: int | None = None) -> mx.array:
        mx.async_eval(kind.hidden(model, ids, cache, rows=rows))
        return mx.zeros((len(ids), rows or ids.shape[1], 1))

    def logits(model: Any, hidden: mx.array) -> mx.array:
        return mx.zeros((*hidden.shape[:-1], model.config.vocab_size))

    return type("Following", (kind,), {"hidden": hidden, "logits": logits})


def counted(calls: Counter[str], name: str, function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A collective whose calls and bytes are counted."""

    def call(*arguments: Any, **options: Any) -> mx.array:
        found = function(*arguments, **options)
        calls[name] += 1
        calls[f"{name} bytes"] += found.nbytes
        return found

    return call


def step_exchanges(model: LanguageModel) -> dict[str, int]:
    """The collectives of one decode step, and the bytes that they leave; the step is not compiled."""
    calls: Counter[str] = Counter()
    functions = {name: getattr(mx.distributed, name) for name in COUNTED}
    cache = model.make_cache()
    mx.eval(model.hidden(cache.admit(mx.array([PROMPT])), cache))
    for name, function in functions.items():
        setattr(mx.distributed, name, counted(calls, name, function))
    model.train()  # without compiled steps
    try:
        found = model.candidates(model.hidden(cache.admit(mx.array([[3]])), cache, rows=1))
        mx.eval(array_of(found))
    finally:
        model.eval()
        for name, function in functions.items():
            setattr(mx.distributed, name, function)
    return dict(calls)


def main() -> None:
    """Runs all cases."""
    plan = Path(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring")
    results = {}
    for name, run in json.loads(plan.read_text()).items():
        model = load_share(Path(run["folder"]), Share(run["parallel"], group.rank(), group.size()), group)
        if group.rank() and run["parallel"] == "pipeline":
            model.__class__ = following(type(model))
        if "adapter" in run:
            put_adapter(model, share_adapter(model, Path(run["adapter"])))
        for adapter, path in run.get("adapters", {}).items():
            assert model.adapters is not None
            model.adapters.add(adapter, partial(share_adapter, model, Path(path)))
        results[name] = {"bytes": model.weights_bytes, **answers(model, run)}
        if run.get("exchanges"):
            results[name]["exchanges"] = step_exchanges(model)
    plan.with_name(f"rank-{group.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
