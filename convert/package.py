"""A checkpoint -> a package: what it holds, and how it comes to be whole or not at all.

A package is config.json, the weights, the tokenizer's files as they were, generation_config.json with every token that
ends an answer, and a manifest of hashes. mlx-lm and the Swift loader read it too. No code is copied.

All of it is written into a hidden folder beside the target, flushed to the disk, and renamed. config.json goes last:
without it no loader takes the folder for a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phi4_mlx.config import ModelConfig
from phi4_mlx.errors import RequestError, TokenizerError
from phi4_mlx.files.atomic import whole_or_absent
from phi4_mlx.files.json_file import read_json
from phi4_mlx.files.manifest import MANIFEST_FILE
from phi4_mlx.files.safetensors import INDEX_FILE, file_in
from phi4_mlx.hub import resolve
from phi4_mlx.tokens.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

from .quantize import make_recipe, quantization_config
from .weights import Parameter, plan, shards, write_shard

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

# Taken along where they are there: the tokenizer's files, and the licence under which the weights are passed on.
SMALL_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE",
)  # fmt: skip

SHARD_BYTES = 5 * 10**9 - 10**7  # of tensors: with its header a file stays under 5 GB

Manifest = dict[str, dict[str, Any]]  # file name -> its bytes and sha256


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
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Converts a checkpoint of the family into a package, complete or not at all.

    Args:
        hf_path: a folder, or a Hub id ("owner/name").
        mlx_path: the package's folder; must not exist yet.
        quantize: packs the matrices; with `dequantize`, also those of a checkpoint that is packed already.
        q_group_size: numbers that share a scale; 64 if None, or what the mode has.
        q_bits: bits of each number; 4 if None, or what the mode has.
        q_mode: "affine" (the default), "mxfp4", "nvfp4" or "mxfp8".
        dtype: "float16", "bfloat16" or "float32" for the numbers that are not packed; None keeps each as it is.
        dequantize: unpacks a quantised checkpoint.
        revision: a commit, branch or tag of the Hub repository.
        embed_bits: bits of the embedding and the head, which are one matrix where they are tied; as `q_bits` if None.
        progress: called as (bytes done, bytes in all) of the checkpoint.

    Raises:
        RequestError: the target exists or cannot be written, or the options do not go together.
        ConfigError: config.json asks for maths that is not done here.
        CheckpointError: the checkpoint is missing, damaged, incomplete or of another shape.
        TokenizerError: the tokenizer's files are missing or damaged, or do not go with the weights.
    """
    if not quantize:
        _refuse_without_q(q_bits=q_bits, q_group_size=q_group_size, q_mode=q_mode, embed_bits=embed_bits)
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"--dtype {dtype!r} is not known; known are {', '.join(DTYPES)}")
    recipe = make_recipe(q_mode or "affine", q_bits, q_group_size, embed_bits) if quantize else None

    def planned(folder: Path, config: ModelConfig) -> list[Parameter]:
        return plan(folder, config, recipe, DTYPES[dtype] if dtype else None, dequantize)

    write_package(Path(mlx_path), hf_path, revision, planned, progress)


def _refuse_without_q(**options: Any) -> None:
    """How to quantise was said, and nothing would be quantised."""
    for name, value in options.items():
        if value is not None:
            raise RequestError(f"--{name.replace('_', '-')} {value} does nothing without -q")


def write_package(
    target: Path,
    hf_path: str | Path,
    revision: str | None,
    planned: Callable[[Path, ModelConfig], list[Parameter]],
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Writes a package, complete or not at all.

    Args:
        target: the package's folder; must not exist yet.
        hf_path: the checkpoint it is made from, a folder or a Hub id.
        revision: a commit, branch or tag of the Hub repository.
        planned: says what becomes of each parameter, given the checkpoint's folder and its config.
        progress: called as (bytes done, bytes in all) of the checkpoint.

    Raises:
        Phi4Error: as `convert`, and whatever `planned` raises.
    """
    with whole_or_absent(target) as out:
        folder = resolve(hf_path, revision)
        raw = read_json(file_in(folder, "config.json"))
        config = ModelConfig.from_dict(raw)
        parameters = planned(folder, config)
        given = {name: file_in(folder, name).read_bytes() for name in SMALL_FILES if os.path.lexists(folder / name)}
        tokenizer = load_tokenizer(folder, prove=True)
        small = _small_files(folder, raw, config, parameters, given, tokenizer)
        _check_room(out, parameters, small)
        files = _write_weights(out, parameters, progress or (lambda done, total: None))
        files |= {name: _write(out / name, data) for name, data in small.items() if name != "config.json"}
        manifest: dict[str, Any] = {"files": files | {"config.json": _entry(small["config.json"])}}
        if isinstance(tokenizer, ByteTokenizer):  # proven to merge as tiktoken does; `load` need not prove it again
            manifest["tokenizer_merges_agree"] = files["tokenizer.json"]["sha256"]
        _write(out / MANIFEST_FILE, _json(manifest))
        _write(out / "config.json", small["config.json"])


def _small_files(
    folder: Path,
    raw: Mapping[str, Any],
    config: ModelConfig,
    parameters: list[Parameter],
    given: Mapping[str, bytes],
    tokenizer: Tokenizer,
) -> dict[str, bytes]:
    """Everything but the weights and the manifest: the given files, mended where they need it, and config.json."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids and the embedding {config.vocab_size:,} rows; "
            "they do not belong together"
        )
    files = dict(given)
    _mend_tokenizer_config(folder, files)

    name = "generation_config.json"
    generation = read_json(folder / name) if name in given else {}
    named = generation.get("eos_token_id")
    eos = list(dict.fromkeys(named)) if isinstance(named, list) else [] if named is None else [named]
    eos += sorted(tokenizer.eos_ids - set(eos), reverse=True)  # <|end|> before <|endoftext|>, as Microsoft has it
    ids = {key: raw[key] for key in ("bos_token_id", "pad_token_id") if isinstance(raw.get(key), int)}
    if generation.get("eos_token_id") != eos:
        files[name] = _json(ids | generation | {"eos_token_id": eos})
    files["config.json"] = _json(_config(config, parameters) | ids | {"eos_token_id": eos})
    return files


def _mend_tokenizer_config(folder: Path, files: dict[str, bytes]) -> None:
    """Swift strips spaces unless told not to, and two different chat templates would leave the choice to the loader."""
    name = "tokenizer_config.json"
    if name not in files:
        return
    given = read_json(folder / name)
    mended = given | {"clean_up_tokenization_spaces": False}
    file_template = files.get("chat_template.jinja")
    if file_template is not None and given.get("chat_template") != file_template.decode(errors="replace"):
        mended.pop("chat_template", None)  # the file wins in transformers, mlx-lm and Swift
    if mended != given:
        files[name] = _json(mended)


def _config(config: ModelConfig, parameters: list[Parameter]) -> dict[str, Any]:
    """The model in the layout that all loaders know, and how it is packed."""
    schemes = {parameter.path: parameter.target for parameter in parameters if parameter.target}
    settings = quantization_config(schemes) if schemes else None
    ((numbers, _),) = Counter(parameter.numbers for parameter in parameters).most_common(1)
    dtype = next(name for name, stored in DTYPES.items() if stored == numbers)
    return dataclasses.replace(config, quantization=settings).to_dict() | {"torch_dtype": dtype}


def _check_room(out: Path, parameters: list[Parameter], small: Mapping[str, bytes]) -> None:
    needed = sum(parameter.output_bytes for parameter in parameters) + sum(map(len, small.values()))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RequestError(
            f"{out.parent} has {free / 1e9:.2f} GB free and the package needs {needed / 1e9:.2f} GB; make room, or "
            "name another disk"
        )


def _write_weights(out: Path, parameters: list[Parameter], progress: Callable[[int, int], Any]) -> Manifest:
    """Writes the weights, and an index where they are more than one file."""
    parts = shards(parameters, SHARD_BYTES)
    total = sum(parameter.input_bytes for parameter in parameters)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    files: Manifest = {}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        sha256 = write_shard(out / name, part, advance)
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256}
        weight_map |= {tensor: name for parameter in part for tensor in parameter.outputs}
    if len(parts) > 1:
        size = sum(parameter.output_bytes for parameter in parameters)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        files[INDEX_FILE] = _write(out / INDEX_FILE, _json(index))
    return files


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a file down to the disk, and says what the manifest will say of it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _entry(data)


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
