"""Checks of whole models: the embedded packages, and one that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from phi4_mlx.checkpoint import load_config, load_model, load_tokenizer_and_format
from phi4_mlx.doctor.check import Check
from phi4_mlx.doctor.operations import NAMES, random
from phi4_mlx.doctor.tolerance import PRODUCT, Tolerance, exponentials, rounding, sines, steps
from phi4_mlx.generation.batch import Batch, BatchSequence, Fault, Token
from phi4_mlx.generation.speculate import make_proposer
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.generation.stream import wired_memory
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.safe import FastPath
from phi4_mlx.models.shared_stream import shared_stream

if TYPE_CHECKING:
    from phi4_mlx.models.multimodal import Model as MultimodalModel

CHUNK = 24  # tokens
OPERATIONS = 6  # in a row in a block, which sum or round
KERNELS: tuple[FastPath, ...] = ("attention", "norms", "rope", "products")
HYBRID: tuple[FastPath, ...] = ("scan", "slices", "norms", "products")


@dataclass(frozen=True)
class Subject:
    """A model to check.

    Attributes:
        name: for the report.
        folder: of the package.
        dtype: to compute in; None for the package's own.
    """

    name: str
    folder: Path
    dtype: mx.Dtype | None = None

    def load(self) -> LanguageModel:
        """The model, with traces of its own."""
        model = load_model(self.folder)
        if self.dtype is not None:
            model.set_dtype(self.dtype)
        mx.eval([array for name, array in flat(model) if not model.on_demand(name)])
        return model.eval()

    @property
    def is_hybrid(self) -> bool:
        """True for the hybrid model, which rotates nothing and cannot quantise keys."""
        return load_config(self.folder).model_type == "phi4flash"


def flat(model: LanguageModel) -> list[tuple[str, mx.array]]:
    """The parameters by name."""
    from mlx.utils import tree_flatten

    named: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return named


def model_checks() -> list[Check]:
    """The checks of the embedded packages."""
    demo, flash = Subject("demo", resolve("demo")), Subject("demo-flash", resolve("demo-flash"))
    media = Subject("demo-multimodal", resolve("demo-multimodal"))
    allowed, flash_allowed = allowed_of(demo), allowed_of(flash)
    return [
        *subject_checks(demo, 90),
        Check(
            "demo: across the RoPE boundary", ("compiled", "buffers", "rope", "attention", "norms", "products"),
            partial(_boundary, demo), allowed,
        ),
        *(
            Check(
                f"demo: keys and values in {bits} bits", ("blocks", "buffers", *KERNELS), partial(_steps, demo, bits),
                allowed + steps(bits),
            )
            for bits in (8, 4)
        ),
        Check("demo: tokens guessed ahead", ("speculation", "queue", "compiled"), partial(_guessed, demo), allowed),
        Check("demo: wired memory", ("wired",), partial(_wired, demo), allowed),
        *(
            Check(
                f"demo in {NAMES[dtype]}: steps", ("compiled", "buffers", *KERNELS),
                partial(_steps, half, None), allowed_of(half),
            )
            for half, dtype in ((Subject("demo", demo.folder, dtype), dtype) for dtype in (mx.float16, mx.bfloat16))
        ),
        *subject_checks(flash, 90),
        Check("demo-flash: tokens guessed ahead", ("speculation", "queue", "compiled"), partial(_guessed, flash), flash_allowed),
        Check("vision tower", ("padding", "attention", "norms", "products"), partial(_vision, media), allowed),
        Check("audio tower", ("padding", "attention", "norms", "products"), partial(_audio, media), allowed),
    ]  # fmt: skip


def subject_checks(subject: Subject, length: int) -> list[Check]:
    """The checks that every model gets.

    Args:
        subject: the model.
        length: tokens of the prompt.
    """
    kernels, allowed = (HYBRID if subject.is_hybrid else KERNELS), allowed_of(subject)
    return [
        Check(f"{subject.name}: logits of a whole prompt", kernels, partial(_whole, subject, length), allowed),
        Check(f"{subject.name}: prompt in chunks", ("chunks", "buffers", *kernels), partial(_chunks, subject, length),
              allowed),
        Check(f"{subject.name}: steps", ("compiled", "buffers", *kernels), partial(_steps, subject, None), allowed),
        Check(f"{subject.name}: rows of several lengths", ("rows", "compiled", "buffers", *kernels),
              partial(_rows, subject), allowed),
    ]  # fmt: skip


def allowed_of(subject: Subject) -> Tolerance:
    """The tolerance of the logits of a model; its longest sum is that of an MLP."""
    model = load_model(subject.folder)
    config: Any = model.config
    operations = OPERATIONS * config.num_hidden_layers
    found = rounding(subject.dtype or model.dtype, config.intermediate_size, operations, PRODUCT * operations)
    found += exponentials(config.num_hidden_layers)
    return found if subject.is_hybrid else found + sines(config.num_hidden_layers)


def ids(length: int) -> list[int]:
    """Token ids that are text in every package."""
    return [(7 * n * n + 3 * n) % 1000 for n in range(length)]


def _whole(subject: Subject, length: int) -> list[mx.array]:
    return [subject.load()(mx.array([ids(length)]))]


def _chunks(subject: Subject, length: int) -> list[mx.array]:
    model = subject.load()
    return [logprobs for _, logprobs in generate_step(ids(length), model, max_tokens=1, prefill_step_size=CHUNK)]


def _steps(subject: Subject, kv_bits: int | None) -> list[mx.array]:
    """A short prompt, then single tokens."""
    model, tokens = subject.load(), ids(20)
    cache = model.make_cache(kv_bits=kv_bits)
    found = [model(mx.array([tokens[:12]]), cache)]
    return [*found, *(model(mx.array([[token]]), cache) for token in tokens[12:])]


def _boundary(subject: Subject) -> list[mx.array]:
    """A prompt just below the boundary, and tokens that take it across."""
    model = subject.load()
    assert model.boundary is not None
    tokens = ids(model.boundary + 6)
    sampler = _scripted(tokens[model.boundary - 4 :])
    drawn = generate_step(tokens[: model.boundary - 4], model, max_tokens=8, sampler=sampler)
    return [logprobs for _, logprobs in drawn]


def _scripted(tokens: Sequence[int]) -> Callable[[mx.array], mx.array]:
    """A sampler that draws these tokens, so that a rounding error does not lead elsewhere."""
    script = iter(tokens)
    return lambda logprobs: mx.array([next(script)] * logprobs.shape[0])


def _rows(subject: Subject) -> list[mx.array]:
    """Sequences of several lengths, answered together."""
    model, batch = subject.load(), Batch()
    found: dict[BatchSequence, list[mx.array]] = {}
    for number, length in enumerate((5, 33, 20)):
        tokens = ids(length + 8)[number:]
        sequence = BatchSequence(model, tokens[:length], 6, sampler=_scripted(tokens[length:] + tokens))
        found[sequence] = []
        batch.add(sequence)
    while batch.waiting or batch.active:
        for event in batch.step():
            if isinstance(event, Fault):
                raise event.error
            assert isinstance(event, Token) and event.logprobs is not None
            found[event.sequence].append(event.logprobs)
            if event.sequence.drawn == event.sequence.max_tokens:
                batch.end(event.sequence)
    return [logprobs for sequence in found for logprobs in found[sequence]]


def _guessed(subject: Subject) -> list[mx.array]:
    """An answer that repeats an earlier one; the model is sure of every token."""
    model = subject.load()
    tokenizer = load_tokenizer_and_format(subject.folder, None, model.config.model_type)
    first = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "Hello! I am a demo of phi4_mlx. Ask me what I can do."}
    prompt = tokenizer.apply_chat_template([first, answer, first], add_generation_prompt=True)
    proposer = make_proposer("lookup", model)
    drawn = [*generate_step(prompt, model, max_tokens=12, proposer=proposer)]
    return [mx.array([token for token, _ in drawn]), *(logprobs for _, logprobs in drawn)]


def _wired(subject: Subject) -> list[mx.array]:
    with wired_memory():
        return [subject.load()(mx.array([ids(8)]))]


def _vision(subject: Subject) -> list[mx.array]:
    """A picture of two crops, of which one is partly padding."""
    import numpy as np

    model = _multimodal(subject)
    config = model.config.vision
    mask = np.ones((2, config.grid, config.grid), bool)
    mask[1, :, config.grid // 2 :] = False
    with shared_stream():
        return [model.vision(random(1, 2, config.crop_size, config.crop_size, 3), mask)]


def _audio(subject: Subject) -> list[mx.array]:
    """A clip of two seconds."""
    model = _multimodal(subject)
    return [model.audio(random(1, 200, model.config.audio.input_size))]


def _multimodal(subject: Subject) -> MultimodalModel:
    from phi4_mlx.models.multimodal import Model

    model = subject.load()
    assert isinstance(model, Model)
    return model
