"""Calibration as `convert` asks for it: the data, the schemes to try, and the parameters that the choice gives."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi4_mlx.checkpoint import check_vocabulary, empty_model, load_tokenizer_and_format
from phi4_mlx.config.fields import Config
from phi4_mlx.data.jsonl import find_split
from phi4_mlx.data.samples import Sample, load_samples
from phi4_mlx.errors import RequestError
from phi4_mlx.files.manifest import file_sha256
from phi4_mlx.files.safetensors import header_of
from phi4_mlx.terminal.amount import amount, size

from .batches import BATCH_TOKENS
from .bits import SCALE_BITS, Candidate, choose_bits
from .calibrate import Calibration, Progress, calibrate
from .quantize import EMBEDDING_AND_HEAD, LEAST_BPW, MOST_BPW, Layout, Recipe, Scheme
from .report import Report
from .weights import Parameter

WIDTHS = (3, 4, 5, 6, 8)  # bits that are tried
DEFAULT_DATA = Path(__file__).with_name("calibration.jsonl")
LONGEST = BATCH_TOKENS  # of a sample
SCORE_BYTES = 2**29  # of attention scores, where they are materialised


@dataclass(frozen=True)
class Wish:
    """A user's wishes for a calibration.

    Attributes:
        data: a file or folder in a format of training, or "default".
        bits: of every matrix; None for mixed bits.
        bits_per_weight: the budget for mixed bits; None for what 4 bits take.
        embed_bits: of the embedding and the head; None for as the others.
    """

    data: str | Path
    bits: int | None
    bits_per_weight: float | None
    embed_bits: int | None

    def check(self, recipe: Recipe) -> None:
        """Raises RequestError if the options contradict each other."""
        if recipe.scheme.mode != "affine":
            raise RequestError(
                f"--q-calibration is for --q-mode affine, not {recipe.scheme.mode}; leave one of them out"
            )
        if self.bits_per_weight is None:
            return
        if self.bits is not None:
            raise RequestError(
                f"--q-bits {self.bits} asks for the same bits in every matrix, and --q-bpw {self.bits_per_weight:g} "
                "for mixed ones; leave one of them out"
            )
        if not LEAST_BPW <= self.bits_per_weight <= MOST_BPW:
            raise RequestError(
                f"--q-bpw {self.bits_per_weight:g} is not a number from {LEAST_BPW} to {MOST_BPW}; 4-bit matrices in "
                "groups of 64 take 4.5"
            )

    def schemes(self, parameters: Sequence[Parameter], recipe: Recipe) -> dict[str, list[Scheme]]:
        """The schemes to try for each matrix; towers keep the recipe's."""
        found = {}
        for each in parameters:
            if each.target and not each.on_demand:
                own = self.embed_bits if each.path in EMBEDDING_AND_HEAD else None
                fixed = self.bits is not None or own is not None
                found[each.path] = [each.target] if fixed else [replace(each.target, bits=width) for width in WIDTHS]
        return found

    def budget(self, recipe: Recipe) -> float:
        """Bits per weight, scales and biases included."""
        if self.bits is not None:
            return 2 * MOST_BPW  # each matrix has one scheme
        if self.bits_per_weight is not None:
            return self.bits_per_weight
        return recipe.scheme.bits + SCALE_BITS / recipe.scheme.group_size


def calibrated(
    folder: Path,
    config: Config,
    parameters: Sequence[Parameter],
    recipe: Recipe,
    wish: Wish,
    work: Path,
    progress: Progress,
    tell: Callable[[str], object],
) -> tuple[list[Parameter], Report]:
    """Calibrates a checkpoint; see `calibrate` for the rest.

    Args:
        folder: the checkpoint.
        config: its config.
        parameters: as planned with the recipe.
        recipe: the quantisation without calibration.
        wish: the user's.
        work: folder of intermediate results.
        progress: as for `calibrate`.
        tell: called with a line for the user.

    Returns:
        The parameters, whose matrices come from the work folder, and the report.

    Raises:
        RequestError: the data is bad or too short, the budget too small, or the disk full.
        CheckpointError: the weights cannot be read.
    """
    schemes, budget = wish.schemes(parameters, recipe), wish.budget(recipe)
    by_path = {each.path: each for each in parameters}
    sizes = {path: by_path[path].rows * by_path[path].width for path in schemes}
    costless = {path: [Candidate(path, each, sizes[path], 0, 0) for each in some] for path, some in schemes.items()}
    choose_bits(costless, budget)  # refuses a budget before the work
    samples = _samples(folder, config, wish.data, tell)
    plain = _header_bytes(parameters, {})
    try:
        _check_room(work, sum(each.nbytes for some in costless.values() for each in some))
        calibration = calibrate(
            parameters, config, samples, schemes, budget, work, progress, tell,
            more_bytes=lambda chosen: _header_bytes(parameters, chosen) - plain,
        )  # fmt: skip
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RequestError(
            f"{work} cannot be written: {reason}; it is kept, and the same command goes on from there"
        ) from None
    found = []
    for each in parameters:
        if each.path not in calibration.chosen:
            found.append(each)
            continue
        scheme = calibration.chosen[each.path].scheme
        inputs, outputs = calibration.stored(each.path), each.layout(scheme)
        found.append(replace(each, inputs=inputs, outputs=outputs, packed=scheme, target=scheme))
    return found, _report(calibration, budget, wish.data)


def _check_room(work: Path, needed: int) -> None:
    """Raises RequestError if all candidates together do not fit on the disk; a killed run has some already."""
    there = sum(path.stat().st_size for path in work.rglob("*.safetensors"))
    free = shutil.disk_usage(work.parent).free
    if needed > free + there:
        raise RequestError(
            f"{work.parent} has {size(free)} free and the calibration needs {size(needed - there)} for a while; make "
            "room, or name a folder on another disk"
        )


def _header_bytes(parameters: Sequence[Parameter], chosen: Mapping[str, Candidate]) -> int:
    """Bytes of the header of the decoder's file, which names the shapes."""
    layout: Layout = {}
    for each in parameters:
        if each.path in chosen:
            layout |= each.layout(chosen[each.path].scheme)
        elif not each.on_demand:
            layout |= each.outputs
    return len(header_of(layout))


def _report(calibration: Calibration, budget: float, data: str | Path) -> Report:
    name, path = ("default", DEFAULT_DATA) if data == "default" else (Path(data).name, find_split(data))
    return Report(
        chosen=calibration.chosen,
        candidates=calibration.candidates,
        bits_per_weight=min(budget, max(each.bits_per_weight for each in calibration.chosen.values())),
        data=name,
        data_sha256=file_sha256(path) if path and path.is_file() else "",
        tokens=calibration.tokens,
        seconds=calibration.seconds,
        peak_bytes=calibration.peak_bytes,
        kl=calibration.kl,
    )


def _samples(folder: Path, config: Config, data: str | Path, tell: Callable[[str], object]) -> list[Sample]:
    tokenizer = load_tokenizer_and_format(folder, None, config.model_type)
    check_vocabulary(folder, tokenizer, config)
    cost = empty_model(config, {}).context_cost()
    longest = min(LONGEST, config.max_position_embeddings)
    if cost.score_bytes:
        longest = max(2, min(longest, math.isqrt(SCORE_BYTES // cost.score_bytes)))
    samples, report = load_samples(DEFAULT_DATA if data == "default" else data, tokenizer, max_seq_length=longest)
    if report.truncated:
        longest_given = amount(report.longest, "token")
        tell(f"calibration samples cut at {longest:,} tokens: {report.truncated:,}; the longest had {longest_given}")
    return samples
