"""What a fine-tuning run is told: every option, its default and its limits, under mlx-lm's names.

The command line and a YAML file (`-c config.yaml`) fill in the same fields; the command line wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.layers import DEFAULT_KEYS
from phi4_mlx.sampling import check_number, check_whole

FINE_TUNE_TYPES = ("lora", "dora", "full")
TASKS = ("sft", "dpo", "orpo")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("cosine", "constant")
REPORTS = (None, "wandb", "tensorboard")


@dataclass(frozen=True)
class LoraParameters:
    """The shape of an adapter; see `add_adapter`."""

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] = DEFAULT_KEYS


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        iters: optimizer steps.
        batch_size: rows in a batch, over all processes.
        grad_accumulation_steps: batches in a step; each target weighs the same.
        max_seq_length: slots of a row, in tokens.
        packing: several samples in a row.
        warmup: steps over which the learning rate rises.
        clip: largest norm of the gradient; 0 for no limit.
        resume_adapter_file: an adapter to begin with in place of a fresh one: its folder, or its adapters.safetensors.
        num_layers: blocks with an adapter, from the last; -1 for all.
        steps_per_eval: steps between two validations.
        val_batches: batches in a validation; -1 for all.
        patience: validations without a better loss after which training stops; 0 never stops.
        save_every: steps between two checkpoints.
        keep_checkpoints: how many of the newest are kept.
        beta: how far DPO may go from the base, or the weight of ORPO's preference.
    """

    model: str | None = None
    data: str = "data"
    adapter_path: str = "adapters"
    resume_adapter_file: str | None = None
    task: str = "sft"
    fine_tune_type: str = "lora"
    num_layers: int = -1
    lora_parameters: LoraParameters = field(default_factory=LoraParameters)
    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    max_seq_length: int = 2048
    packing: bool = True
    mask_prompt: bool = False
    grad_checkpoint: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    beta: float = 0.1
    steps_per_report: int = 10
    report_to: str | None = None
    steps_per_eval: int = 200
    val_batches: int = 25
    patience: int = 0
    save_every: int = 100
    keep_checkpoints: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (
            ("iters", 1), ("batch_size", 1), ("grad_accumulation_steps", 1), ("max_seq_length", 2), ("warmup", 0),
            ("steps_per_report", 1), ("steps_per_eval", 1), ("patience", 0), ("save_every", 1), ("keep_checkpoints", 1),
            ("seed", 0),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), low)
        for name in ("num_layers", "val_batches"):
            check_whole(name, getattr(self, name), -1)
            if getattr(self, name) == 0:
                raise RequestError(f"{name} must be -1 for all, or at least 1, not 0")
        for name, low, high in (
            ("learning_rate", 0, 10), ("weight_decay", 0, 10), ("clip", 0, 1e6), ("beta", 0, 100),
        ):  # fmt: skip
            check_number(name, getattr(self, name), low, high)
        for name, known in (
            ("task", TASKS), ("fine_tune_type", FINE_TUNE_TYPES), ("optimizer", OPTIMIZERS), ("lr_schedule", SCHEDULES),
            ("report_to", REPORTS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                shown = ", ".join(value for value in known if value)
                raise RequestError(f"{name} {getattr(self, name)!r} is not known; known are {shown}")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], where: str) -> Settings:
        """Settings from a parsed file; what it leaves out has its default.

        Raises:
            RequestError: a name is not known, or a value is out of range; says where.
        """
        values = dict(given)
        if "lora_parameters" in values:
            parameters = values["lora_parameters"]
            _check_names(parameters, LoraParameters, f"{where}: lora_parameters")
            keys = parameters.get("keys", DEFAULT_KEYS)
            if not isinstance(keys, Sequence) or isinstance(keys, str):
                raise RequestError(f"{where}: keys must be a list, not {keys!r:.60}")
            values["lora_parameters"] = LoraParameters(**{**parameters, "keys": tuple(keys)})
        _check_names(values, cls, where)
        try:
            return cls(**values)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None


def _check_names(given: Any, known: type, where: str) -> None:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object of names and values, not {given!r:.60}")
    names = {each.name for each in fields(known)}
    for name in given:
        if name not in names:
            raise RequestError(f"{where}: {name!r} is not known; known are {', '.join(sorted(names))}")
