"""The settings of an engine, which cross to its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from phi4_mlx.generation.cache_store.store import StoreSettings
from phi4_mlx.generation.speculate import Mode
from phi4_mlx.models.share import Parallel
from phi4_mlx.ranks.session import ModelOptions
from phi4_mlx.server.engine.adapters import DEFAULT


@dataclass(frozen=True)
class Settings:
    """The settings of an engine; they cross to its process.

    Attributes:
        model: a folder, a Hub id or "demo".
        adapter_path: an adapter that is always on.
        adapters: name -> folder of the adapters that a job may name.
        max_rows: the most jobs that are answered at a time.
        kv_limit_bytes: the most bytes of keys and values; None for a share of the machine's memory.
        prefix_limit_bytes: likewise for the prefix cache.
        chat_format: overrides the recognised one.
        parallel: how ranks hold the model; None to choose.
        store: keeps prompt caches for later; None for none.
        kv_bits: 4 or 8 quantises keys and values; None does not.
        speculate: as for `make_proposer`.
        draft_model: a folder or a Hub id of a model that guesses in place of a lookup; None for none.
        max_step_ms: milliseconds that a step may take while answers run, decode passes and prefill chunks together;
            None for chunks of one size.
        command: see `ModelOptions`.
    """

    model: str
    adapter_path: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    max_rows: int = 32
    kv_limit_bytes: int | None = None
    prefix_limit_bytes: int | None = None
    chat_format: str | None = None
    parallel: Parallel | None = None
    store: StoreSettings | None = None
    kv_bits: int | None = None
    speculate: Mode = "off"
    draft_model: str | None = None
    max_step_ms: float | None = None
    command: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_options(self) -> ModelOptions:
        """The model, with the adapters that jobs may use over ranks, where each rank reads its share at the start."""
        adapters = self.adapters if self.adapter_path is None else {DEFAULT: self.adapter_path, **self.adapters}
        return ModelOptions(
            self.model, self.parallel, adapters=adapters, chat_format=self.chat_format, command=self.command
        )
