"""JSONL -> samples: token ids and the targets among them.

Each line is an object in one of mlx-lm's formats, and lines may differ in format:

    {"text": "..."}                                 a plain text
    {"prompt": "...", "completion": "..."}          a question and its answer, as a chat of two turns
    {"messages": [{"role": ..., "content": ...}]}   a chat; every turn of the assistant counts, not only the last

The last two may have "tools". If a line fits several formats, completion has precedence over messages, and messages
over text, as in mlx-lm; other keys are ignored. A preference pair has "prompt" or "messages", and "chosen" and
"rejected"; without the former, the shared beginning of the two is the prompt. Control strings in the data stay text:
only the chat format makes control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phi4_mlx.data.jsonl import find_split, read_lines
from phi4_mlx.data.parquet import is_parquet, read_rows
from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.messages import check_messages
from phi4_mlx.tokens.prefix import shared_length
from phi4_mlx.tokens.tokenizer import Control, Tokenizer

END_OF_TEXT = Control("<|endoftext|>")

# Turns as in the dataset Anthropic/hh-rlhf, whose pairs have their prompt inside chosen and rejected.
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

Record = Mapping[str, Any]
"""The object of a line: JSON values by name."""


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        ids: its token ids.
        targets: True for each token that counts in the loss; the first never does, since no token precedes it.
        source: its file and line, "train.jsonl:12".
    """

    ids: list[int]
    targets: list[bool]
    source: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each a sample whose targets are the answer only."""

    chosen: Sample
    rejected: Sample


@dataclass
class Report:
    """Counts of a file.

    Attributes:
        samples: number of samples, or pairs, that are kept.
        tokens: number of their tokens.
        targets: number of their targets.
        truncated: number of samples that were longer than allowed and were cut.
        longest: tokens of the longest sample, before the cut.
        skipped: sources of samples that were left out: without a target, or pairs of identical answers.
        identical: number of pairs among the skipped ones that have identical answers.
        control_text: sources of samples that contain control strings.
        shared_prompts: number of pairs whose prompt is the shared beginning of their answers.
    """

    samples: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    longest: int = 0
    skipped: list[str] = field(default_factory=list)
    identical: int = 0
    control_text: list[str] = field(default_factory=list)
    shared_prompts: int = 0

    def messages(self) -> list[str]:
        """Messages for the user, a line each: the counts, then anything unexpected."""
        counts = f"{amount(self.samples, 'sample')} of {amount(self.tokens, 'token')}"
        lines = [f"{counts}, {self.targets:,} of them to be learned"]
        if self.truncated:
            longest = amount(self.longest, "token")
            lines.append(f"cut at --max-seq-length: {self.truncated:,}; the longest had {longest}")
        if self.skipped:
            pairs = f", {self.identical:,} of them with identical answers" if self.identical else ""
            lines.append(f"left out, without a target: {len(self.skipped):,}, the first {self.skipped[0]}{pairs}")
        if self.shared_prompts:
            lines.append(
                f"without a prompt of their own: {amount(self.shared_prompts, 'pair')}; it is what chosen and rejected "
                "share at their beginning, see --dry-run"
            )
        if self.control_text:
            lines.append(
                f"with control strings, which stay text: {len(self.control_text):,}, the first "
                f"{self.control_text[0]}; write a chat as messages"
            )
        return lines


def load_samples(
    path_or_hf_id: str | Path,
    tokenizer: Tokenizer,
    split: str = "train",
    *,
    mask_prompt: bool = False,
    max_seq_length: int = 2048,
    lines: int | None = None,
) -> tuple[list[Sample], Report]:
    """Reads a split.

    Args:
        path_or_hf_id: as for `find_split`.
        tokenizer: encodes the texts, and renders chats in its chat format.
        split: "train", "valid" or "test".
        mask_prompt: True if only completions and the assistant's turns are targets, each with its end marker. A plain
            text has no prompt: all of it stays a target.
        max_seq_length: longest sample in tokens, at least 2; a longer one is cut at its end.
        lines: the most lines or rows to read; None for all.

    Returns:
        (samples in the file's order, counts); no samples if "valid" or "test" is missing.

    Raises:
        RequestError: a line is bad, there is no target, or there is nothing to read.
    """

    def encoded(record: Record, source: str) -> tuple[Sample]:
        return (_sample(record, source, tokenizer, mask_prompt),)

    kept, report = _load(path_or_hf_id, split, tokenizer, encoded, max_seq_length, lines)
    if mask_prompt and split == "train" and all(all(sample.targets[1:]) for (sample,) in kept):
        raise RequestError(f"{path_or_hf_id}: --mask-prompt has nothing to mask; all samples are plain texts")
    return [sample for (sample,) in kept], report


def load_pairs(
    path_or_hf_id: str | Path,
    tokenizer: Tokenizer,
    split: str = "train",
    *,
    max_seq_length: int = 2048,
    lines: int | None = None,
) -> tuple[list[Pair], Report]:
    """Reads a split of preference pairs.

    A pair is an object with "prompt" or "messages", and "chosen" and "rejected", each a text or a list of messages. It
    may have "tools". A list that repeats the prompt is read without it. Without a prompt, the messages that both lists
    begin with are it; texts are turns of "Human:" and "Assistant:", or share their first lines.

    Args:
        path_or_hf_id: as for `find_split`.
        tokenizer: as for `load_samples`.
        split: "train", "valid" or "test".
        max_seq_length: longest prompt with an answer, in tokens, at least 2; a longer one is cut at its end.
        lines: as for `load_samples`.

    Returns:
        (pairs in the file's order, counts); no pairs if "valid" or "test" is missing.

    Raises:
        RequestError: as for `load_samples`.
    """

    def encoded(record: Record, source: str) -> tuple[Sample, Sample]:
        return _chosen_and_rejected(record, source, tokenizer)

    kept, report = _load(path_or_hf_id, split, tokenizer, encoded, max_seq_length, lines)
    return [Pair(chosen, rejected) for chosen, rejected in kept], report


def _load(
    path_or_hf_id: str | Path,
    split: str,
    tokenizer: Tokenizer,
    encoded: Callable[[Record, str], tuple[Sample, ...]],
    max_seq_length: int,
    lines: int | None,
) -> tuple[list[tuple[Sample, ...]], Report]:
    """The samples of each line that has targets, cut to length."""
    if max_seq_length < 2:
        raise RequestError(f"--max-seq-length {max_seq_length} leaves no target; it must be at least 2")
    path = find_split(path_or_hf_id, split)
    if path is None:
        return [], Report()
    report = Report()
    shared: dict[int, int] = {}
    control = re.compile("|".join(re.escape(text) for text in tokenizer.control_ids) or "(?!)")

    def read(record: Record, source: str) -> tuple[Sample, ...]:
        samples = encoded(record, source)
        if any(control.search(text) for text in _texts(record)):
            report.control_text.append(source)
        report.longest = max(report.longest, *(len(sample.ids) for sample in samples))
        report.shared_prompts += len(samples) > 1 and record.keys().isdisjoint({"prompt", "messages"})
        report.truncated += any(len(sample.ids) > max_seq_length for sample in samples)
        return tuple(_cut(sample, max_seq_length, shared) for sample in samples)

    kept = []
    for samples in (read_rows if is_parquet(path) else read_lines)(path, read, lines):
        identical = len(samples) > 1 and all(sample.ids == samples[0].ids for sample in samples)
        if identical or not all(any(sample.targets) for sample in samples):
            report.skipped.append(samples[0].source)
            report.identical += identical
            continue
        kept.append(samples)
        report.samples += 1
        report.tokens += sum(len(sample.ids) for sample in samples)
        report.targets += sum(sum(sample.targets) for sample in samples)
    if not kept:
        raise RequestError(f"{path} has no target in any of its {_no_targets(report, max_seq_length)}")
    return kept, report


def _no_targets(report: Report, max_seq_length: int) -> str:
    """The number of samples, the reason why all were skipped, and the remedy."""
    count = len(report.skipped)
    if report.identical < count:
        return (
            f"{count:,} samples within the first {max_seq_length:,} tokens; raise --max-seq-length, or leave "
            "--mask-prompt out"
        )
    if report.truncated:
        way = f"in {report.truncated:,} of them because of the cut at {max_seq_length:,} tokens; raise --max-seq-length"
    else:
        way = "a pair must have two different answers"
    return f"{count:,} pairs: chosen and rejected are identical; {way}"


def _cut(sample: Sample, length: int, shared: dict[int, int]) -> Sample:
    """The sample's beginning. Equal ids share one int object: 16 bytes per token instead of 44."""
    ids = [shared.setdefault(token, token) for token in sample.ids[:length]]
    return replace(sample, ids=ids, targets=sample.targets[:length])


def _sample(record: Record, source: str, tokenizer: Tokenizer, mask_prompt: bool) -> Sample:
    messages = _messages(record)
    if messages is None:
        ids = tokenizer.encode_pieces([_text(record, "text"), END_OF_TEXT])
    else:
        ids = tokenizer.apply_chat_template(messages, _tools(record), add_generation_prompt=False)
    if mask_prompt and messages is not None:
        targets = tokenizer.chat_format.own_words(tokenizer, ids)
    else:
        targets = [True] * len(ids)
    return Sample(ids, [False, *targets[1:]], source)


def _messages(record: Record) -> Sequence[Record] | None:
    """The chat of a line in any format; None for a plain text."""
    if "prompt" in record and "completion" in record:
        return [_turn("user", _text(record, "prompt")), _turn("assistant", _text(record, "completion"))]
    if "messages" in record:
        _refuse_media(record["messages"])
        return check_messages(record["messages"])
    if "text" in record:
        return None
    pair = "; chosen and rejected are for preference tuning" if "chosen" in record else ""
    raise RequestError(f"has {_keys(record)}; a sample has text, prompt and completion, or messages{pair}")


def _refuse_media(messages: Any) -> None:
    """Raises RequestError for pictures and sounds, also of a model that reads them."""
    messages = messages if isinstance(messages, list) else []
    contents = [each.get("content") for each in messages if isinstance(each, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if kinds := [part.get("type") for part in parts if isinstance(part, Mapping) and part.get("type") != "text"]:
        raise RequestError(f"has a part of type {kinds[0]!r:.50}; training reads only text, so leave it out")


def _chosen_and_rejected(record: Record, source: str, tokenizer: Tokenizer) -> tuple[Sample, Sample]:
    if {"chosen", "rejected"} <= record.keys() and record.keys().isdisjoint({"prompt", "messages"}):
        record = _with_shared_prompt(record)
    asked = "messages" if "messages" in record else "prompt"
    if not {asked, "chosen", "rejected"} <= record.keys():
        raise RequestError(f"has {_keys(record)}; a pair has prompt or messages, and chosen and rejected")
    prompt, tools = _turns(record, asked, "user"), _tools(record)
    before = tokenizer.apply_chat_template(prompt, tools)

    def answered(key: str) -> Sample:
        answer = _turns(record, key, "assistant")
        if answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        if not answer or answer[0]["role"] != "assistant":
            raise RequestError(f"{key} must continue {asked} with a message of the assistant")
        ids = tokenizer.apply_chat_template([*prompt, *answer], tools, add_generation_prompt=False)
        same = shared_length(before, ids)
        own = tokenizer.chat_format.own_words(tokenizer, ids)
        return Sample(ids, [mine and at >= same for at, mine in enumerate(own)], source)

    return answered("chosen"), answered("rejected")


def _with_shared_prompt(record: Record) -> Record:
    """The pair with the shared beginning of its answers as messages, and the rest of each as its answer."""
    chosen, rejected = (_whole(record, key) for key in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        lines = [each.splitlines(keepends=True) for each in (chosen, rejected)]
        count = shared_length(*lines)
        while count and not all("".join(each[count:]).strip() for each in lines):
            count -= 1
        if prompt := "".join(lines[0][:count]).strip():
            texts = {key: "".join(each[count:]) for key, each in zip(("chosen", "rejected"), lines, strict=True)}
            return {**record, **texts, "messages": [_turn("user", prompt)]}
    elif isinstance(chosen, list) and isinstance(rejected, list):
        count = shared_length(chosen, rejected)
        while count and not all(each[count:] and each[count]["role"] == "assistant" for each in (chosen, rejected)):
            count -= 1
        if count:
            return {**record, "messages": chosen[:count], "chosen": chosen[count:], "rejected": rejected[count:]}
    raise RequestError(
        "has no prompt, and chosen and rejected do not begin with the same messages or lines; a pair has prompt or "
        "messages, and chosen and rejected"
    )


def _whole(record: Record, key: str) -> str | list[dict[str, Any]]:
    """The messages of an answer that holds its prompt; a text that is not in turns stays a text."""
    given = record[key]
    if not isinstance(given, str):
        return _turns(record, key, "assistant")
    parts = _TURN.split(f"\n\n{given.strip()}")
    if parts[0] or len(parts) < 3:
        return given
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return check_messages([_turn(_ROLES[name], text.strip()) for name, text in turns])


def _turns(record: Record, key: str, role: str) -> list[dict[str, Any]]:
    """The messages under a key; a text becomes a single message of a role."""
    given = record[key]
    if not isinstance(given, (str, list)) or given == []:
        raise RequestError(f"{key} must be a text or a list of messages, not {given!r:.60}")
    return check_messages([_turn(role, given)] if isinstance(given, str) else given)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(record: Record, key: str) -> str:
    given = record[key]
    if not isinstance(given, str):
        raise RequestError(f"{key} must be a text, not {given!r:.60}")
    return given


def _tools(record: Record) -> list[Any] | None:
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RequestError(f"tools must be a list, not {tools!r:.60}")
    return tools


def _keys(record: Record) -> str:
    return f"only {', '.join(map(repr, record)):.60}" if record else "no keys"


def _texts(value: object) -> Iterator[str]:
    """All texts inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
