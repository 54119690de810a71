"""Conversations that chat templates must render as the chat formats do, and tiny tokenizers of each format.

Tools and calls are in OpenAI's form.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conftest import DATA

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s "now" in a café <b>',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "of the world"},
                    "days": {"type": "integer", "enum": [1, 2]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "ping"}},
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
PLAIN = {
    "one": [{"role": "user", "content": "hi"}],
    "spaces": [{"role": "system", "content": "  be  kind "}, {"role": "user", "content": "\n hi\n"}],
    "quotes": [{"role": "user", "content": "it's {{ x }} {% if %} \\n \"'"}],
    "turns": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "system", "content": "T"}, {"role": "user", "content": "d"},
    ],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
}  # fmt: skip
CALLS = {
    "call": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'}, {"role": "user", "content": "b"},
    ],
    "object": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x", "tool_calls": [{"name": "now", "arguments": {"n": [1, None]}}]},
        {"role": "tool", "content": "3"},
    ],
    "own": [{"role": "system", "content": "S", "tools": [TOOLS[0]]}, {"role": "user", "content": "a"}],
    "text": [{"role": "system", "content": "S", "tools": "[]"}, {"role": "user", "content": "a"}],
}  # fmt: skip


def write_tokenizer(name: str, folder: Path) -> None:
    """Writes the files of a tiny tokenizer with the control tokens of a chat format."""
    source = DATA / ("tiny_sentencepiece" if name == "phi3.5-mini" else "tiny_tokenizer")
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    if name not in ("phi4", "phi4-reasoning"):
        return
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    names = {"<|user|>": "<|im_start|>", "<|assistant|>": "<|im_sep|>", "<|end|>": "<|im_end|>"}
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "lstrip": True, "rstrip": True}
    cl100k = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    cl100k += r"\s*[\r\n]+|\s+(?!\S)|\s+"
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = cl100k
    path.write_text(json.dumps(spec))
