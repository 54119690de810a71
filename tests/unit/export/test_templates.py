"""Chat templates for other programs: the Jinja ones give the ids that the chat format gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.export.templates import go_template, jinja_template
from phi4_mlx.export.vocabulary import read_vocabulary
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from tests.conversations import CALLS, PLAIN, TOOLS, write_tokenizer

FORMATS = [*CHAT_FORMATS]
WITH_TOOLS = [name for name in FORMATS if name.startswith("phi4-mini")]


def rendered(template: str, messages: Any, tools: Any, add_generation_prompt: bool) -> str:
    """As transformers renders a template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("name", FORMATS)
def test_jinja_gives_the_ids_of_the_format(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    write_tokenizer(name, tmp_path / "tokenizer")
    tokenizer = load_tokenizer_and_format(tmp_path / "tokenizer", name)
    chat_format = CHAT_FORMATS[name]
    vocabulary = read_vocabulary(tmp_path / "tokenizer", tokenizer, chat_format.end, tokenizer.vocab_size)
    template = jinja_template(chat_format, vocabulary)
    conversations = [(messages, None) for messages in PLAIN.values()]
    if name in WITH_TOOLS:
        conversations += [(messages, TOOLS) for key, messages in PLAIN.items() if key != "quotes"]
        conversations += [(CALLS["call"], None), (CALLS["call"], TOOLS), (CALLS["object"], TOOLS)]
        conversations += [(CALLS["own"], None), (CALLS["text"], None)]
    for messages, tools in conversations:
        for prompt in (True, False):
            text = rendered(template, messages, tools, prompt)
            assert tokenizer.encode(text, specials=True) == tokenizer.apply_chat_template(messages, tools, prompt), text


@pytest.mark.parametrize("name", FORMATS)
def test_gos_template_is_balanced_and_has_tools_where_the_format_has(name: str) -> None:
    """Go itself has rendered these; this guards the blocks, and the quotes of a Modelfile."""
    template = go_template(CHAT_FORMATS[name])
    opened = re.findall(r"{{ (if|range) ", template)
    assert len(opened) == template.count("{{ end }}") and template.count("{{") == template.count("}}")
    assert '"""' not in template and ("{{ json $tool.Function }}" in template) is (name in WITH_TOOLS)
