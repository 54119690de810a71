"""Lines of a file of prompts: their forms, and bad ones by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.commands.prompts.lines import PromptLine, read_prompts
from phi4_mlx.errors import RequestError


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"name": "add", "parameters": {}}]
    path = write(
        tmp_path / "p.jsonl",
        "Once",
        {"prompt": "Twice", "id": 7, "max_tokens": 3, "seed": 1},
        {"messages": messages, "tools": tools, "id": "x"},
    )
    assert read_prompts(path).lines == [
        PromptLine(1, "Once"),
        PromptLine(2, "Twice", id=7, max_tokens=3, seed=1),
        PromptLine(3, messages, tools, "x"),
    ]


def test_white_space_does_not_change_the_digest_and_words_do(tmp_path: Path) -> None:
    one = read_prompts(write(tmp_path / "1", {"prompt": "a", "id": 1}, "b")).digest
    (tmp_path / "2").write_text('{ "id":1,"prompt":"a"}\r\n"b"\n\n')
    assert read_prompts(tmp_path / "2").digest == one
    assert read_prompts(write(tmp_path / "3", {"prompt": "a", "id": 1}, "b ")).digest != one
    assert read_prompts(write(tmp_path / "4", "b", {"prompt": "a", "id": 1})).digest != one


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (3, "holds 3, not an object like"),
        ({}, "either prompt or messages, and this one has neither"),
        ({"prompt": "a", "messages": []}, "this one has both"),
        ({"promt": "a"}, "key 'promt' is not known; the keys are prompt, .*did you mean prompt"),
        ({"prompt": 3}, "prompt must be a text, not 3"),
        (" \n", "the prompt is empty"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"prompt": "a", "tools": [{"name": "add"}]}, "tools go with messages"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
        ({"prompt": "a", "id": [1]}, "id must be a text or a whole number"),
        ({"prompt": "a", "id": True}, "id must be a text or a whole number"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, r"message 0 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": {}}, "tools must be a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "/none.png"}]}]},
            "a part of type image, and --prompts reads only text; .* --image",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: Any, reason: str) -> None:
    path = write(tmp_path / "p.jsonl", "good", line, "good", line)
    with pytest.raises(RequestError, match=rf"p\.jsonl:2: .*{reason}.*\(1 more bad line: 4\)$"):
        read_prompts(path)


@pytest.mark.parametrize("text", ["", "\n\n", '"a"\n\n"b"\n', '"a"\n{"prompt": "a", "prompt": "b"}\n', '"a'])
def test_a_file_without_prompts_or_with_damage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(RequestError, match=r"p\.jsonl"):
        read_prompts(tmp_path / "p.jsonl")
