"""Dense folders in Hugging Face's layout, which transformers and vLLM load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.config.fields import Config
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.convert.exact import ExactParameter, exact_parameters
from phi4_mlx.convert.package import write_package
from phi4_mlx.errors import RequestError


def write_dense(
    model: str | Path,
    target: str | Path,
    adapter_path: str | Path | None = None,
    revision: str | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> int | None:
    """Writes a dense folder in the dtype of the source, whole or not at all.

    Args:
        model: a folder or a Hub id, dense or quantised.
        target: the new folder; must not exist yet.
        adapter_path: an adapter to merge into the weights; None for none.
        revision: a commit, branch or tag of the Hub repository.
        progress: called with (bytes done, total bytes) of the source.

    Returns:
        Tokens up to which the model uses the short RoPE table; None if it has one table.

    Raises:
        RequestError: the target exists or cannot be written, or the model is of a kind that transformers and vLLM read
            in another layout.
        ConfigError, CheckpointError, TokenizerError: model or adapter is missing, damaged or not supported, or the
            adapter does not fit the model.
    """
    adapter = None if adapter_path is None else read_adapter(Path(os.path.expanduser(adapter_path)))
    boundary: int | None = None

    def planned(folder: Path, config: Config) -> list[ExactParameter]:
        nonlocal boundary
        if type(config) is not ModelConfig:  # a multimodal one is a subclass
            raise RequestError(
                f"{folder} is a model of type {config.model_type}, which transformers and vLLM read in another layout; "
                "--format hf is for Phi-4-mini, Phi-3.5-mini and Phi-4 (phi3); --format mlx writes a package"
            )
        boundary = config.original_max_position_embeddings if config.rope_scaling else None
        parameters: list[ExactParameter] = exact_parameters(folder, config, adapter)
        return parameters

    write_package(Path(target), model, revision, planned, progress, tuned=adapter is not None, library="transformers")
    return boundary
