"""The default calibration set: its formats, its languages and its length."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import phi4_mlx.convert
from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.data.samples import load_samples
from phi4_mlx.files.embedded import EMBEDDED
from tests.data import o200k

FILE = Path(phi4_mlx.convert.__path__[-1]) / "calibration.jsonl"
RECORDS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]

# The languages of Phi-4-mini-instruct's model card.
CODES = "ar cs da de en es fi fr he hu it ja ko nl no pl pt ru sv th tr uk zh"


def test_it_has_every_language_and_every_kind() -> None:
    assert {record["language"] for record in RECORDS} == set(CODES.split())
    kinds = Counter(record["kind"] for record in RECORDS)
    assert kinds.keys() == {"chat", "text", "translation", "code", "maths", "json", "tools"}
    written = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    for fence in ("python", "swift", "javascript", "sql", "sh", "json"):
        assert f"```{fence}\\n" in written, fence
    chats = [record["messages"] for record in RECORDS if "messages" in record]
    roles = Counter(tuple(message["role"] for message in messages) for messages in chats)
    assert any("system" in turns for turns in roles) and any(turns.count("user") > 1 for turns in roles)
    called = [len(message["tool_calls"]) for messages in chats for message in messages if "tool_calls" in message]
    assert 1 in called and 3 in called
    assert any("<think>" in message["content"] for messages in chats for message in messages)


def test_no_line_occurs_twice() -> None:
    assert len({json.dumps(record) for record in RECORDS}) == len(RECORDS)


@pytest.mark.slow
def test_it_is_long_enough_for_the_published_tokenizer() -> None:
    """Calibration with 5,000 tokens is as good as with 50,000, so a first half must do; no sample is cut."""
    samples, report = load_samples(FILE, o200k.tokenizer())
    assert report.samples == len(RECORDS) and not report.truncated and not report.control_text
    assert 8000 < report.tokens < 12000
    assert sum(len(sample.ids) > 500 for sample in samples) >= 3
    first, tokens = set(), 0
    for record, sample in zip(RECORDS, samples, strict=True):
        tokens += len(sample.ids)
        first |= {record["language"], record["kind"]} if tokens < 5000 else set()
    assert len(first) >= 15, first


@pytest.mark.parametrize("folder", EMBEDDED.values(), ids=EMBEDDED)
def test_it_loads_for_the_embedded_models(folder: Path) -> None:
    tokenizer = load_tokenizer_and_format(
        folder, model_type=json.loads((folder / "config.json").read_text())["model_type"]
    )
    _, report = load_samples(FILE, tokenizer, max_seq_length=2**20)
    assert report.samples == len(RECORDS) and report.tokens > 5000 and not report.control_text
