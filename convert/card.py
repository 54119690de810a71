"""The model card of a package: README.md with the metadata that the Hugging Face Hub reads.

Source: https://huggingface.co/docs/hub/model-cards, the metadata's names.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phi4_mlx.config.fields import Config
from phi4_mlx.errors import Phi4Error
from phi4_mlx.files.dtypes import DTYPES
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.files.manifest import REPORT_FILE
from phi4_mlx.files.safetensors import bytes_in
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.terminal.printable import visible
from phi4_mlx.terminal.version import __version__

from .quantize import Scheme
from .report import Report, kind_of, layer_of
from .weights import Parameter

CARD_FILE = "README.md"

_KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag", "tags")  # true of the package as well
_BASE = ("base_model", "base_model_relation")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")  # the Hub's cache
_LONGEST = 300  # characters of a field, and fields of a list


@dataclass(frozen=True)
class Origin:
    """The source of a package.

    Attributes:
        name: of the source, without its folder.
        hub_id: the source on the Hub; "" if that is not known.
        commit: of `hub_id`; "" if that is not known.
        metadata: of the source's card; empty if it has none.
        tuned: whether an adapter was fused into the weights.
    """

    name: str
    hub_id: str
    commit: str
    metadata: Mapping[str, Any]
    tuned: bool = False


def read_origin(hf_path: str | Path, folder: Path, tuned: bool = False) -> Origin:
    """Reads the card of a source, and finds its name on the Hub.

    Args:
        hf_path: the source as the user named it, a folder or a Hub id.
        folder: the folder that it was resolved to.
        tuned: whether an adapter is fused into the weights.
    """
    name = str(hf_path)
    cached = _IN_CACHE.search(folder.resolve().as_posix())
    commit = cached[3] if cached else ""
    hub_id = f"{cached[1]}/{cached[2]}" if cached else ""
    if name not in EMBEDDED:
        name = hub_id.rpartition("/")[2] or folder.resolve().name
    return Origin(name, hub_id, commit, _metadata(folder), tuned)


def _metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card; empty if there is none, or none that can be read: the weights need no card."""
    try:
        text = bytes_in(folder, CARD_FILE).decode("utf-8", errors="replace")
        found = yaml.safe_load(match[1]) if (match := _FRONT_MATTER.match(text)) else None
    except (Phi4Error, yaml.YAMLError, ValueError, RecursionError):
        return {}
    given = found if isinstance(found, dict) else {}
    return {key: given[key] for key in (*_KEPT, *_BASE) if _is_plain(given.get(key))}


def _is_plain(value: Any) -> bool:
    """True for a short string and a short list of them."""
    parts = value if isinstance(value, list) else [value]
    return 0 < len(parts) <= _LONGEST and all(isinstance(part, str) and 0 < len(part) <= _LONGEST for part in parts)


def model_card(
    origin: Origin,
    config: Config,
    parameters: Sequence[Parameter],
    adapters: Mapping[str, int],
    report: Report | None = None,
    picture: str = "",
    library: str = "mlx",
) -> str:
    """The text of README.md; the same for the same source and options.

    Args:
        origin: the source.
        config: its config.
        parameters: the parameters of the package.
        adapters: folder of each LoRA in the package -> its bytes.
        report: of the calibration, if there was one.
        picture: file name of the report's picture; "" if there is none.
        library: the one that the package is for, "mlx" or "transformers".
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(origin, config, parameters, library), allow_unicode=True)}---\n",
        f"# {visible(origin.name)}{' for MLX' if library == 'mlx' else ''}\n",
        _history(origin, report is not None),
        _sizes(config, parameters, adapters),
        _usage(config) if library == "mlx" else _TRANSFORMERS_USAGE,
    ]
    if report:
        parts.append(_calibration(report, picture))
    return "\n".join(parts)


def _front_matter(origin: Origin, config: Config, parameters: Sequence[Parameter], library: str) -> dict[str, Any]:
    given = {key: origin.metadata[key] for key in _KEPT if key in origin.metadata}
    own = given.get("tags", [])
    main = _main_schemes(parameters)
    tags = [*(own if isinstance(own, list) else [own]), library, "phi4_mlx", config.model_type]
    if main:
        tags.append(f"{round(sum(scheme.bits * count for scheme, count in main.items()) / main.total())}-bit")
    media = any(parameter.on_demand for parameter in parameters)
    found = {"pipeline_tag": "image-text-to-text" if media else "text-generation"} | given
    found |= {"library_name": library, "tags": list(dict.fromkeys(tags))}
    if origin.hub_id:
        relation = "finetune" if origin.tuned else "quantized" if main else ""
        base: dict[str, Any] = {"base_model": origin.hub_id} | ({"base_model_relation": relation} if relation else {})
    else:  # a package of ours, for example: its base is the base of this one
        base = {key: origin.metadata[key] for key in _BASE if key in origin.metadata}
    return found | base


def _main_schemes(parameters: Sequence[Parameter]) -> Counter[Scheme]:
    """The schemes of the decoder's matrices, by how many numbers have each."""
    schemes: Counter[Scheme] = Counter()
    for each in parameters:
        if each.target and not each.on_demand:
            schemes[each.target] += each.rows * each.width
    return schemes


def _history(origin: Origin, calibrated: bool) -> str:
    source = f"`{visible(origin.name).replace('`', '')}`"
    if origin.hub_id:
        source = f"[{origin.hub_id}](https://huggingface.co/{origin.hub_id})"
        source += f" (commit `{origin.commit[:12]}`)" if origin.commit else ""
    elif origin.name in EMBEDDED:
        source += " (comes with phi4_mlx)"
    how = "A LoRA adapter was fused into the weights of" if origin.tuned else "Converted from"
    end = ", with bits chosen for each matrix by calibration" if calibrated else ""
    return f"{how} {source} by phi4_mlx {__version__}{end}.\n"


def _sizes(config: Config, parameters: Sequence[Parameter], adapters: Mapping[str, int]) -> str:
    decoder = [each for each in parameters if not each.on_demand]
    towers = [each for each in parameters if each.on_demand]
    rows = [("decoder, with embedding and head", decoder), ("towers for pictures and sound", towers)]
    lines = ["| part | numbers | bytes | format |", "|---|---|---|---|"]
    for name, part in rows:
        if part:
            numbers = sum(each.rows * _per_row(each) for each in part)
            nbytes = sum(each.output_bytes for each in part)
            lines.append(f"| {name} | {numbers:,} | {size(nbytes)} | {_formats(part)} |")
    lines += [f"| LoRA in `{folder}` | | {size(nbytes)} | |" for folder, nbytes in adapters.items()]
    context = f"{config.max_position_embeddings:,} tokens{config.context_note}"
    return "\n".join(["## Contents\n", *lines, "", f"Context: {context}.\n"])


def _per_row(parameter: Parameter) -> int:
    """Numbers in a row of the unquantised parameter."""
    if parameter.packed:
        return parameter.width
    count = 1
    for length in parameter.inputs[0].info.shape[1:]:
        count *= length
    return count


def _formats(parameters: Collection[Parameter]) -> str:
    """Schemes and dtypes of some parameters, the most numbers first."""
    numbers: Counter[str] = Counter()
    bits: dict[str, set[int]] = {}
    for each in parameters:
        if each.target:
            name = f"({each.target.mode}, groups of {each.target.group_size})"
            bits.setdefault(name, set()).add(each.target.bits)
        else:
            ((dtype, _),) = each.outputs.values()
            name = DTYPES[dtype].mlx_name
        numbers[name] += each.rows * _per_row(each)
    widths = {name: f"{', '.join(map(str, sorted(found)))} bits " for name, found in bits.items()}
    return ", ".join(f"{widths.get(name, '')}{name}" for name, _ in numbers.most_common())


_TRANSFORMERS_USAGE = """## Use

`PATH` is the folder of this file, or the name of its repository on the Hub.

```sh
vllm serve PATH
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("PATH"), AutoTokenizer.from_pretrained("PATH")
```
"""


def _usage(config: Config) -> str:
    lines = [
        "## Use\n",
        "`PATH` is the folder of this file, or the name of its repository on the Hub.\n",
        "```sh",
        "python -m phi4_mlx chat --model PATH",
        "```\n",
        "```python",
        "from phi4_mlx import generate, load\n",
        'model, tokenizer = load("PATH")',
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Write a haiku about rain."}])',
        "print(generate(model, tokenizer, prompt))",
        "```\n",
    ]
    if _known_to_mlx_lm(config.model_type):
        lines += [
            "With mlx-lm:\n",
            "```sh",
            'mlx_lm.generate --model PATH --prompt "Write a haiku about rain."',
            "```\n",
        ]
    return "\n".join(lines)


def _known_to_mlx_lm(model_type: str) -> bool:
    """True if mlx-lm has a model of this name; looked up without an import of mlx-lm, which takes seconds."""
    found = importlib.util.find_spec("mlx_lm")
    folders = found.submodule_search_locations if found else None
    return any((Path(folder) / "models" / f"{model_type}.py").is_file() for folder in folders or ())


def _calibration(report: Report, picture: str) -> str:
    kinds = list(dict.fromkeys(map(kind_of, report.chosen)))
    lines = [
        "## Calibration\n",
        f"The bits of each matrix minimise the KL divergence from the unquantised model within "
        f"{report.bits_per_weight:g} bits per weight, scales included ({report.mean_bits:.2f} used). The weights were "
        f"rounded by GPTQ (arXiv 2210.17323) on {amount(report.tokens, 'token')} of "
        f"`{visible(report.data).replace('`', '')}`. On a part of them, the package has a KL of {report.kl:.5f} nats "
        f"per token; the sum over its matrices, each quantised alone, is {report.kl_sum:.5f}. `{REPORT_FILE}` has "
        "every figure.\n",
        "| matrices | count | of how many bits | size | sum of KL |",
        "|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [each for path, each in report.chosen.items() if kind_of(path) == kind]
        bits = Counter(each.scheme.bits for each in own)
        listed = ", ".join(f"{count} of {width}" for width, count in sorted(bits.items()))
        kl = sum(each.kl for each in own)
        lines.append(f"| `{kind}` | {len(own)} | {listed} | {size(sum(each.nbytes for each in own))} | {kl:.5f} |")
    layered = [
        kind for kind in kinds if any(kind_of(path) == kind and layer_of(path) is not None for path in report.chosen)
    ]
    if layered:
        lines += ["", "Bits by layer:\n", f"| layer | {' | '.join(f'`{kind}`' for kind in layered)} |"]
        lines.append("|---" * (len(layered) + 1) + "|")
        bits_at = {(layer_of(path), kind_of(path)): each.scheme.bits for path, each in report.chosen.items()}
        for layer in sorted({layer for layer, _ in bits_at if layer is not None}):
            lines.append(f"| {layer} | {' | '.join(str(bits_at.get((layer, kind), '')) for kind in layered)} |")
    if picture:
        lines += ["", f"![KL against bytes, by matrix]({picture})"]
    return "\n".join([*lines, ""])
