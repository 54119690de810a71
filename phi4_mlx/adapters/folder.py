"""Adapter folders in mlx-lm's layout, which the Swift loader reads too: read, checked and written.

A folder has `adapters.safetensors` with `<layer path>.lora_a` [in, R] and `.lora_b` [R, out], under DoRA also
`.m` [out], and `adapter_config.json`. If we wrote it, `adapters.sha256` lists the SHA-256 of both; folders from
elsewhere are taken without. After full fine-tuning the tensors are the model's own, under their own names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from phi4_mlx.config.fields import QUANTIZATION_MODES
from phi4_mlx.errors import CheckpointError
from phi4_mlx.files.atomic import replacing, sync
from phi4_mlx.files.checksums import check_checksums, checksums
from phi4_mlx.files.dtypes import FLOATS, name_of
from phi4_mlx.files.json_file import JsonObject, read_json
from phi4_mlx.files.safetensors import TensorWriter, read_header
from phi4_mlx.terminal.suggestion import path_suggestion

TENSORS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
CHECKSUMS_FILE = "adapters.sha256"

MOST_SCALE = 1e30  # of an adapter's scale and alpha; far beyond use, and far from fp32's largest number

FULL = "full"
PARTS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
"""fine_tune_type -> the tensors of each adapted layer."""
QUANTIZED_PARTS = ("lora_a", "lora_a_scales", "lora_a_biases", "lora_b", "lora_b_scales", "lora_b_biases")
"""The tensors of each layer of a quantised LoRA, whose matrices have the rank first: [R, in] and [R, out]."""


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder, complete and consistent once `checked` has returned it.

    Attributes:
        kind: "lora", "dora", or "full", for which only `tensors` and `source` have a meaning.
        scale: factor of the product a b: alpha / R, or alpha / sqrt(R) for rsLoRA.
        dropout: the probability that training drops an input of `lora_a`, from 0 to below 1.
        tensors: "<layer path>.lora_a" [in, R], "<layer path>.lora_b" [R, out], for DoRA "<layer path>.m" [out]; for
            "full" the model's own.
        source: the file, for messages.
        num_layers: how many of the last layers its config claims; None if it does not say, 0 or less for all.
        keys: the places within a layer, or whole paths, that its config claims; None if it does not say.
        only_layers: the layers it is for, where they are not the last ones.
        base_model: the name of the model it was trained on, where it is known.
        scheme: group size and bits of matrices in `QUANTIZED_PARTS`; None for dense ones.
    """

    kind: str
    scale: float
    dropout: float
    tensors: Mapping[str, mx.array]
    source: str
    num_layers: int | None = None
    keys: tuple[str, ...] | None = None
    only_layers: tuple[int, ...] | None = None
    base_model: str | None = None
    scheme: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of each layer."""
        return PARTS[self.kind] if self.scheme is None else QUANTIZED_PARTS

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(int(array.nbytes) for array in self.tensors.values())

    @property
    def paths(self) -> list[str]:
        """The layers that it adapts, in the model's order."""
        return sorted({name.rpartition(".")[0] for name in self.tensors}, key=place)

    @property
    def weights(self) -> list[str]:
        """Names of the model's weights that it changes, without ".weight", in the model's order."""
        if self.kind != FULL:
            return self.paths
        return sorted((name.removesuffix(".weight") for name in self.tensors), key=place)

    @property
    def mixes(self) -> bool:
        """True if it can be one of several in a forward pass: it changes linear layers of blocks only, by products."""
        return self.kind != FULL and all(place(path)[0] >= 0 for path in self.paths)

    @property
    def rank(self) -> int:
        """R, the same for all layers."""
        return self.shape(self.paths[0])[1]

    def shape(self, path: str) -> tuple[int, int, int]:
        """(in, R, out) of a layer."""
        a, b = self.tensors[f"{path}.lora_a"], self.tensors[f"{path}.lora_b"]
        if self.scheme is None:
            return *a.shape, b.shape[1]
        width, out = (32 * array.shape[1] // self.scheme[1] for array in (a, b))
        return width, a.shape[0], out

    def of(self, path: str) -> tuple[mx.array, ...]:
        """The tensors of one layer in the order of `parts`: a [in, R], b [R, out], and m [out] for DoRA, if dense."""
        return tuple(self.tensors[f"{path}.{part}"] for part in self.parts)


def place(path: str) -> tuple[int, str]:
    """Layer number and place in it: "model.layers.3.mlp.down_proj" -> (3, "mlp.down_proj"); -1 outside the layers."""
    found = re.fullmatch(r"model\.layers\.([0-9]{1,9})\.(.+)", path)
    return (int(found[1]), found[2]) if found else (-1, path)


def read_folder(folder: Path, file: str = TENSORS_FILE, lazy: bool = False) -> Adapter:
    """Reads an adapter folder in mlx-lm's layout.

    Args:
        folder: contains adapter_config.json and the tensors.
        file: the name of the tensors' file; mlx-lm numbers its intermediate ones.
        lazy: leaves the numbers on the disk, also for their SHA-256; `check_finite` reads them.

    Raises:
        ConfigError: adapter_config.json is not a JSON object.
        CheckpointError: a file is missing, damaged or does not match its SHA-256, or a tensor is missing, left over or
            does not fit the others.
    """
    config = read_config(folder)
    if file == TENSORS_FILE and not lazy:
        way = f"copy or train it again; if you changed it on purpose, remove {folder / CHECKSUMS_FILE}"
        check_checksums(folder / CHECKSUMS_FILE, (TENSORS_FILE, CONFIG_FILE), way)
    path = folder / file
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind == FULL:
        return Adapter(FULL, 1.0, 0.0, read_tensors(path, lazy), str(path))
    if not isinstance(kind, str) or kind not in PARTS:
        known = ", ".join([*PARTS, FULL])
        raise CheckpointError(f"{folder}: fine_tune_type {kind!r:.40} is not known; known are {known}")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} has no lora_parameters; it needs rank, scale, dropout and keys")
    keys, rank, num_layers = parameters.get("keys"), parameters.get("rank"), config.get("num_layers")
    base = config.get("model")
    if rank is not None and type(rank) is not int:
        raise CheckpointError(f"{folder / CONFIG_FILE} has rank {rank!r:.40}; it must be a whole number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise CheckpointError(f"{folder / CONFIG_FILE} has keys {keys!r:.80}; they must be names of layers")
    scheme = _scheme(folder, config, kind)
    adapter = Adapter(
        kind=kind,
        scale=_number(folder, "scale", parameters.get("scale")),
        dropout=_number(folder, "dropout", parameters.get("dropout", 0.0)),
        tensors=read_tensors(path, lazy, scheme),
        source=str(path),
        num_layers=num_layers if type(num_layers) is int else None,
        keys=None if keys is None else tuple(keys),
        only_layers=layers_named(folder, config),
        base_model=base if isinstance(base, str) else None,
        scheme=scheme,
    )
    return checked(adapter, rank)


def _scheme(folder: Path, config: JsonObject, kind: str) -> tuple[int, int] | None:
    """Group size and bits of a quantised adapter; None for a dense one."""
    found = config.get("quantization")
    if found is None:
        return None
    bits, sizes = QUANTIZATION_MODES["affine"]
    group_size = found.get("group_size") if isinstance(found, dict) else None
    if group_size not in sizes or found.get("bits") not in bits or found.get("mode", "affine") != "affine":
        raise CheckpointError(f"{folder / CONFIG_FILE} has quantization {found!r:.80}; mlx has no such one")
    if kind != "lora":
        raise CheckpointError(f"{folder / CONFIG_FILE} has quantization, which {kind} adapters do not take")
    return group_size, found["bits"]


def read_config(folder: Path) -> JsonObject:
    """Reads the adapter_config.json of a folder in mlx-lm's layout or PEFT's.

    Raises:
        ConfigError: it is not a JSON object.
        CheckpointError: it is missing.
    """
    if not (folder / CONFIG_FILE).is_file():
        near = "" if folder.is_dir() else path_suggestion(str(folder), os.path.isdir)
        advice = f"; an adapter is a folder with that file and {TENSORS_FILE} in it"
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}{near or advice}")
    return read_json(folder / CONFIG_FILE)


def layers_named(folder: Path, config: JsonObject) -> tuple[int, ...] | None:
    """The layer numbers in a config's layers_to_transform, which PEFT writes for adapters of some layers only.

    Returns:
        The numbers; None if the config does not have the field.

    Raises:
        CheckpointError: the field is not a number or a list of numbers.
    """
    named = config.get("layers_to_transform")
    if named is None:
        return None
    layers = named if isinstance(named, list) else [named]
    if not layers or not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"{folder / CONFIG_FILE} has layers_to_transform {named!r:.80}; they must be numbers")
    return tuple(layers)


def read_tensors(path: Path, lazy: bool = False, scheme: tuple[int, int] | None = None) -> dict[str, mx.array]:
    """Reads the tensors of an adapter file into memory, in the model's order.

    Args:
        path: the file.
        lazy: leaves the numbers on the disk; `check_finite` reads them.
        scheme: of a quantised adapter; None for a dense one.

    Raises:
        CheckpointError: the file is missing, damaged or empty, or a tensor has a wrong dtype or contains NaN or inf.
    """
    infos = read_header(path)
    if not infos:
        raise CheckpointError(f"{path} has no tensors, so it is not an adapter; name another file")
    packed = () if scheme is None else ("U32",)
    for name, info in infos.items():
        if info.dtype not in (*FLOATS, *packed):
            raise CheckpointError(f"{path}: {name} has dtype {info.dtype}; it must be one of {', '.join(FLOATS)}")
    loaded = mx.load(str(path))
    tensors = {name: loaded[name] for name in sorted(infos, key=place)}
    if not lazy:
        check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: Mapping[str, mx.array], source: str) -> None:
    """Reads tensors into memory; raises CheckpointError if one contains NaN or inf."""
    finite = {name: mx.all(mx.isfinite(array)) for name, array in tensors.items()}
    mx.eval(tensors, finite)
    for name in tensors:
        if not finite[name]:
            raise CheckpointError(
                f"{source}: {name} contains NaN or inf (training diverged); use an earlier checkpoint"
            )


def checked(adapter: Adapter, rank: int | Mapping[str, int] | None) -> Adapter:
    """Checks that no tensor is missing or left over, and that the shapes agree.

    Args:
        adapter: the adapter as it was read.
        rank: R from its config, or by layer; None if the config does not say.

    Returns:
        The same adapter.

    Raises:
        CheckpointError: names the first tensor that is missing, left over or of another shape.
    """
    parts = adapter.parts
    for name in adapter.tensors:
        if name.rpartition(".")[2] not in parts or not name.rpartition(".")[0]:
            raise CheckpointError(
                f"{adapter.source}: {name} is left over; a {adapter.kind} adapter has {', '.join(parts)} for each layer"
            )
    if not 0 <= adapter.dropout < 1:
        raise CheckpointError(f"{adapter.source}: dropout {adapter.dropout} is not a number from 0 to below 1")
    for path in adapter.paths:
        if missing := [part for part in parts if f"{path}.{part}" not in adapter.tensors]:
            raise CheckpointError(
                f"{adapter.source}: {path} lacks {missing[0]}; the file is incomplete, download or export it again"
            )
        if not _fits(adapter, path):
            shapes = ", ".join(f"{part} {list(adapter.tensors[f'{path}.{part}'].shape)}" for part in parts)
            expected = ", ".join(("[in, R]", "[R, out]", "[out]")[: len(parts)])
            if adapter.scheme is not None:
                expected = "[R, in] and [R, out] with groups of {} in {} bits".format(*adapter.scheme)
            raise CheckpointError(f"{adapter.source}: {path} has {shapes}; the shapes must be {expected}")
        found = adapter.shape(path)[1]
        rank = found if rank is None else rank
        own = rank[path] if isinstance(rank, Mapping) else rank
        if found != own:
            raise CheckpointError(f"{adapter.source}: {path} has rank {found}; the adapter's rank is {own!r:.40}")
    return adapter


def _fits(adapter: Adapter, path: str) -> bool:
    """True if the shapes of a layer's tensors agree."""
    tensors = adapter.of(path)
    if adapter.scheme is None:
        a, b, *m = tensors
        fit = a.ndim == b.ndim == 2 and a.size and a.shape[1] == b.shape[0]
        return bool(fit) and all(norms.shape == b.shape[1:] for norms in m)
    group_size, bits = adapter.scheme
    if any(each.ndim != 2 or not each.size or each.shape[0] != tensors[0].shape[0] for each in tensors):
        return False
    for packed, *groups in (tensors[:3], tensors[3:]):
        numbers = packed.shape[1] * 32
        fit = all(each.dtype != mx.uint32 and each.shape[1] * group_size * bits == numbers for each in groups)
        if packed.dtype != mx.uint32 or not fit:
            return False
    return True


def write_folder(folder: Path, adapter: Adapter, total_layers: int, extra: Mapping[str, object] | None = None) -> None:
    """Writes an adapter folder that mlx-lm and the Swift loader read, over an older one if there is one.

    All files are on the disk before one of them is renamed.

    Args:
        folder: is made if it does not exist.
        adapter: the adapter to write.
        total_layers: layers of the model; the config counts the adapter's from the last one.
        extra: further fields of adapter_config.json.

    Raises:
        RequestError: one of the files exists and is not a regular file.
        OSError: a file cannot be written, such as on a full disk; the older files are still in place.
    """
    config = {**(extra or {}), **_config(adapter, total_layers)}
    folder.mkdir(parents=True, exist_ok=True)
    with (
        replacing(folder / CHECKSUMS_FILE) as checksums_path,
        replacing(folder / TENSORS_FILE) as tensors_path,
        replacing(folder / CONFIG_FILE) as config_path,
    ):
        write_tensors(tensors_path, adapter.tensors)
        write_config(config_path, config)
        listed = checksums([(TENSORS_FILE, tensors_path), (CONFIG_FILE, config_path)])
        checksums_path.write_text(listed, encoding="utf-8")
        for path in (tensors_path, checksums_path):  # before the first rename: a full disk leaves all older files
            sync(path)
        (folder / CHECKSUMS_FILE).unlink(missing_ok=True)  # a run that is killed here leaves two files without a list


def write_tensors(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Writes tensors to a new file, in the model's order."""
    ordered = sorted(tensors.items(), key=lambda item: place(item[0]))
    with TensorWriter(path, {name: (name_of(array.dtype), array.shape) for name, array in ordered}) as writer:
        for name, array in ordered:
            writer.append(name, memoryview(array.view(mx.uint8)))


def write_config(path: Path, config: Mapping[str, object]) -> None:
    """Writes an adapter_config.json."""
    path.write_text(json.dumps(config, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _config(adapter: Adapter, total_layers: int) -> JsonObject:
    places = [place(path) for path in adapter.paths]
    layers = sorted({layer for layer, _ in places if layer >= 0})
    num_layers = total_layers - layers[0] if layers else 0
    if adapter.kind == FULL:
        outside_layers = any(layer < 0 for layer, _ in places)
        return {"fine_tune_type": FULL, "num_layers": total_layers if outside_layers else num_layers}
    config: JsonObject = {
        "fine_tune_type": adapter.kind,
        "num_layers": num_layers,  # Swift takes this many from the end, so it is never -1
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": sorted({key for _, key in places}),
        },
    }
    if adapter.scheme is not None:
        config["quantization"] = {"group_size": adapter.scheme[0], "bits": adapter.scheme[1]}
    if len(layers) != num_layers:
        config["layers_to_transform"] = layers
    return config


def is_number(value: object) -> bool:
    """True for a number that a scale or a rate may be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_SCALE


def _number(folder: Path, name: str, value: Any) -> float:
    if not is_number(value):
        raise CheckpointError(f"{folder / CONFIG_FILE} has {name} {value!r:.40}; it must be a number")
    return float(value)
