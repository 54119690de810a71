"""What a fine-tuning run is told: every option, its default, its limits and its help, under mlx-lm's names.

Flags, a YAML file and Python fill in the same fields, and each option says once what it may be. Only the standard
library is imported here: the command's `--help` is made of these options, and must cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from phi4_mlx.errors import RequestError

MANY = 10**9


@dataclass(frozen=True)
class Option:
    """What a setting may be.

    Attributes:
        kind: int, float, bool or str.
        help: what it is, for people.
        low: least number that it may be.
        high: greatest number that it may be.
        known: the words that it may be; empty for any but the empty one.
        may_be_all: whether -1 stands for all; then 0, which would be none, is refused.
        may_be_none: whether it can be left open.
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
        """What it may be, in words."""
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

    def allows(self, value: Any) -> bool:
        """Whether it may be that."""
        if value is None or isinstance(value, bool):
            return self.may_be_none if value is None else self.kind is bool
        if self.kind is str:
            return isinstance(value, str) and (value in self.known if self.known else bool(value))
        if self.kind is bool or not isinstance(value, (int,) if self.kind is int else (int, float)):
            return False
        return self.low <= value <= self.high and not (self.may_be_all and value == 0)

    def check(self, name: str, value: Any) -> None:
        """Raises RequestError, which calls it by that name, if it may not be that."""
        if not self.allows(value):
            raise RequestError(f"{name} must be {self.limits}, not {value!r:.60}")

    def parsed(self, word: str) -> Any:
        """The value that a word of the command line stands for.

        Raises:
            ValueError: it may not be that.
        """
        value: Any = word if self.kind is str or "_" in word else self.kind(word)  # Python reads 1_0 as ten
        if not self.allows(value):
            raise ValueError(value)
        return value


@dataclass(frozen=True)
class LoraParameters:
    """The shape of an adapter; see `add_adapter`, which knows the limits.

    Attributes:
        keys: linear layers of a block; None for all of them.
    """

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        Option(int, "", 1).check("rank", self.rank)
        for name in ("scale", "dropout"):
            Option(float, "", -math.inf, math.inf).check(name, getattr(self, name))
        if self.keys is not None and not (isinstance(self.keys, tuple) and all(isinstance(k, str) for k in self.keys)):
            raise RequestError(f"keys must be a list of names of layers, not {self.keys!r:.60}")


SCHEDULES = {
    "cosine_decay": (2, 3, 1), "exponential_decay": (2, 2, None), "linear_schedule": (3, 3, 2), "step_decay": (3, 3, 2),
}  # fmt: skip
"""mlx-lm's schedules -> how few and how many arguments they take, and which of them counts steps."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate in mlx-lm's words: one of MLX's schedules, after a warm-up.

    Attributes:
        name: of `SCHEDULES`.
        arguments: as MLX's function of that name takes them.
        warmup: steps over which the rate rises to the first argument.
        warmup_init: what it rises from.
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
            given = f"{self.arguments!r:.60}"
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
}
"""Optimizer -> what `optimizer_config` may say of it."""


def _option(
    default: Any, kind: type, help: str, low: float = 0, high: float = MANY, *, known: tuple[str, ...] = (),
    may_be_all: bool = False,
) -> Any:  # fmt: skip
    option = Option(kind, help, low, high, known, may_be_all, default is None)
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True)
class Settings:
    """One run. What each field is and may be stands beside it.

    Attributes:
        lora_parameters: the shape of the adapter.
        lr_schedule: "cosine" or "constant", after `warmup`; or a `Schedule`, which then says the rate and the warm-up.
        optimizer_config: what else the optimizer is told; see `OPTIMIZER_OPTIONS`.
        given: which options were named, also those of lora_parameters, where it is known.
    """

    model: str | None = _option(None, str, "a folder, a Hugging Face id, or demo")
    data: str = _option(
        "data", str, "a folder with train.jsonl and perhaps valid.jsonl and test.jsonl, one file, or a Hugging Face id"
    )
    adapter_path: str = _option("adapters", str, "where the adapter, checkpoints and metrics go")
    resume_adapter_file: str | None = _option(
        None, str, "an adapter to begin with: a file with its adapter_config.json beside it, or a folder"
    )
    task: str = _option(
        "sft", str, "what is learned: answers, or preferences between two", known=("sft", "dpo", "orpo")
    )
    fine_tune_type: str = _option("lora", str, "what is trained", known=("lora", "dora", "full"))
    num_layers: int = _option(-1, int, "blocks that are trained, from the last; -1 for all", -1, may_be_all=True)
    lora_parameters: LoraParameters = field(default_factory=LoraParameters)
    iters: int = _option(1000, int, "optimizer steps", 1)
    batch_size: int = _option(4, int, "rows in a batch, over all processes; a packed row holds several samples", 1)
    grad_accumulation_steps: int = _option(1, int, "batches in a step; each target weighs the same", 1)
    max_seq_length: int = _option(2048, int, "tokens in a row", 2)
    packing: bool = _option(
        True, bool, "several samples in a row, so that a batch holds more of them than rows (on by default)"
    )
    mask_prompt: bool = _option(False, bool, "learn the answers alone")
    grad_checkpoint: bool = _option(
        False, bool, "keep less for backward and compute it again: less memory, more time"
    )
    optimizer: str = _option(
        "adamw", str, "adam has no weight decay, adafactor takes less memory", known=tuple(OPTIMIZER_OPTIONS)
    )
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = _option(1e-4, float, "at its highest", 0, 10)
    lr_schedule: str | Schedule = _option(  # noqa: RUF009
        "cosine", str, "what it does after the warm-up", known=("cosine", "constant")
    )
    warmup: int = _option(0, int, "steps over which it rises")
    weight_decay: float = _option(0.01, float, "of adamw and adafactor", 0, 10)
    clip: float = _option(1.0, float, "largest norm of the gradient; 0 for no limit", 0, 1e6)
    beta: float = _option(0.1, float, "how dear leaving the base is to DPO; the weight of ORPO's preference", 1e-6, 100)
    steps_per_report: int = _option(10, int, "steps between two lines, where there is no progress bar", 1)
    report_to: str | None = _option(
        None, str, "where the metrics also go, if it is installed", known=("wandb", "tensorboard")
    )
    steps_per_eval: int = _option(200, int, "steps between two validations", 1)
    val_batches: int = _option(25, int, "batches in a validation; -1 for all", -1, may_be_all=True)
    test: bool = _option(
        False, bool, "tell the loss on the test set after training; without --train, of the adapter in --adapter-path"
    )
    test_batches: int = _option(500, int, "batches of the test set; -1 for all", -1, may_be_all=True)
    patience: int = _option(0, int, "validations without a better loss after which training stops; 0 never stops")
    save_every: int = _option(100, int, "steps between two checkpoints", 1)
    keep_checkpoints: int = _option(3, int, "how many of the newest stay", 1)
    seed: int = _option(0, int, "of the order, the adapter and dropout")
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            if not (name == "lr_schedule" and isinstance(self.lr_schedule, Schedule)):
                option.check(name, getattr(self, name))
        if not isinstance(self.lora_parameters, LoraParameters):
            raise RequestError(f"lora_parameters must be LoraParameters, not {self.lora_parameters!r:.60}")
        _check_optimizer(self.optimizer, self.optimizer_config)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], where: str) -> Settings:
        """Settings from a parsed file; what it leaves out has its default.

        Raises:
            RequestError: a name is not known, or a value is out of range; says where.
        """
        known = {each.name for each in fields(cls)} - {"given"}
        _check_names(given, known, where)
        values, named = dict(given), set(given)
        try:
            if "lora_parameters" in values:
                parameters = values["lora_parameters"]
                named |= {*_check_names(parameters, {each.name for each in fields(LoraParameters)}, "lora_parameters")}
                values["lora_parameters"] = LoraParameters(**_with_tuple(parameters, "keys"))
            schedule = values.get("lr_schedule")
            if isinstance(schedule, Mapping):
                _check_names(schedule, {each.name for each in fields(Schedule)}, "lr_schedule")
                whole = {"name": None, "arguments": None} | _with_tuple(schedule, "arguments")
                values["lr_schedule"] = Schedule(**whole)
            return cls(**values, given=frozenset(named))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    def named(self, name: str) -> bool:
        """Whether an option was given, or at least is not what it would be if it were not; "rank" and so on too."""
        place = self.lora_parameters if name in {each.name for each in fields(LoraParameters)} else self
        return name in self.given or getattr(place, name) != getattr(_DEFAULTS[type(place)], name)

    @property
    def rate_depends_on_iters(self) -> bool:
        """Whether a step's learning rate is another one in a longer run."""
        return self.lr_schedule == "cosine"

    @property
    def noun(self) -> str:
        """What a loss is the mean of."""
        return "targets" if self.task == "sft" else "pairs"


OPTIONS: dict[str, Option] = {
    each.name: each.metadata["option"] for each in fields(Settings) if "option" in each.metadata
}


def _with_tuple(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping, its list of that name as a tuple."""
    return {**given, name: tuple(given[name])} if isinstance(given.get(name), list) else dict(given)


def _check_names(given: Any, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object of names and values, not {given!r:.60}")
    for name in given:
        if name not in known:
            raise RequestError(f"{where}: {name!r:.60} is not known; known are {', '.join(sorted(known))}")
    return given


def _check_optimizer(optimizer: str, config: Any) -> None:
    known = OPTIMIZER_OPTIONS[optimizer]
    _check_names(config, {*known}, f"optimizer_config of {optimizer}")
    for name, value in config.items():
        where = f"optimizer_config: {name}"
        if name == "betas":
            number = Option(float, "", 0, 1)
            pair = isinstance(value, (list, tuple)) and len(value) == 2
            if not pair or not all(number.allows(each) and each < 1 for each in value):
                raise RequestError(f"{where} must be a list of two numbers from 0 to below 1, not {value!r:.60}")
        elif name == "bias_correction":
            Option(bool, "").check(where, value)
        elif name == "beta_1":
            Option(float, "", 0, 1, may_be_none=True).check(where, value)
        elif name == "decay_rate":
            Option(float, "", -10, 0).check(where, value)
        else:
            Option(float, "").check(where, value)


_DEFAULTS: dict[type, Any] = {Settings: Settings(), LoraParameters: LoraParameters()}
