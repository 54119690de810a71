"""The kind of a model is read from its package: the tokenizer, the chat format and the template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phi4_mlx.checkpoint import load_config, load_tokenizer_and_format
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.server.model_kind import model_kind
from phi4_mlx.tokens.chat_format import Phi4MiniReasoning
from tests.conftest import DATA, ROOT, TinyCheckpoint

DEMO = ROOT / "phi4_mlx" / "demo"
STOCK = json.loads((DATA / "phi-4-mini-instruct" / "tokenizer_config.json").read_text())["chat_template"]


def kind_of(folder: Path, chosen: str | None = None) -> str:
    tokenizer = load_tokenizer_and_format(folder, chosen, load_config(folder).model_type)
    return model_kind(folder, tokenizer.chat_format, chosen is not None)


def with_template(folder: Path, template: str | None) -> Path:
    """The folder with another template."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config | ({} if template is None else {"chat_template": template})))
    return folder


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (STOCK, "instruct"),
        ("{{ 'a template of a fine-tuned model' }}", "instruct"),
        (f"{{{{ '<|system|>{Phi4MiniReasoning.SYSTEM}' }}}}", "reasoning"),
        (None, "base"),
        ("", "base"),
    ],
)
def test_the_template_tells_the_kind(template: str | None, kind: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = with_template(tiny_checkpoint("phi-4-mini-reasoning-base-demo"), template)  # its name tells nothing
    assert kind_of(folder) == kind


@pytest.mark.parametrize(("chosen", "kind"), [("phi4-mini", "instruct"), ("phi4-mini-reasoning", "reasoning")])
def test_a_chosen_format_tells_more(chosen: str, kind: str, tiny_checkpoint: TinyCheckpoint) -> None:
    assert kind_of(with_template(tiny_checkpoint(), None), chosen) == kind


def test_the_demo_is_known_in_a_folder_of_any_name(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    assert [kind_of(folder) for folder in EMBEDDED.values()] == ["demo", "demo-reasoning", "demo"]
    assert kind_of(DEMO, "phi4-mini-reasoning") == "demo-reasoning"
    assert kind_of(Path(shutil.copytree(DEMO, tmp_path / "tuned"))) == "demo"
    assert kind_of(tiny_checkpoint("demo")) == "instruct"
