"""Calibration: every matrix quantised in several schemes, and the cost of each in KL divergence, in one pass.

The calibration text runs through the dense model block by block. The second moments of a matrix's inputs decide how it
is rounded. Variants run beside the text: the hidden states of a few tokens, as one quantised matrix has changed them.
At the end, their logits give the KL of that matrix. One variant per matrix is enough: KL is proportional to the squared
error of the outputs, which is known in every scheme. From 3 to 8 bits, that was mostly within a fifth of what was
measured, which is also how much KL differs between small sets of tokens, and from 0.67 to 1.82 times it at worst.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from phi4_mlx.config.fields import Config
from phi4_mlx.data.samples import Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.files.dtypes import mlx_dtype
from phi4_mlx.files.json_file import JsonObject
from phi4_mlx.files.safetensors import Stored

from .batches import Batch, batches, spread
from .bits import Candidate, choose_bits
from .blocks import BlockModel, Rows
from .divergence import Reference
from .gptq import Solver
from .joint import joint_divergence
from .moments import Moments, recording
from .quantize import Scheme
from .weights import Parameter, read_rows
from .work_folder import WorkFolder

LEAST_TOKENS = 1000
MOST_TOKENS = 32_768  # of calibration text; in the demo, 5,000 do as well as 50,000
VARIANT_TOKENS = 1024  # whose KL is measured
VARIANT_LENGTH = 256  # of them in a row
VARIANT_BITS = 4  # in which KL is measured, or the nearest that is tried
BLOCK_NUMBERS = 2**25  # of a matrix that are rounded together
TEXT, PLAIN = "text-", "plain"  # streams of the text, and of the tokens that variants start from

VERSION = 1  # of the recipe; work that another version has left is not used

Progress = Callable[[int, int], object]
"""Called as (bytes done, bytes in all) of the checkpoint's weights."""


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        chosen: path -> the candidate within the budget.
        candidates: path -> all that were measured.
        tokens: of the calibration text.
        kl: KL divergence with all chosen candidates, in nats per token.
        seconds: time of all its runs together.
        peak_bytes: peak of MLX's memory.
        work: the folder of the candidates' numbers.
        parameters: path -> the matrix in the checkpoint.
    """

    chosen: dict[str, Candidate]
    candidates: dict[str, list[Candidate]]
    tokens: int
    kl: float
    seconds: float
    peak_bytes: int
    work: WorkFolder
    parameters: Mapping[str, Parameter]

    def stored(self, path: str) -> tuple[Stored, ...]:
        """The tensors of the chosen candidate of a matrix."""
        return self.work.candidate(self.parameters[path].layout(self.chosen[path].scheme))


def calibrate(
    parameters: Sequence[Parameter],
    config: Config,
    samples: Sequence[Sample],
    schemes: Mapping[str, Sequence[Scheme]],
    bits_per_weight: float,
    work: Path,
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], object] = lambda line: None,
    more_bytes: Callable[[Mapping[str, Candidate]], int] = lambda chosen: 0,
) -> Calibration:
    """Quantises matrices and chooses their bits.

    Args:
        parameters: of the whole model, from the checkpoint.
        config: of the checkpoint.
        samples: the calibration text.
        schemes: path of each matrix to quantise -> the affine schemes to try.
        bits_per_weight: the budget; see `choose_bits`.
        work: folder of intermediate results; a run that was killed goes on from it.
        progress: called as the work proceeds.
        tell: called with a line for the user.
        more_bytes: see `choose_bits`.

    Returns:
        The choice. The caller removes the work folder when it has used it.

    Raises:
        RequestError: there are too few tokens, the budget is too small, or an input of a matrix is not finite.
        CheckpointError: the weights or the work folder cannot be read.
    """
    tokens = sum(len(sample.ids) for sample in samples)
    if tokens < LEAST_TOKENS:
        raise RequestError(
            f"the calibration data has {tokens:,} tokens, and needs at least {LEAST_TOKENS:,}; add texts, or use "
            "--q-calibration default"
        )
    rows = spread([sample.ids for sample in samples], MOST_TOKENS)
    run = _Run(parameters, config, rows, schemes, work, progress, tell)
    used = sum(map(len, rows))
    if used < tokens:
        tell(f"{used:,} of {tokens:,} tokens of calibration data are used, in samples from beginning to end of it")
    run.all_steps()
    candidates = run.candidates()
    state = run.work.state
    chosen = choose_bits(candidates, bits_per_weight, more_bytes)
    kl = run.joint({path: each.scheme for path, each in chosen.items()})
    return Calibration(chosen, candidates, used, kl, state["seconds"], state["peak_bytes"], run.work, run.parameters)


class _Run:
    """One calibration; its steps are the embedding, each block, and the head."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        config: Config,
        rows: Sequence[Sequence[int]],
        schemes: Mapping[str, Sequence[Scheme]],
        work: Path,
        progress: Progress,
        tell: Callable[[str], object],
    ):
        self.schemes, self._progress = schemes, progress
        self.parameters = {each.path: each for each in parameters if each.path in schemes}
        self.work = WorkFolder(work, _settings(parameters, config, rows, schemes), tell)
        self.blocks = BlockModel(config, parameters)
        self.model = self.blocks.model
        self.texts = batches(rows, self.model.boundary)
        self.few = Batch.of(spread([row[:VARIANT_LENGTH] for row in rows], VARIANT_TOKENS))
        self._sizes, self._done = self.blocks.step_bytes, 0
        self.errors: dict[str, dict[str, float]] = self.work.state.setdefault("errors", {})
        self.kl: dict[str, float] = self.work.state.setdefault("kl", {})

    def all_steps(self) -> None:
        """Runs the steps that are not done yet."""
        blocks = (partial(self._block, number) for number in range(len(self.blocks.blocks)))
        steps: list[Callable[[], None]] = [self._embed, *blocks, self._head]
        state = self.work.state
        mx.reset_peak_memory()
        for number in range(self.work.step, len(steps)):
            begin = time.perf_counter()
            self._done = sum(self._sizes[:number])
            self._advance(0)
            self.work.begin()
            steps[number]()
            state["seconds"] = state.get("seconds", 0.0) + time.perf_counter() - begin
            state["peak_bytes"] = max(state.get("peak_bytes", 0), mx.get_peak_memory())
            self.work.finish(number + 1)
        self._progress(sum(self._sizes), sum(self._sizes))

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(min(self._done, sum(self._sizes)), sum(self._sizes))

    def candidates(self) -> dict[str, list[Candidate]]:
        """All that was measured."""
        found: dict[str, list[Candidate]] = {}
        for path, schemes in self.schemes.items():
            numbers, errors = self.parameters[path].rows * self.parameters[path].width, self.errors[path]
            measured = errors[str(self._variant(path).bits)]
            rate = self.kl[path] / measured if measured > 0 else 0.0
            own = [(scheme, errors[str(scheme.bits)]) for scheme in schemes]
            found[path] = [Candidate(path, scheme, numbers, rate * error, error) for scheme, error in own]
        return found

    def _variant(self, path: str) -> Scheme:
        """The scheme in which a matrix is measured."""
        return min(self.schemes[path], key=lambda scheme: abs(scheme.bits - VARIANT_BITS))

    def joint(self, schemes: Mapping[str, Scheme]) -> float:
        """KL divergence with these matrices quantised together, in nats per token."""
        rounded = {path: partial(self._rounded, self.parameters[path], each) for path, each in schemes.items()}
        own = {each.path: each for each in (self.blocks.embedding, self.blocks.head)}
        return joint_divergence(self.blocks, self.few, lambda path: _dense(own[path]), rounded)

    def _embed(self) -> None:
        embedding = self.blocks.embedding
        for number, batch in enumerate(self.texts):
            self._start(f"{TEXT}{number}", batch, _dense(embedding))
        self._start(PLAIN, self.few, _dense(embedding))
        if embedding.path in self.schemes and embedding is not self.blocks.head:
            moments = Moments(embedding.width)  # lookups: all numbers of a row count the same
            moments.inputs, moments.tokens = mx.eye(embedding.width), 1
            self._quantise(embedding, moments)
            self._start(embedding.path, self.few, self._rounded(embedding))

    def _start(self, name: str, batch: Batch, rows: Rows) -> None:
        self.work.save(name, self.blocks.start(batch, rows))

    def _block(self, number: int) -> None:
        """Runs all streams through a block, quantises its matrices, and starts their variants."""
        prefix = f"{self.blocks.blocks[number]}."
        matrices = {path: each for path, each in self.parameters.items() if path.startswith(prefix)}
        with self.blocks.block(number) as block:
            modules = dict(block.named_modules())
            layers = {path.removeprefix(prefix): modules[path.removeprefix(prefix)] for path in matrices}
            with recording(block, layers) as record:
                for index, batch in enumerate(self.texts):
                    record.want(mx.array(batch.wanted))
                    self._through(number, f"{TEXT}{index}")
            moments = record.moments
            for name in self.work.streams():
                if not name.startswith(TEXT):
                    self._through(number, name)
            for path, parameter in matrices.items():
                layer = layers[path.removeprefix(prefix)]
                self._quantise(parameter, moments.pop(path.removeprefix(prefix)))
                exact, layer.weight = layer.weight, mx.concatenate([rows for _, _, rows in self._rounded(parameter)])
                self._through(number, PLAIN, path)
                layer.weight = exact

    def _through(self, number: int, name: str, into: str | None = None) -> None:
        carried = self.model.through_block(number, tuple(self.work.load(name)))
        mx.eval(carried)
        self.work.save(into or name, carried)

    def _quantise(self, parameter: Parameter, moments: Moments) -> None:
        """Writes all candidates of a matrix, and notes their errors."""
        hessian, path = moments.take(), parameter.path
        energy = sum(((rows @ hessian) * rows).sum().item() for _, _, rows in _dense(parameter))
        solver = Solver(hessian, path)
        del hessian
        self.errors[path] = {}
        for scheme in self.schemes[path]:
            errors: list[float] = []
            self.work.save_candidate(parameter.layout(scheme), _quantised(parameter, solver, scheme, errors))
            self.errors[path][str(scheme.bits)] = sum(errors) / energy if energy > 0 else 0.0
            self._advance(parameter.input_bytes // len(self.schemes[path]))

    def _rounded(self, parameter: Parameter, scheme: Scheme | None = None) -> Rows:
        """A candidate's weights, dequantised in float32; by default of the one that is measured."""
        scheme = scheme or self._variant(parameter.path)
        stored = self.work.candidate(parameter.layout(scheme))
        for first, last in _ranges(parameter):
            weight, *rest = (read_rows(each, first, last) for each in stored)
            yield first, last, mx.dequantize(weight, *(each.astype(mx.float32) for each in rest), **vars(scheme))

    def _head(self) -> None:
        """Measures all variants, then quantises and measures the head, which may be the embedding too."""
        head = self.blocks.head
        self._measure()
        if head.path not in self.schemes:
            return
        moments = Moments(head.width)
        for index, batch in enumerate(self.texts):
            moments.add(self._hidden(batch, f"{TEXT}{index}"))
        self._quantise(head, moments)
        self.kl[head.path] = self.joint({head.path: self._variant(head.path)})

    def _measure(self) -> None:
        """Measures all variants, with the head in memory."""
        head = self.blocks.head
        kept = [rows for _, _, rows in _dense(head)]
        reference = Reference(self._hidden(self.few, PLAIN), lambda: kept)
        for path in self.schemes:
            if path != head.path:
                self.kl[path] = reference.divergence(self._hidden(self.few, path))

    def _hidden(self, batch: Batch, name: str) -> mx.array:
        """Inputs of the head at the wanted tokens of a stream, [N, D]."""
        return self.blocks.finish(batch, self.work.load(name))


def _ranges(parameter: Parameter) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_NUMBERS // parameter.width)
    return ((first, min(first + step, parameter.rows)) for first in range(0, parameter.rows, step))


def _dense(parameter: Parameter) -> Rows:
    """The rows of the checkpoint."""
    return ((first, last, parameter.finite(first, last)) for first, last in _ranges(parameter))


def _quantised(parameter: Parameter, solver: Solver, scheme: Scheme, errors: list[float]) -> Iterator[list[mx.array]]:
    """Blocks of a quantised matrix; the error of each is added to `errors`."""
    for _, _, rows in _dense(parameter):
        *arrays, error = solver.quantize(rows, scheme, mlx_dtype(parameter.numbers))
        mx.eval(arrays)
        errors.append(error.item())
        yield arrays
        mx.clear_cache()


def _settings(
    parameters: Sequence[Parameter],
    config: Config,
    rows: Sequence[Sequence[int]],
    schemes: Mapping[str, Sequence[Scheme]],
) -> JsonObject:
    """Everything that the result depends on."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

    stored = [each for parameter in parameters for each in parameter.inputs]
    files = {str(each.path): (each.path.stat().st_size, each.path.stat().st_mtime_ns) for each in stored}
    tensors = [(each.name, each.info.dtype, each.info.shape, each.info.start) for each in stored]
    numbers = [parameter.numbers for parameter in parameters]
    return {
        "version": (VERSION, mx.__version__, str(mx.default_device())),
        "checkpoint": digest([config.to_dict(), sorted(files.items()), tensors, numbers]),
        "calibration data": digest([list(row) for row in rows]),
        "scheme": digest({path: [asdict(each) for each in some] for path, some in schemes.items()}),
    }
