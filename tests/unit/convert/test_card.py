"""The model card that every conversion writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from phi4_mlx import load
from phi4_mlx.convert.bits import Candidate
from phi4_mlx.convert.card import read_origin
from phi4_mlx.convert.package import convert, write_package
from phi4_mlx.convert.quantize import Scheme, make_recipe
from phi4_mlx.convert.report import Report
from phi4_mlx.convert.weights import plan
from phi4_mlx.files.manifest import read_manifest
from tests.kinds import WRITERS

Checkpoint = Callable[..., Path]
FOUR_BITS: dict[str, Any] = {"quantize": True, "q_group_size": 32}
MICROSOFT = """---
language:
- multilingual
- en
- 'no'
library_name: transformers
license: mit
license_link: https://example.org/LICENSE
pipeline_tag: text-generation
tags:
- nlp
- code
widget:
- messages:
  - role: user
    content: hi
---
# Some model

---
license: none
---
"""


@pytest.fixture
def source(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("source")


def card_of(package: Path) -> Any:
    """The card as the Hub's library reads it."""
    return ModelCard.load(package / "README.md", ignore_metadata_errors=False)


def in_cache(source: Path, root: Path, repo: str = "microsoft/Phi-4-mini-instruct") -> Path:
    """The source as a snapshot in the Hub's cache."""
    folder = root / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(source, folder)
    return folder


def test_metadata_come_from_the_source_and_its_place_on_the_hub(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(MICROSOFT)
    convert(in_cache(source, tmp_path), tmp_path / "out", **FOUR_BITS)
    card = card_of(tmp_path / "out")
    assert card.data.to_dict() == {
        "base_model": "microsoft/Phi-4-mini-instruct",
        "base_model_relation": "quantized",
        "language": ["multilingual", "en", "no"],
        "library_name": "mlx",
        "license": "mit",
        "license_link": "https://example.org/LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["nlp", "code", "mlx", "phi4_mlx", "phi3", "4-bit"],
    }
    assert "[microsoft/Phi-4-mini-instruct](https://huggingface.co/microsoft/Phi-4-mini-instruct)" in card.text
    assert "commit `012345678901`" in card.text
    assert "| 4 bits (affine, groups of 32), float32 |" in card.text
    assert "--model PATH" in card.text and "mlx_lm.generate" in card.text
    assert "Calibration" not in card.text and str(tmp_path) not in card.content


def test_a_copy_of_a_package_keeps_the_base_of_the_package(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(MICROSOFT)
    convert(in_cache(source, tmp_path), tmp_path / "four", **FOUR_BITS)
    convert(tmp_path / "four", tmp_path / "six", dequantize=True, **FOUR_BITS, q_bits=6)
    data = card_of(tmp_path / "six").data
    assert (data.base_model, data.license) == ("microsoft/Phi-4-mini-instruct", "mit")
    assert data.base_model_relation == "quantized" and data.tags[-1] == "6-bit"


def test_a_dense_copy_is_not_called_quantised(source: Path, tmp_path: Path) -> None:
    convert(in_cache(source, tmp_path, "owner/some--model"), tmp_path / "out")
    data = card_of(tmp_path / "out").data.to_dict()
    assert data["base_model"] == "owner/some--model" and "base_model_relation" not in data
    assert data["tags"] == ["mlx", "phi4_mlx", "phi3"]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_has_a_card_that_is_the_same_each_time(kind: str, tmp_path: Path) -> None:
    source = WRITERS[kind](tmp_path / "source")
    for name in ("a", "b"):
        convert(source, tmp_path / name, quantize=True, q_group_size=32)
    texts = [(tmp_path / name / "README.md").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]
    card = card_of(tmp_path / "a")
    media = kind == "phi4mm"
    assert card.data.pipeline_tag == ("image-text-to-text" if media else "text-generation")
    assert ("towers for pictures and sound" in card.text) == ("LoRA in `vision-lora`" in card.text) == media
    assert ("mlx_lm" in card.text) == (kind == "phi3")
    assert "base_model" not in card.data.to_dict() and "license" not in card.data.to_dict()
    assert "README.md" not in read_manifest(tmp_path / "a")["files"]
    (tmp_path / "a" / "README.md").write_text("edited")
    load(tmp_path / "a", verify=True)


BAD_CARDS = {
    "no metadata": "# Title\n",
    "never closed": "---\nlicense: mit\n",
    "not YAML": "---\nlicense: [\n---\n",
    "a list": "---\n- license\n---\n",
    "objects": "---\nlicense: !!python/object/apply:os.system ['false']\n---\n",
    "an impossible date": "---\nlicense: 2020-13-45\n---\n",
    "deep": "---\nlicense: " + "[" * 2000 + "\n---\n",
    "numbers and nothing": "---\nlicense: 3\ntags: [1, {a: b}]\nlanguage:\n---\n",
    "endless": f"---\nlicense: {'x' * 9000}\n---\n",
    "aliases": "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]\n---\n",
    "other bytes": "\x00\x01\ud800",
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_a_damaged_card_of_the_source_gives_no_metadata(case: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(BAD_CARDS[case].encode(errors="surrogatepass"))
    assert not read_origin(tmp_path, tmp_path).metadata


@pytest.mark.parametrize("place", [Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_a_card_that_is_no_file_gives_no_metadata(place: Callable[[Path], object], tmp_path: Path) -> None:
    place(tmp_path / "README.md")
    assert not read_origin(tmp_path, tmp_path).metadata


def test_a_name_cannot_break_the_markdown(source: Path, tmp_path: Path) -> None:
    strange = source.rename(tmp_path / "a`b\n---\nlicense: x")
    (strange / "README.md").write_text("---\nlicense: \"a\\n---\\nb\"\ntags: '*'\n---\n")
    convert(strange, tmp_path / "out", **FOUR_BITS)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: x" not in text
    (metadata,) = list(yaml.safe_load_all(text.split("\n---\n")[0]))
    assert metadata["license"] == "a\n---\nb" and metadata["tags"][0] == "*"


def test_a_calibrated_package_has_the_table_and_the_picture(source: Path, tmp_path: Path) -> None:
    parameters = plan(source, load(source)[0].config, make_recipe("affine", 4, 32, None), None, False)
    measured = {
        each.path: [
            Candidate(each.path, Scheme("affine", bits, 32), each.rows * each.width, 0.001 * n, 0.1) for bits in (4, 5)
        ]
        for n, each in enumerate(parameters)
        if each.target
    }
    chosen = {path: own["down" in path] for path, own in measured.items()}
    report = Report(chosen, measured, 5.5, "my `data`.jsonl", "0" * 64, 4321, 5.0, 10**6, 0.01234)
    write_package(tmp_path / "out", source, None, lambda *_: parameters, report=lambda: report)
    text = card_of(tmp_path / "out").text
    assert "4,321 tokens of `my data.jsonl`" in text and "0.01234 nats" in text and f"{report.kl_sum:.5f}" in text
    assert "| `mlp.down_proj` | 2 | 2 of 5 |" in text and "| `embed_tokens` | 1 | 1 of 4 |" in text
    layers = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert layers == ["| 0 | 4 | 4 | 4 | 5 |", "| 1 | 4 | 4 | 4 | 5 |"]
    assert "(quantization.png)" in text and (tmp_path / "out" / "quantization.png").is_file()
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["calibration"]["tokens"] == 4321
    assert not {"quantization.json", "quantization.png"} & read_manifest(tmp_path / "out")["files"].keys()
    load(tmp_path / "out", verify=True)
