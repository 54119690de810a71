"""Checks of whole models: the embedded packages, and one that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from phi4_mlx.checkpoint import load_config, load_model, share_weights
from phi4_mlx.doctor.check import Check
from phi4_mlx.doctor.operations import NAMES, random
from phi4_mlx.doctor.tolerance import PRODUCT, Tolerance, exponentials, rounding, sines, steps
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.guessing import Guessing
from phi4_mlx.generation.sequence import BatchSequence, Fault, Token
from phi4_mlx.generation.steps import generate_step
from phi4_mlx.generation.stream import wired_memory
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.safe import FastPath, safe
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.tokens.prefix import shared_length

if TYPE_CHECKING:
    from phi4_mlx.models.multimodal import Model as MultimodalModel

CHUNKS = 4  # of a prompt, and a shorter one
MOST = 0.5  # a larger difference is a fault, whatever the dtype
TEXT = 1000  # ids of text in the smallest package
BOUNDARY = 48  # of the RoPE tables, in place of the package's own
OPERATIONS = 6  # in a row in a block, which sum or round
KERNELS: tuple[FastPath, ...] = ("attention", "slices", "norms", "rope", "products")
HYBRID: tuple[FastPath, ...] = ("compiled", "scan", "slices", "norms", "products")
GUESSED: tuple[FastPath, ...] = ("speculation", "queue", "chunks", "buffers")


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
        model.eval()
        return model

    @property
    def is_hybrid(self) -> bool:
        """True for the hybrid model, which rotates nothing and cannot quantise keys."""
        return load_config(self.folder).model_type == "phi4flash"

    def paths(self, *first: FastPath) -> tuple[FastPath, ...]:
        """The fast paths of a computation: the ones given, then those that every forward pass takes."""
        return tuple(dict.fromkeys((*first, *(HYBRID if self.is_hybrid else KERNELS))))


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
        _rows_check(demo),
        Check(
            "demo: across the RoPE boundary", demo.paths("compiled", "buffers", "queue", "chunks"),
            partial(_boundary, demo), allowed,
        ),
        *(
            Check(
                f"demo: keys and values in {bits} bits", demo.paths("blocks", "buffers", "compiled"),
                partial(_steps, demo, bits), allowed + steps(bits),
            )
            for bits in (8, 4)
        ),
        Check("demo: tokens guessed ahead", demo.paths(*GUESSED), partial(_guessed, demo), allowed),
        Check("demo: wired memory", demo.paths("wired"), partial(_wired, demo), allowed),
        *(
            Check(
                f"demo in {NAMES[dtype]}: steps", half.paths("compiled", "buffers"), partial(_steps, half, None),
                allowed_of(half),
            )
            for half, dtype in ((Subject("demo", demo.folder, dtype), dtype) for dtype in (mx.float16, mx.bfloat16))
        ),
        *subject_checks(flash, 90),
        _rows_check(flash),
        Check("demo-flash: tokens guessed ahead", flash.paths(*GUESSED), partial(_guessed, flash), flash_allowed),
        Check("vision tower", ("padding", "attention", "norms", "products"), partial(_vision, media), allowed),
        Check("audio tower", ("padding", "attention", "norms", "products"), partial(_audio, media), allowed),
        Check(
            "demo-multimodal: clip and its adapter", media.paths("compiled", "buffers", "padding"),
            partial(_clip, media), allowed,
        ),
    ]  # fmt: skip


def subject_checks(subject: Subject, length: int) -> list[Check]:
    """The checks that any model gets.

    Args:
        subject: the model.
        length: tokens of the prompt.
    """
    name, paths, allowed = subject.name, subject.paths, allowed_of(subject)
    return [
        Check(f"{name}: logits of a whole prompt", paths(), partial(_whole, subject, length), allowed),
        Check(f"{name}: prompt in chunks", paths("chunks", "buffers", "queue"), partial(_chunks, subject, length),
              allowed),
        Check(f"{name}: steps", paths("compiled", "buffers"), partial(_steps, subject, None), allowed),
    ]  # fmt: skip


def _rows_check(subject: Subject) -> Check:
    paths = subject.paths("rows", "speculation", "compiled", "buffers", "queue", "chunks")
    return Check(f"{subject.name}: rows of several lengths", paths, partial(_rows, subject), allowed_of(subject))


def allowed_of(subject: Subject, passes: int = 1) -> Tolerance:
    """The tolerance of the logits of a model; its longest sum is that of an MLP.

    Args:
        subject: the model.
        passes: operations in a row for each of a forward pass, as a gradient has them.
    """
    model = load_model(subject.folder)
    config: Any = model.config
    layers = passes * config.num_hidden_layers
    operations = OPERATIONS * layers
    found = rounding(subject.dtype or model.dtype, config.intermediate_size, operations, PRODUCT * operations)
    found += exponentials(layers)
    found = found if subject.is_hybrid else found + sines(layers)
    return found if found.value < MOST else Tolerance(MOST, f"{found.why}, but at most {MOST}")


def ids(length: int, model: LanguageModel) -> list[int]:
    """Token ids of text: the vocabulary begins with it, in packages of the family."""
    text = sorted({*range(min(TEXT, model.config.vocab_size))} - model.slot_ids)
    return [text[(7 * n * n + 3 * n) % len(text)] for n in range(length)]


def _whole(subject: Subject, length: int) -> list[mx.array]:
    model = subject.load()
    return [model(mx.array([ids(length, model)]))]


def _chunks(subject: Subject, length: int) -> list[mx.array]:
    model = subject.load()
    drawn = generate_step(ids(length, model), model, max_tokens=1, prefill_step_size=length // CHUNKS)
    return [logprobs for _, logprobs in drawn]


def _steps(subject: Subject, kv_bits: int | None) -> list[mx.array]:
    """A short prompt, then single tokens."""
    model = subject.load()
    tokens = ids(20, model)
    cache = model.make_cache(kv_bits=kv_bits)
    found = [model(mx.array([tokens[:12]]), cache)]
    return [*found, *(model(mx.array([[token]]), cache) for token in tokens[12:])]


def _boundary(subject: Subject) -> list[mx.array]:
    """A prompt just below the boundary, and tokens that take it across."""
    model = subject.load()
    config: Any = replace(model.config, original_max_position_embeddings=BOUNDARY)  # type: ignore[type-var]
    near, tokens = share_weights(model, config), ids(BOUNDARY + 6, model)
    script = _Script(tokens[BOUNDARY - 4 :])
    drawn = generate_step(tokens[: BOUNDARY - 4], near, max_tokens=8, sampler=script.sample)
    return [logprobs for _, logprobs in drawn]


class _Script:
    """Draws given tokens, so that a rounding error does not lead elsewhere; guesses two of them, and a wrong one."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens, self._at, self._guesses = [*tokens], 0, [0]

    def sample(self, logprobs: mx.array) -> mx.array:
        """The next tokens, of which those after a wrong guess are drawn again later."""
        drawn = self._tokens[self._at : self._at + logprobs.shape[0]]
        self._at += shared_length(drawn[:-1], self._guesses) + 1
        return mx.array(drawn)

    def guess(self, most: int) -> list[int]:
        """See `Proposer.guess`."""
        first, second, third = self._tokens[self._at : self._at + 3]
        self._guesses = [first, second, 0 if third else 1]
        return self._guesses[:most]

    def pays(self) -> bool:
        """See `Proposer.pays`."""
        return True

    def begin(self, ids: Sequence[int]) -> None:
        """See `Proposer.begin`."""

    def extend(self, tokens: Sequence[int]) -> None:
        """See `Proposer.extend`."""

    def took(self, tokens: int, seconds: float) -> None:
        """See `Proposer.took`."""

    def read(self, most: int) -> bool:
        """See `RowProposer.read`."""
        return True

    @property
    def chance(self) -> float:
        """See `RowProposer.chance`; high enough that three tokens are guessed."""
        return 0.95

    def ahead(self, n: int) -> list[int]:
        """See `RowProposer.ahead`."""
        return self.guess(n)

    def nbytes(self, length: int) -> int:
        """See `RowProposer.nbytes`."""
        return 0


def _rows(subject: Subject) -> list[mx.array]:
    """Sequences of several lengths, answered together, with guesses of which some are wrong."""
    model, batch = subject.load(), Batch(guessing=Guessing(timed=False))
    found: dict[BatchSequence, list[mx.array]] = {}
    for number, length in enumerate((5, 33, 20)):
        tokens = ids(length + 8, model)[number:]
        script = _Script(tokens[length:] + tokens)
        proposer = None if safe("speculation") else script
        sequence = BatchSequence(model, tokens[:length], 8, sampler=script.sample, proposer=proposer)
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
    assert not batch.guessing.failures
    return [logprobs for sequence in found for logprobs in found[sequence]]


def _guessed(subject: Subject) -> list[mx.array]:
    """Tokens of which a pass verifies several; the wrong guesses are taken back."""
    model = subject.load()
    tokens = ids(60, model)
    script = _Script(tokens[20:])
    proposer = None if safe("speculation") else script
    drawn = generate_step(tokens[:20], model, max_tokens=16, sampler=script.sample, proposer=proposer)
    return [logprobs for _, logprobs in drawn]


def _wired(subject: Subject) -> list[mx.array]:
    with wired_memory():
        return _whole(subject, 8)


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


def _clip(subject: Subject) -> list[mx.array]:
    """A prompt with a clip, whose adapter is quantised, and tokens after it."""
    import numpy as np

    from phi4_mlx.tokens.media.audio import Audio

    model = _multimodal(subject)
    clip = Audio(np.array(random(1, 64, model.config.audio.input_size)), 0.64)
    before, *after = [[token] for token in ids(4, model)]
    cache = model.make_cache()
    prompt = mx.array([[*before, *[model.config.audio.audio_token_id] * clip.tokens]])
    found = [model(prompt, cache, [clip])]
    assert cache.adapter is not None
    return [*found, *(model(mx.array([token]), cache) for token in after)]


def _multimodal(subject: Subject) -> MultimodalModel:
    from phi4_mlx.models.multimodal import Model

    model = subject.load()
    assert isinstance(model, Model)
    return model
