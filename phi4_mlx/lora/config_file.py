"""The YAML file of `-c`, with our options or mlx-lm's.

mlx-lm's options are translated where there is an equivalent, and skipped with a message where they have no effect here;
for the rest, the error names the option to use instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from phi4_mlx.errors import RequestError
from phi4_mlx.files.user_file import read_file
from phi4_mlx.lora.settings import SHAPE, Settings, shown
from phi4_mlx.terminal.command import utf8

# Options of newer and older versions of mlx-lm without effect here: memory is freed automatically, remote code is
# never loaded, and the tracking library names its own project.
WITHOUT_EFFECT = ("clear_cache_threshold", "config", "project_name", "trust_remote_code", "use_chat_template")
_SWITCHED_OFF = ("wandb", "use_dora", "hf_dataset")
_INSTEAD = {
    "alpha": "write scale, which is alpha / rank",
    "lora_layers": "write num_layers",
    "dropout": "write it in lora_parameters",
    "keys": "write it in lora_parameters",
    "prompt_feature": "name the field prompt in the data",
    "completion_feature": "name the field completion in the data",
    "chat_feature": "name the field messages in the data",
    "text_feature": "name the field text in the data",
    "use_dora": "write fine_tune_type: dora",
    "wandb": "write report_to: wandb",
    "hf_dataset": "write data: owner/name; the dataset needs columns text, prompt and completion, or messages",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-5 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def read_config_file(path: str, optimizer: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Reads a file of options.

    Args:
        path: the file.
        optimizer: overrides the file's optimizer; the file may configure several.

    Returns:
        (option -> value for `Settings.from_mapping`, and `train` if it is given; messages for the user)

    Raises:
        RequestError: the file cannot be read, is not YAML, or does not hold names and values; an option is unsupported.
    """
    try:
        given = yaml.load(utf8(read_file(Path(os.path.expanduser(path))), path), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: for example, a date with a 13th month
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}, []
    if not isinstance(given, dict):
        raise RequestError(f"{path} must hold names and values, not {shown(given)}")
    values = _without_nulls(given)
    messages = _remove_without_effect(values, path)
    _translate(values, path, optimizer)
    for name in values:
        if name in _INSTEAD:
            raise RequestError(f"{path}: {name} is not known here; {_INSTEAD[name]}")
    if not isinstance(values.get("train", False), bool):
        raise RequestError(f"{path}: train must be true or false, not {shown(values['train'])}")
    return values, messages


def _without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set; null is mlx-lm's word for the default, and for an `lr_schedule` without a schedule."""
    known = {each.name for each in fields(Settings)} | {*SHAPE, "train", *_INSTEAD, *WITHOUT_EFFECT}
    values = {name: value for name, value in given.items() if not (value is None and name in known)}
    for name in _SWITCHED_OFF:
        if not values.get(name, True):
            del values[name]
    if given.get("lr_schedule", "") is None:
        values["lr_schedule"] = "constant"
    return values


def _remove_without_effect(values: dict[str, Any], path: str) -> list[str]:
    """Removes options without effect; returns the message about them, if there is one."""
    removed = [name for name in WITHOUT_EFFECT if values.pop(name, None)]
    if isinstance(values.get("lr_schedule"), Mapping) and "warmup" in values:
        removed.append("warmup")
        del values["warmup"]
    return [f"{path}: {', '.join(removed)} has no effect here"] if removed else []


def _translate(values: dict[str, Any], path: str, optimizer: str | None) -> None:
    """Replaces mlx-lm's forms of optimizer, adapter and dataset by ours."""
    if isinstance(values.get("optimizer"), str):
        values["optimizer"] = values["optimizer"].lower()
    configs = values.get("optimizer_config")
    if isinstance(configs, Mapping) and all(isinstance(each, (Mapping, type(None))) for each in configs.values()):
        chosen = optimizer or values.get("optimizer", Settings.optimizer)
        values["optimizer_config"] = (configs.get(chosen) if isinstance(chosen, str) else None) or {}
    parameters = values.get("lora_parameters")
    if isinstance(parameters, Mapping) and "alpha" in parameters:
        raise RequestError(f"{path}: lora_parameters: alpha is not known here; {_INSTEAD['alpha']}")
    dataset = values.get("hf_dataset")
    if isinstance(dataset, list) and len(dataset) == 1:
        dataset = dataset[0]
    if isinstance(dataset, Mapping) and dataset.keys() == {"path"} and "data" not in values:
        values["data"] = dataset["path"]
        del values["hf_dataset"]
