"""The YAML file of `-c`: options under their own names, and mlx-lm's files as they are.

What such a file says in mlx-lm's words and is the same here is taken over; what would change nothing is left out and
told; for the rest there is a word on what to write instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.settings import Settings
from phi4_mlx.terminal.command import utf8

# Options of mlx-lm, of today and of old, that make no difference here: memory is freed by itself, no code is ever
# fetched, and a project's name is the library's own business.
WITHOUT_EFFECT = ("clear_cache_threshold", "config", "project_name", "trust_remote_code", "use_chat_template")
_SWITCHED_OFF = ("wandb", "use_dora", "hf_dataset", "lr_schedule", "optimizer_config", "lora_parameters")
_INSTEAD = {
    "alpha": "write scale, which is alpha / rank",
    "lora_layers": "write num_layers",
    "use_dora": "write fine_tune_type: dora",
    "wandb": "write report_to: wandb",
    "hf_dataset": "write data: owner/name; the dataset needs columns text, prompt and completion, or messages",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but that 1e-5 is a number, as in YAML 1.2, and no text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def read_config_file(path: str, optimizer: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Reads a file of options.

    Args:
        path: the file.
        optimizer: that is taken whatever the file says; the file may say things of several.

    Returns:
        (name -> value, as `Settings.from_mapping` takes them, and `train` where it is given; what to tell the user)

    Raises:
        RequestError: the file is not YAML, holds no names and values, or asks for what is not done here.
        OSError: it cannot be read.
    """
    try:
        given = yaml.load(utf8(Path(os.path.expanduser(path)).read_bytes(), path), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with a 13th month, say
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}, []
    if not isinstance(given, dict):
        raise RequestError(f"{path} must hold names and values, not {given!r:.60}")
    values = {name: value for name, value in given.items() if not (value is None and name in _SWITCHED_OFF)}
    told = _take_out_what_has_no_effect(values, path)
    _take_over(values, path, optimizer)
    for name in values:
        if name in _INSTEAD:
            raise RequestError(f"{path}: {name} is not known here; {_INSTEAD[name]}")
    if not isinstance(values.get("train", False), bool):
        raise RequestError(f"{path}: train must be true or false, not {values['train']!r:.60}")
    return values, told


def _take_out_what_has_no_effect(values: dict[str, Any], path: str) -> list[str]:
    told = [name for name in WITHOUT_EFFECT if values.pop(name, None)]
    if values.get("use_dora") is False:
        del values["use_dora"]
    if isinstance(values.get("lr_schedule"), Mapping) and "warmup" in values:
        told.append("warmup")
        del values["warmup"]
    return [f"{path}: {', '.join(told)} changes nothing here"] if told else []


def _take_over(values: dict[str, Any], path: str, optimizer: str | None) -> None:
    """Puts mlx-lm's words for an optimizer, an adapter and a dataset into ours."""
    configs = values.get("optimizer_config")
    if isinstance(configs, Mapping) and all(isinstance(each, (Mapping, type(None))) for each in configs.values()):
        chosen = optimizer or values.get("optimizer", Settings.optimizer)
        values["optimizer_config"] = (configs.get(chosen) if isinstance(chosen, str) else None) or {}
    parameters = values.get("lora_parameters")
    if isinstance(parameters, Mapping) and "alpha" in parameters:
        raise RequestError(f"{path}: lora_parameters: alpha is not known here; {_INSTEAD['alpha']}")
    dataset = values.get("hf_dataset")
    if isinstance(dataset, Mapping) and dataset.keys() == {"path"} and "data" not in values:
        values["data"] = dataset["path"]
        del values["hf_dataset"]
