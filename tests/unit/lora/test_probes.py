"""Prompts for measuring an adapter: from the data that its config names, else searched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx.adapters.layers import adapter_layers, add_adapter
from phi4_mlx.checkpoint import share_weights
from phi4_mlx.lora.effect import make_probes, measure
from phi4_mlx.lora.probes import FOUND, OWN, found_prompts, own_prompts
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.conftest import Demo


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[str | None], Path]:
    """A folder with an adapter_config.json that names data."""

    def make(data: str | None) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({} if data is None else {"data": data}))
        return folder

    return make


def write(path: Path, *records: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_own_prompts_end_before_the_last_answer(
    demo: Demo, adapter: Callable[[str | None], Path], tmp_path: Path
) -> None:
    tokenizer = demo[1]
    turns = (("user", "hi"), ("assistant", "Hello!"), ("user", "go"))
    chat = [{"role": role, "content": content} for role, content in turns]
    data = write(
        tmp_path / "train.jsonl", {"prompt": "ping", "completion": "pong"},
        {"messages": [*chat, {"role": "assistant", "content": "no"}]}, {"prompt": "ping", "completion": "other"},
    )  # fmt: skip
    expected = [tokenizer.apply_chat_template([{"role": "user", "content": "ping"}])]
    assert own_prompts(adapter(data), tokenizer) == [*expected, tokenizer.apply_chat_template(chat)]
    text = write(tmp_path / "text.jsonl", {"text": "one two three four"})
    (half,) = own_prompts(adapter(text), tokenizer)
    assert tokenizer.decode(half) and "one two three four".startswith(tokenizer.decode(half))
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "ping", "chosen": "pong", "rejected": "no"})
    assert own_prompts(adapter(pairs), tokenizer) == expected


def test_data_that_is_not_there_or_cannot_be_read_gives_none(
    demo: Demo, adapter: Callable[[str | None], Path], tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.jsonl", {"something": "else"})
    os.mkfifo(tmp_path / "pipe")
    files = (str(tmp_path / name) for name in ("gone.jsonl", "pipe", ""))
    for data in (None, "", "a\0b", "owner/name", bad, *files):
        assert own_prompts(adapter(data), demo[1]) == []


def test_own_prompts_are_spread_over_the_first_lines(
    demo: Demo, adapter: Callable[[str | None], Path], tmp_path: Path
) -> None:
    records: list[dict[str, object]] = [{"prompt": f"number {n}", "completion": "x"} for n in range(2000)]
    found = own_prompts(adapter(write(tmp_path / "train.jsonl", *records)), demo[1])
    assert len(found) == OWN and len({tuple(ids) for ids in found}) == OWN


def tuned_demo(demo: Demo, size: float) -> tuple[object, Tokenizer]:
    model = share_weights(demo[0])
    add_adapter(model, rank=2, scale=1.0)
    for n, layer in enumerate(adapter_layers(model).values()):
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=mx.random.key(n))
    return model, demo[1]


def test_the_effect_is_whole_on_the_adapter_and_gone_on_the_base(demo: Demo) -> None:
    tuned, tokenizer = tuned_demo(demo, 0.1)
    prompts = found_prompts(demo[0], tuned, tokenizer)  # type: ignore[arg-type]
    assert len(prompts) == FOUND
    probes = list(make_probes(demo[0], tuned, [(ids, False) for ids in prompts[:6]], tokenizer.eos_ids))  # type: ignore[arg-type]
    whole, gone = measure(tuned, probes), measure(demo[0], probes)  # type: ignore[arg-type]
    assert whole.keeps and whole.kept == pytest.approx(1, abs=1e-3)
    assert whole.as_adapter == whole.changed == gone.as_base == gone.changed > 0
    assert not gone.keeps and gone.kept == pytest.approx(0, abs=1e-3) and gone.as_adapter == 0
