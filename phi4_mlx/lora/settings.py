"""The options of a fine-tuning run, each with its default, limits and help, under mlx-lm's names.

Flags, a YAML file and Python set the same fields, and `OPTIONS` is the only table of limits and defaults. Only the
standard library is imported here, because `--help` is made of these options and must be fast.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from phi4_mlx.errors import RequestError
from phi4_mlx.hub import DEFAULT_MODEL
from phi4_mlx.terminal.suggestion import suggestion

MANY = 10**9
LARGEST = sys.float_info.max
DEFAULT_ITERS = 1000


def shown(value: object) -> str:
    """A value for a message, cut to 60 characters; never slow, whatever a file holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return short.repr(value)[:60]
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


@dataclass(frozen=True)
class Option:
    """The type and limits of a setting.

    Attributes:
        kind: int, float, bool or str.
        help: its description in `--help`.
        low: smallest number allowed.
        high: largest number allowed.
        known: the texts allowed; empty for any text that is not empty.
        may_be_all: True if -1 stands for all; 0 is then refused.
        may_be_none: True if None is allowed.
    """

    kind: type
    help: str
    low: float = 0
    high: float = MANY
    known: tuple[str, ...] = ()
    may_be_all: bool = False
    may_be_none: bool = False

    @property
    def limits(self) -> str:
        """The allowed values, in words."""
        if self.kind is bool:
            return "true or false"
        if self.known:
            return f"one of {', '.join(self.known)}"
        if self.kind is str:
            return "a text that is not empty"
        if self.may_be_all:
            return f"-1 for all, or a whole number from 1 to {self.high:,}"
        if self.kind is int:
            return f"a whole number from {self.low:,} to {self.high:,}"
        return f"a number from {self.low:g} to {self.high:g}"

    def allows(self, value: object) -> bool:
        """True if the value is allowed."""
        if value is None or isinstance(value, bool):
            return self.may_be_none if value is None else self.kind is bool
        if self.kind is str:
            return isinstance(value, str) and (value in self.known if self.known else bool(value))
        if self.kind is bool or not isinstance(value, (int,) if self.kind is int else (int, float)):
            return False
        return self.low <= value <= self.high and not (self.may_be_all and value == 0)

    def check(self, name: str, value: object) -> None:
        """Raises RequestError, which names the setting, if the value is not allowed."""
        if not self.allows(value):
            near = suggestion(value, self.known) if isinstance(value, str) else ""
            raise RequestError(f"{name} must be {self.limits}, not {shown(value)}{near}")

    def parsed(self, word: str) -> Any:
        """Parses a value of the command line.

        Raises:
            ValueError: the value is not allowed.
        """
        value: Any = word if self.kind is str or "_" in word else self.kind(word)  # Python reads 1_0 as ten
        if not self.allows(value):
            raise ValueError(value)
        return value


def _option(
    default: Any, kind: type, help: str, low: float = 0, high: float = MANY, *, known: tuple[str, ...] = (),
    may_be_all: bool = False,
) -> Any:  # fmt: skip
    option = Option(kind, help, low, high, known, may_be_all, default is None)
    return field(default=default, metadata={"option": option})


def _options(of: type) -> dict[str, Option]:
    """The options among the fields of a dataclass."""
    return {each.name: each.metadata["option"] for each in fields(of) if "option" in each.metadata}


@dataclass(frozen=True)
class LoraParameters:
    """The shape of an adapter; `add_adapter` checks its limits.

    Attributes:
        rank: rank of the two matrices.
        scale: factor of their product.
        dropout: probability that training drops an input, from 0 to below 1.
        keys: linear layers of a block; None for all of them.
    """

    rank: int = _option(8, int, "rank of the adapter's matrices", 1)
    scale: float = _option(20.0, float, "factor of the adapter's output, alpha / rank in PEFT's terms", 1e-6, 1e6)
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, option in SHAPE.items():
            option.check(name, getattr(self, name))
        Option(float, "", -LARGEST, LARGEST).check("dropout", self.dropout)
        if self.keys is not None and not (isinstance(self.keys, tuple) and all(isinstance(k, str) for k in self.keys)):
            raise RequestError(f"keys must be a list of names of layers, not {shown(self.keys)}")


SHAPE = _options(LoraParameters)
"""The options of `LoraParameters` that are also options of a run: flags, and names at the top of a file."""


SCHEDULES = {
    "cosine_decay": (2, 3, 1), "exponential_decay": (2, 2, None), "linear_schedule": (3, 3, 2), "step_decay": (3, 3, 2),
}  # fmt: skip
"""mlx-lm's schedule -> (fewest arguments, most arguments, index of the argument that is a number of steps)"""


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule as mlx-lm writes it: one of MLX's schedules after a warm-up.

    Attributes:
        name: a key of `SCHEDULES`.
        arguments: the arguments of MLX's function of that name.
        warmup: steps over which the rate rises to the first argument.
        warmup_init: the rate at the start of the warm-up.
    """

    name: str
    arguments: tuple[float, ...]
    warmup: int = 0
    warmup_init: float = 0.0

    def __post_init__(self) -> None:
        Option(str, "", known=tuple(SCHEDULES)).check("name", self.name)
        few, many, steps = SCHEDULES[self.name]
        if not isinstance(self.arguments, tuple) or not few <= len(self.arguments) <= many:
            counts = f"{few}" if few == many else f"{few} or {many}"
            given = shown(self.arguments)
            raise RequestError(f"arguments of {self.name} must be {counts} numbers in a list, not {given}")
        for at, value in enumerate(self.arguments):
            limits = Option(int, "", 1) if at == steps else Option(float, "", 0, 10)
            limits.check(f"argument {at + 1} of {self.name}", value)
        Option(int, "").check("warmup", self.warmup)
        Option(float, "", 0, 10).check("warmup_init", self.warmup_init)


OPTIMIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "weight_decay", "bias_correction"),
    "adam": ("betas", "eps", "bias_correction"),
    "adafactor": ("clip_threshold", "decay_rate", "beta_1", "weight_decay"),
    "muon": ("momentum", "weight_decay", "nesterov", "ns_steps"),
    "sgd": ("momentum", "weight_decay", "dampening", "nesterov"),
}
"""Optimizer -> the names that `optimizer_config` may hold."""


@dataclass(frozen=True)
class Settings:
    """The options of a run. The other fields are described beside their defaults.

    Attributes:
        lora_parameters: the shape of the adapter.
        lr_schedule: "cosine" or "constant", after `warmup`; or a `Schedule`, which replaces `learning_rate` and
            `warmup`.
        optimizer_config: further arguments of the optimizer; see `OPTIMIZER_OPTIONS`.
        given: names of the options that were set in a file or by a flag, those of lora_parameters included.
    """

    model: str | None = _option(
        None, str, "a folder, a Hugging Face id or an embedded model (default: mlx-community/Phi-4-mini-instruct-4bit)"
    )
    data: str = _option(
        "data", str, "a folder with train.jsonl, optionally valid.jsonl and test.jsonl; one file; or a Hugging Face id"
    )
    adapter_path: str = _option("adapters", str, "folder for the adapter, checkpoints and metrics")
    resume_adapter_file: str | None = _option(
        None, str, "initial adapter: a folder, or a file with adapter_config.json beside it (default: none)"
    )
    task: str = _option(
        "sft", str, "sft learns answers; dpo and orpo, preferences between two answers", known=("sft", "dpo", "orpo")
    )
    fine_tune_type: str = _option("lora", str, "parameters to train", known=("lora", "dora", "full"))
    num_layers: int = _option(-1, int, "number of last blocks to train; -1 for all", -1, may_be_all=True)
    lora_parameters: LoraParameters = field(default_factory=LoraParameters)
    iters: int | None = _option(None, int, "batches to train on (default: 1000)", 1)
    epochs: int | None = _option(
        None, int, "times to train on each sample, in place of --iters (default: as --iters says)", 1
    )
    batch_size: int = _option(4, int, "samples in a batch, over all processes", 1)
    grad_accumulation_steps: int = _option(1, int, "batches in an update; each target has the same weight", 1)
    max_seq_length: int = _option(2048, int, "tokens of a sample; longer ones are cut, and the output says so", 2)
    packing: bool = _option(
        True, bool, "put the samples of a batch side by side in one row, without padding"
    )
    mask_prompt: bool = _option(False, bool, "learn the answers only, not the prompts")
    grad_checkpoint: bool = _option(
        False, bool, "recompute activations in backward: less memory, more time"
    )
    optimizer: str = _option(
        "adamw", str, "adam has no weight decay, adafactor takes less memory", known=tuple(OPTIMIZER_OPTIONS)
    )
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = _option(1e-4, float, "highest learning rate", 0, 10)
    lr_schedule: str | Schedule = _option(  # noqa: RUF009
        "cosine", str, "learning rate after the warm-up", known=("cosine", "constant")
    )
    warmup: int = _option(0, int, "updates over which the learning rate rises")
    weight_decay: float = _option(0.01, float, "weight decay of adamw, adafactor and muon; of sgd only if given", 0, 10)
    clip: float = _option(1.0, float, "largest norm of the gradient; 0 for no limit", 0, 1e6)
    beta: float = _option(0.1, float, "how strongly DPO stays near the base; weight of ORPO's preference", 1e-6, 100)
    steps_per_report: int = _option(10, int, "batches between two lines of output without a progress bar", 1)
    report_to: str | None = _option(
        None, str, "also send the metrics to this library, if it is installed (default: none)",
        known=("wandb", "tensorboard"),
    )
    steps_per_eval: int = _option(200, int, "batches between two validations", 1)
    val_batches: int = _option(25, int, "batches in a validation; -1 for all", -1, may_be_all=True)
    test: bool = _option(
        False, bool, "print the loss on the test set after training; without --train, of the adapter in --adapter-path"
    )
    test_batches: int = _option(500, int, "batches of the test set to use; -1 for all", -1, may_be_all=True)
    patience: int = _option(0, int, "stop after this many validations without a better loss; 0 for never")
    save_every: int = _option(100, int, "batches between two checkpoints", 1)
    keep_checkpoints: int = _option(3, int, "number of newest checkpoints to keep", 1)
    seed: int = _option(0, int, "seed of the data order, the adapter and dropout")
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            if not (name == "lr_schedule" and isinstance(self.lr_schedule, Schedule)):
                option.check(name, getattr(self, name))
        if not isinstance(self.lora_parameters, LoraParameters):
            raise RequestError(f"lora_parameters must be LoraParameters, not {shown(self.lora_parameters)}")
        if self.iters is not None and self.epochs is not None:
            raise RequestError(f"iters {self.iters} and epochs {self.epochs} are both given; leave one of them out")
        _check_optimizer(self.optimizer, self.optimizer_config)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], where: str) -> Settings:
        """Makes settings from a parsed file; an option that is not given has its default.

        Args:
            given: option -> value.
            where: the file, for messages.

        Raises:
            RequestError: a name is not known, or a value is out of range.
        """
        known = {each.name for each in fields(cls)} - {"given"} | SHAPE.keys()
        _check_names(given, known, where)
        values, named = dict(given), set(given)
        try:
            shape = {name: values.pop(name) for name in SHAPE if name in values}
            if shape or "lora_parameters" in values:
                parameters = values.get("lora_parameters", {})
                named |= {*_check_names(parameters, {each.name for each in fields(LoraParameters)}, "lora_parameters")}
                for name in shape.keys() & parameters.keys():
                    raise RequestError(f"{name} is given twice, also in lora_parameters; leave one of them out")
                values["lora_parameters"] = LoraParameters(**_with_tuple(parameters, "keys") | shape)
            schedule = values.get("lr_schedule")
            if isinstance(schedule, Mapping):
                _check_names(schedule, {each.name for each in fields(Schedule)}, "lr_schedule")
                whole = {"name": None, "arguments": None} | _with_tuple(schedule, "arguments")
                values["lr_schedule"] = Schedule(**whole)
            return cls(**values, given=frozenset(named))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    @property
    def base(self) -> str:
        """The name of the model to tune."""
        return self.model or DEFAULT_MODEL

    def named(self, name: str) -> bool:
        """True if an option was given or differs from its default; takes the names of lora_parameters too."""
        place = self.lora_parameters if name in {each.name for each in fields(LoraParameters)} else self
        return name in self.given or getattr(place, name) != getattr(_DEFAULTS[type(place)], name)

    def total_iters(self, batches_per_epoch: int) -> int:
        """Number of batches of a whole run, from `iters` or `epochs`."""
        return self.iters or (self.epochs * batches_per_epoch if self.epochs else DEFAULT_ITERS)

    @property
    def rate_depends_on_iters(self) -> bool:
        """True if the learning rate of an update depends on the number of updates."""
        return self.lr_schedule == "cosine"

    @property
    def noun(self) -> str:
        """The unit that the loss is averaged over."""
        return "targets" if self.task == "sft" else "pairs"


OPTIONS = _options(Settings)
FLAGS: dict[str, Option] = {}
"""The options of the command line, in the order of `--help`: those of lora_parameters where it stands."""
for each in fields(Settings):
    if each.name == "lora_parameters":
        FLAGS |= SHAPE
    elif each.name in OPTIONS:
        FLAGS[each.name] = OPTIONS[each.name]


def _with_tuple(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the mapping in which the list `name` is a tuple."""
    return {**given, name: tuple(given[name])} if isinstance(given.get(name), list) else dict(given)


def _check_names(given: object, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object of names and values, not {shown(given)}")
    for name in given:
        if name not in known:
            near = suggestion(name, known) if isinstance(name, str) else ""
            known_names = f"; known are {', '.join(sorted(known))}"
            raise RequestError(f"{where}: {shown(name)} is not known{near or known_names}")
    return given


def _check_optimizer(optimizer: str, config: Mapping[str, Any]) -> None:
    known = OPTIMIZER_OPTIONS[optimizer]
    _check_names(config, {*known}, f"optimizer_config of {optimizer}")
    for name, value in config.items():
        where = f"optimizer_config: {name}"
        if name == "betas":
            number = Option(float, "", 0, 1)
            pair = isinstance(value, (list, tuple)) and len(value) == 2
            if not pair or not all(number.allows(each) and each < 1 for each in value):
                raise RequestError(f"{where} must be a list of two numbers from 0 to below 1, not {shown(value)}")
        elif name in ("bias_correction", "nesterov"):
            Option(bool, "").check(where, value)
        elif name in ("momentum", "dampening"):
            Option(float, "", 0, 1).check(where, value)
        elif name == "ns_steps":
            Option(int, "", 1, 100).check(where, value)
        elif name == "beta_1":
            Option(float, "", 0, 1, may_be_none=True).check(where, value)
        elif name == "decay_rate":
            Option(float, "", -10, 0).check(where, value)
        else:
            Option(float, "").check(where, value)

    if optimizer == "sgd" and config.get("nesterov") and (not config.get("momentum") or config.get("dampening")):
        raise RequestError("optimizer_config: nesterov needs a momentum above 0 and no dampening")


_DEFAULTS: dict[type, Any] = {Settings: Settings(), LoraParameters: LoraParameters()}
