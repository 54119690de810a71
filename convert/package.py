"""Conversion of a checkpoint into a package, written whole or not at all.

A package has config.json, the weights, the tokenizer's files unchanged, generation_config.json with every token that
ends an answer, and a manifest of hashes. mlx-lm and the Swift loader read it too, if they know the kind of model. No
code is copied. The model card, and the report of a calibration, are for people: no loader reads them, and the manifest
does not list them, so that they may be edited.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phi4_mlx.adapters.folder import Adapter
from phi4_mlx.checkpoint import check_vocabulary, read_config
from phi4_mlx.config.fields import Config
from phi4_mlx.errors import RequestError
from phi4_mlx.files.atomic import whole_or_absent
from phi4_mlx.files.dtypes import DTYPES, FLOATS
from phi4_mlx.files.json_file import JsonObject, read_json
from phi4_mlx.files.manifest import MANIFEST_FILE, file_sha256
from phi4_mlx.files.regular_file import TOKENIZER_BYTES
from phi4_mlx.files.safetensors import INDEX_FILE, TOWERS_FILE, bytes_in, file_in
from phi4_mlx.hub import resolve
from phi4_mlx.terminal.amount import size
from phi4_mlx.tokens.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

from .calibrated import Wish, calibrated
from .card import CARD_FILE, model_card, read_origin
from .loras import lora_bytes, plan_loras, write_loras
from .quantize import Recipe, make_recipe, quantization_config
from .report import Report, write_report
from .weights import Parameter, plan, shards, write_shard

_FLOATS = {DTYPES[name].mlx_name: name for name in FLOATS}  # "bfloat16" -> "BF16"

# Copied if they exist: the tokenizer's files, and the licence of the weights.
SMALL_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
    "LICENSE",
)  # fmt: skip

SHARD_BYTES = 5 * 10**9 - 10**7  # tensor bytes in a file, which stays under 5 GB with its header

Progress = Callable[[int, int], object]
"""Called as (bytes done, bytes in all) of the source."""


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    *,
    embed_bits: int | None = None,
    tower_bits: int | None = None,
    adapter_bits: int | None = None,
    q_calibration: str | Path | None = None,
    q_bpw: float | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> None:
    """Converts a checkpoint of the family into a package, written whole or not at all.

    Args:
        hf_path: a folder, or a Hub id ("owner/name").
        mlx_path: the package's folder; must not exist yet.
        quantize: whether to quantise the matrices; with `dequantize`, also those of a quantised checkpoint.
        q_group_size: numbers that share a scale; None for the mode's default (64 for affine).
        q_bits: bits per number; None for the mode's default (4 for affine).
        q_mode: "affine" (the default), "mxfp4", "nvfp4" or "mxfp8".
        dtype: "float16", "bfloat16" or "float32" for the numbers that are not quantised, except those that the model
            keeps in float32; None keeps each as it is.
        dequantize: whether to dequantise a quantised checkpoint.
        revision: a commit, branch or tag of the Hub repository.
        embed_bits: bits per number of the embedding and the head, which are one matrix if tied; None for `q_bits`.
        tower_bits: bits per number of the towers for pictures and sound; 16 leaves them dense, None for 8.
        adapter_bits: likewise for the LoRAs of a multimodal checkpoint.
        q_calibration: texts in a format of training, on which the matrices are rounded and their bits chosen, or
            "default"; None rounds to nearest. With `q_bits`, all matrices have those.
        q_bpw: bits per number of all quantised matrices together, scales and biases included; None for as many as plain
            4-bit matrices take.
        progress: called as (bytes done, bytes in all) of the checkpoint; first for the calibration, if there is one.
        tell: called with a line for the user.

    Raises:
        RequestError: the target exists or cannot be written, or the options contradict each other.
        ConfigError: config.json asks for maths that is not implemented.
        CheckpointError: the checkpoint is missing, damaged, incomplete or of another shape.
        TokenizerError: the tokenizer's files are missing or damaged, or do not fit the weights.
    """
    bits = {"q_bits": q_bits, "embed_bits": embed_bits, "tower_bits": tower_bits, "adapter_bits": adapter_bits}
    recipe, wish = _asked(quantize, q_mode, q_group_size, bits, q_calibration, q_bpw)
    kind = _kind(dtype)
    target = Path(os.path.abspath(os.path.expanduser(mlx_path)))
    plans = _Plans(
        recipe, wish, kind, dequantize, bits, target.with_name(f".{target.name}.calibration"), progress, tell
    )
    loras = partial(plan_loras, recipe=recipe, dtype=kind, dequantize=dequantize)
    write_package(target, hf_path, revision, plans.parameters, progress, loras, lambda: plans.report)
    if wish:
        shutil.rmtree(plans.work, ignore_errors=True)


def _kind(dtype: str | None) -> str | None:
    """The dtype that an option names, one of `FLOATS`; None for none."""
    if dtype is not None and dtype not in _FLOATS:
        raise RequestError(f"--dtype {dtype!r} is not known; known are {', '.join(_FLOATS)}")
    return _FLOATS[dtype] if dtype else None


def _asked(
    quantize: bool,
    q_mode: str | None,
    q_group_size: int | None,
    bits: Mapping[str, int | None],
    q_calibration: str | Path | None,
    q_bpw: float | None,
) -> tuple[Recipe | None, Wish | None]:
    """The quantisation and the calibration that options ask for; RequestError if they contradict each other."""
    if not quantize:
        _check_not_given(**bits, q_group_size=q_group_size, q_mode=q_mode, q_calibration=q_calibration, q_bpw=q_bpw)
        return None, None
    own = bits["tower_bits"], bits["adapter_bits"]
    recipe = make_recipe(q_mode or "affine", bits["q_bits"], q_group_size, bits["embed_bits"], *own)
    if q_calibration is not None:
        wish = Wish(q_calibration, bits["q_bits"], q_bpw, bits["embed_bits"])
        wish.check(recipe)
        return recipe, wish
    if q_bpw is not None:
        raise RequestError(f"--q-bpw {q_bpw:g} chooses bits by calibration; add --q-calibration default or a file")
    return recipe, None


@dataclass
class _Plans:
    """Plans the parameters of a package, after a calibration if one is asked for."""

    recipe: Recipe | None
    wish: Wish | None
    dtype: str | None
    dequantize: bool
    bits: Mapping[str, int | None]
    work: Path
    progress: Progress | None
    tell: Callable[[str], object]
    report: Report | None = None

    def parameters(self, folder: Path, config: Config) -> list[Parameter]:
        parameters = plan(folder, config, self.recipe, self.dtype, self.dequantize)
        own = {"--tower-bits": self.bits["tower_bits"], "--adapter-bits": self.bits["adapter_bits"]}
        _check_towers(folder, parameters, own)
        if self.recipe and self.wish:
            shown = self.progress or (lambda done, total: None)
            parameters, self.report = calibrated(
                folder, config, parameters, self.recipe, self.wish, self.work, shown, self.tell
            )
        return parameters


def _check_towers(folder: Path, parameters: list[Parameter], own_bits: Mapping[str, int | None]) -> None:
    """Raises RequestError if an option for towers and LoRAs is given for a model of text alone."""
    for name, bits in own_bits.items():
        if bits is not None and not any(parameter.on_demand for parameter in parameters):
            raise RequestError(f"{name} {bits} is for multimodal models, and {folder} has no towers; leave it out")


def _check_not_given(**options: str | Path | float | None) -> None:
    """Raises RequestError if an option of quantisation is given."""
    for name, value in options.items():
        if value is not None:
            raise RequestError(f"--{name.replace('_', '-')} {value} does nothing without -q; add -q, or drop it")


def write_package(
    target: Path,
    hf_path: str | Path,
    revision: str | None,
    planned: Callable[[Path, Config], list[Parameter]],
    progress: Progress | None = None,
    planned_loras: Callable[[Path, Config], dict[str, Adapter]] | None = None,
    report: Callable[[], Report | None] = lambda: None,
    tuned: bool = False,
    library: str = "mlx",
) -> None:
    """Writes a package, whole or not at all.

    Args:
        target: the package's folder; must not exist yet.
        hf_path: the checkpoint to convert, a folder or a Hub id.
        revision: a commit, branch or tag of the Hub repository.
        planned: maps the checkpoint's folder and its config to the parameters to write.
        progress: called as (bytes done, bytes in all) of the checkpoint.
        planned_loras: likewise to the LoRAs to write, by folder; None keeps those of the checkpoint as they are.
        report: gives the report of the calibration, if there was one, once the weights are written.
        tuned: whether the weights are a fine-tune of the checkpoint, for the model card.
        library: the one that the package is for, for the model card.

    Raises:
        Phi4Error: as `convert`, and whatever `planned` raises.
    """
    with whole_or_absent(target) as out:
        folder = resolve(hf_path, revision)
        raw = read_json(file_in(folder, "config.json"))
        config = read_config(raw)
        parameters = planned(folder, config)
        loras = planned_loras(folder, config) if planned_loras else plan_loras(folder, config, None, None, False)
        given = {
            name: bytes_in(folder, name, TOKENIZER_BYTES) for name in SMALL_FILES if os.path.lexists(folder / name)
        }
        tokenizer = load_tokenizer(folder, prove=True)
        small = _small_files(folder, raw, config, parameters, given, tokenizer)
        weights = sum(parameter.output_bytes for parameter in parameters)
        check_room(out, weights + sum(map(len, small.values())) + lora_bytes(loras))
        files = _write_weights(out, parameters, progress or (lambda done, total: None))
        for path in write_loras(out, loras, config.num_hidden_layers):
            files[path.relative_to(out).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        files |= {name: _entry(data) for name, data in small.items()}
        manifest: JsonObject = {"files": files}
        if isinstance(tokenizer, ByteTokenizer):  # proven to merge as tiktoken does; `load` need not prove it again
            manifest["tokenizer_merges_agree"] = files["tokenizer.json"]["sha256"]
        calibration = report()
        drawn = write_report(out, calibration)[1:] if calibration else []
        sizes = {name: adapter.nbytes for name, adapter in loras.items()}
        origin = read_origin(hf_path, folder, tuned)
        picture = drawn[0].name if drawn else ""
        card = model_card(origin, config, parameters, sizes, calibration, picture, library)
        documents = {MANIFEST_FILE: _json(manifest), CARD_FILE: card.encode()}
        for name, data in {**documents, **small}.items():  # config.json last: with it the package is complete
            (out / name).write_bytes(data)


def _small_files(
    folder: Path,
    raw: JsonObject,
    config: Config,
    parameters: list[Parameter],
    given: Mapping[str, bytes],
    tokenizer: Tokenizer,
) -> dict[str, bytes]:
    """Every file except the weights and the manifest, corrected where necessary; config.json comes last."""
    check_vocabulary(folder, tokenizer, config)
    files = dict(given)
    _correct_tokenizer_config(folder, files)

    name = "generation_config.json"
    generation = read_json(folder / name) if name in given else {}
    named = generation.get("eos_token_id")
    eos = list(dict.fromkeys(named)) if isinstance(named, list) else [] if named is None else [named]
    eos += sorted(tokenizer.eos_ids - set(eos), reverse=True)  # <|end|> before <|endoftext|>, as Microsoft has it
    ids = {key: raw[key] for key in ("bos_token_id", "pad_token_id") if isinstance(raw.get(key), int)}
    if generation.get("eos_token_id") != eos:
        files[name] = _json(ids | generation | {"eos_token_id": eos})
    tokens = {"pad_token_id": None} | ids | {"eos_token_id": eos}  # without it, transformers pads with 32000
    files["config.json"] = _json(_config(config, parameters) | tokens)
    return files


def _correct_tokenizer_config(folder: Path, files: dict[str, bytes]) -> None:
    """Corrects two settings that loaders read differently.

    Swift strips spaces by default, and with two different chat templates each loader makes its own choice.
    """
    name = "tokenizer_config.json"
    if name not in files:
        return
    given = read_json(folder / name)
    corrected = given | {"clean_up_tokenization_spaces": False}
    file_template = files.get("chat_template.jinja")
    if file_template is not None and given.get("chat_template") != file_template.decode(errors="replace"):
        corrected.pop("chat_template", None)  # the file wins in transformers, mlx-lm and Swift
    if corrected != given:
        files[name] = _json(corrected)


def _config(config: Config, parameters: list[Parameter]) -> JsonObject:
    """config.json in the layout that all loaders read, with the quantisation."""
    schemes = {parameter.path: parameter.target for parameter in parameters if parameter.target}
    main = {parameter.path for parameter in parameters if not parameter.on_demand}
    settings = quantization_config(schemes, main) if schemes else None
    ((numbers, _),) = Counter(parameter.numbers for parameter in parameters).most_common(1)
    plain = {key: value for key, value in config.to_dict().items() if not key.startswith("quantization")}
    quantization = {"quantization": settings, "quantization_config": settings} if settings else {}
    return plain | quantization | {"torch_dtype": DTYPES[numbers].mlx_name}


def check_room(out: Path, needed: int) -> None:
    """Raises RequestError if the disk of a new folder has less than `needed` bytes free."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RequestError(
            f"{out.parent} has {size(free)} free and the package needs {size(needed)}; make room, or "
            "name a folder on another disk"
        )


def _write_weights(out: Path, parameters: list[Parameter], progress: Progress) -> JsonObject:
    """Writes the weights, with an index if there is more than one file; returns file name -> entry in the manifest.

    Parameters that are read at their first use, which are the towers, have a file of their own outside the index.
    """
    main = [parameter for parameter in parameters if not parameter.on_demand]
    parts = shards(main, SHARD_BYTES)
    names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    named = [*zip(names if len(parts) > 1 else ["model.safetensors"], parts, strict=True)]
    if len(main) < len(parameters):
        named.append((TOWERS_FILE, [parameter for parameter in parameters if parameter.on_demand]))
    total = sum(parameter.input_bytes for parameter in parameters)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    files: JsonObject = {}
    weight_map: dict[str, str] = {}
    for name, part in named:
        sha256 = write_shard(out / name, part, advance)
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256}
        if name != TOWERS_FILE:
            weight_map |= {tensor: name for parameter in part for tensor in parameter.outputs}
    if len(parts) > 1:
        size = sum(parameter.output_bytes for parameter in main)
        index = _json({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
        (out / INDEX_FILE).write_bytes(index)
        files[INDEX_FILE] = _entry(index)
    return files


def _entry(data: bytes) -> JsonObject:
    """The manifest's entry for a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: JsonObject) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
