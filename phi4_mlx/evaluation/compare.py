"""Comparison of two models by their next-token distributions, one model in memory at a time.

The models take turns: the first finds its likeliest tokens at each place, the second finds its own and its
log-probabilities of both, and the first then gives its log-probabilities of both. So each figure is the same whichever
model goes first.

The Kullback-Leibler divergence is summed as p log(p/q) - p + q over the vocabulary, which has the same sum: no term is
below 0, each is 0 where p = q, and tokens that are left out can only be missing, not mislead. Those outside the
likeliest of both are estimated from every n-th of them (`Columns`), without bias, and the intervals cover the error.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np

from phi4_mlx.checkpoint import load, load_config, load_tokenizer_and_format
from phi4_mlx.data.samples import Sample, load_samples
from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.evaluation.distributions import Array, Columns, Rows
from phi4_mlx.hub import resolve
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.shared_stream import shared_stream
from phi4_mlx.terminal.amount import amount, size
from phi4_mlx.tokens.tokenizer import Tokenizer

CHUNK = 512  # tokens that run at once; a longer sample runs in chunks with a cache
LOGITS_AT_ONCE = 2**24  # logits in float32 at once, 64 MiB
RESAMPLES = 2000  # of the bootstrap
NOTED = 0.01  # share of a divergence from which on estimated tokens are worth a note

Progress = Callable[[int, int], object]
"""Called as (tokens done, tokens in all)."""


@dataclass(frozen=True)
class Figure:
    """A value with the limits of its 95 % confidence interval, both None where one sample alone was measured."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Side:
    """One of two models.

    Attributes:
        name: as given.
        weights_bytes: bytes of its weights.
        perplexity: of the data.
        kl: the divergence from this model to the other, KL(this || other), in nats a token.
        kl_outside: the part of `kl` that is estimated, from tokens outside the likeliest of both models.
        mass_outside: the estimated probability of those tokens.
        sample_kl: the divergence of each sample, summed over its tokens, in the data's order.
    """

    name: str
    weights_bytes: int
    perplexity: Figure
    kl: Figure
    kl_outside: float
    mass_outside: float
    sample_kl: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same data.

    Attributes:
        a: the first.
        b: the second.
        agreement: the share of tokens at which both have the same likeliest one.
        samples: number of samples.
        tokens: number of tokens that the models predicted: all except the first of each sample.
        notes: lines about samples that were cut or left out.
    """

    a: Side
    b: Side
    agreement: Figure
    samples: int
    tokens: int
    notes: tuple[str, ...]


def compare(
    a: str | Path, b: str | Path, data: str | Path, progress: Progress | None = None, columns: Columns | None = None
) -> Comparison:
    """Compares two models on samples.

    Args:
        a: a folder, a Hub id ("owner/name"), or the name of an embedded package.
        b: likewise.
        data: samples in a format of training; see `phi4_mlx.data.samples`. Samples longer than the context are cut.
        progress: called as (tokens done, tokens in all).
        columns: the tokens to keep at each place; None for the default ones.

    Raises:
        RequestError: the models do not have the same vocabulary and tokenizer, the data cannot be used, or the disk
            has no room.
        Phi4Error: as `phi4_mlx.checkpoint.load` for either model.
    """
    folders = resolve(a), resolve(b)
    samples, vocabulary, notes = _shared_samples((str(a), str(b)), folders, data)
    columns = columns or Columns(vocabulary)
    places = sum(len(sample.ids) - 1 for sample in samples)
    passes = 2 if columns.all_tokens else 3
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, passes * places)

    with TemporaryDirectory(prefix="phi4-mlx-compare-") as work:
        _check_room(Path(work), places * columns.place_bytes)
        one, two = (_Recording(Path(work) / each, str(name), columns) for each, name in (("a", a), ("b", b)))
        if not columns.all_tokens:
            _record(folders[0], samples, one, None, advance)
        _record(folders[1], samples, two, (one, two), advance)
        _record(folders[0], samples, one, (one, two), advance)
        return _result(one, two, samples, notes)


def _shared_samples(
    names: tuple[str, str], folders: tuple[Path, Path], data: str | Path
) -> tuple[list[Sample], int, tuple[str, ...]]:
    """The samples as both models encode them, the size of their vocabulary, and notes; the models are not loaded."""
    configs = [load_config(folder) for folder in folders]
    sizes = [config.vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"{names[0]} has a vocabulary of {sizes[0]:,} and {names[1]} of {sizes[1]:,}; distributions over different "
            "tokens cannot be compared, so choose two models with one tokenizer"
        )
    one, two = (
        load_tokenizer_and_format(folder, None, config.model_type)
        for folder, config in zip(folders, configs, strict=True)
    )
    if (other := _other_token(one, two, sizes[0])) is not None:
        token, texts = other
        raise RequestError(
            f"token {token} is {texts[0]!r:.40} in {names[0]} and {texts[1]!r:.40} in {names[1]}; distributions over "
            "different tokens cannot be compared, so choose two models with one tokenizer"
        )
    longest = min(config.max_position_embeddings for config in configs)
    (samples, report), (again, _) = (load_samples(data, each, max_seq_length=longest) for each in (one, two))
    for sample, same in zip(samples, again, strict=True):
        if sample.ids != same.ids:
            raise RequestError(
                f"{sample.source} has other tokens in {names[0]} ({one.chat_format.name}) than in {names[1]} "
                f"({two.chat_format.name}), whose chat formats differ; compare them on plain texts"
            )
    notes = []
    if report.truncated:
        notes.append(f"cut at the context of {longest:,} tokens: {amount(report.truncated, 'sample')}")
    if report.skipped:
        left_out = amount(len(report.skipped), "sample")
        notes.append(f"left out, with no token to predict: {left_out}, the first {report.skipped[0]}")
    return samples, sizes[0], tuple(notes)


def _other_token(one: Tokenizer, two: Tokenizer, vocabulary: int) -> tuple[int, tuple[bytes, bytes]] | None:
    """The first token whose text differs between two tokenizers, with both texts."""
    for token in range(vocabulary):
        texts = one.token_bytes(token), two.token_bytes(token)
        if texts[0] != texts[1]:
            return token, texts
    return None


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RequestError(
            f"{folder.parent} has {size(free)} free and the distributions need {size(needed)}; make room, set TMPDIR "
            "to a folder on another disk, or compare on less data"
        )


class _Recording:
    """The distributions of one model at all places.

    Attributes:
        likeliest: the likeliest tokens, int32 [places, K].
        kept: log-probabilities of the tokens of `Columns.ids`, fp32 [places, W].
        best: the likeliest token at each place.
        true: the log-probability of the token that follows.
    """

    def __init__(self, stem: Path, name: str, columns: Columns):
        self.name, self.columns = name, columns
        self.likeliest = Rows(stem.with_suffix(".likeliest"), np.int32, 0 if columns.all_tokens else columns.likeliest)
        self.kept = Rows(stem.with_suffix(".kept"), np.float32, columns.width)
        self.best: list[int] = []
        self.true: list[float] = []
        self.weights_bytes = 0


def _record(
    folder: Path,
    samples: Sequence[Sample],
    own: _Recording,
    both: tuple[_Recording, _Recording] | None,
    advance: Callable[[int], object],
) -> None:
    """One pass of a model, which is freed after it: its likeliest tokens without `both`, else log-probabilities."""
    model, columns, place = load(folder)[0], own.columns, 0
    own.weights_bytes = model.weights_bytes
    for sample in samples:
        for start, log_probs in _log_probs(model, sample, own.name):
            count = log_probs.shape[0]
            if not columns.all_tokens and (both is None or own is both[1]):
                top = mx.argpartition(-log_probs, columns.likeliest - 1, axis=-1)[:, : columns.likeliest]
                own.likeliest.append(np.array(top))
            if both is not None:
                a, b = (each.likeliest.read(place, place + count) for each in both)
                own.kept.append(_take(log_probs, columns, columns.ids(place, a, b)))
                after = mx.array(sample.ids[start + 1 : start + 1 + count])
                own.true += mx.take_along_axis(log_probs, after[:, None], axis=-1)[:, 0].tolist()
                own.best += log_probs.argmax(axis=-1).tolist()
            place += count
            advance(count)
    del model
    gc.collect()
    mx.clear_cache()


def _take(log_probs: mx.array, columns: Columns, ids: Array) -> Array:
    """The log-probabilities of some tokens, [N, W]; the last token's stands in for one past the vocabulary."""
    if columns.all_tokens:
        return np.array(log_probs)
    inside = mx.array(np.minimum(ids, columns.vocabulary - 1))
    return np.array(mx.take_along_axis(log_probs, inside, axis=-1))


def _log_probs(model: LanguageModel, sample: Sample, name: str) -> Iterator[tuple[int, mx.array]]:
    """Log-probabilities of the token after each one of a sample but the last: (first position, fp32 [N, V])."""
    ids = mx.array([sample.ids[:-1]])
    T, rows = ids.shape[1], max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    cache = model.make_cache(model.regime(T + 1))  # the table of the whole sample
    for start in range(0, T, CHUNK):
        with shared_stream():
            hidden = model.hidden(ids[:, start : start + CHUNK], cache)[0]
            mx.eval(hidden)
        for row in range(0, hidden.shape[0], rows):
            with shared_stream():
                logits = model.logits(hidden[None, row : row + rows])[0].astype(mx.float32)
                found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                if not mx.isfinite(found).all().item():
                    raise CheckpointError(
                        f"{name} computes logits that are NaN or infinite for {sample.source}; the checkpoint is "
                        "damaged, or its dtype too narrow for it"
                    )
            yield start + row, found


def _result(a: _Recording, b: _Recording, samples: Sequence[Sample], notes: tuple[str, ...]) -> Comparison:
    """The figures, from sums over each sample."""
    lengths = np.array([len(sample.ids) - 1 for sample in samples])
    ends = np.cumsum(lengths)
    sums = np.stack([_divergences(a, b, end - n, end) for end, n in zip(ends, lengths, strict=True)])  # [samples, 6]

    def summed(values: Sequence[float]) -> Array:
        return np.add.reduceat(np.array(values, float), ends - lengths)

    same = summed([one == two for one, two in zip(a.best, b.best, strict=True)])
    tokens = float(lengths.sum())
    parts = [lengths.astype(float), sums[:, 0].copy(), sums[:, 3].copy(), -summed(a.true), -summed(b.true), same]
    drawn = _resampled(parts)

    def figure(part: int, shown: Callable[[Array], Array] = lambda means: means) -> Figure:
        value = float(shown(parts[part].sum() / tokens))
        if len(samples) == 1:
            return Figure(value, None, None)
        low, high = np.percentile(shown(drawn[part] / drawn[0]), [2.5, 97.5])
        return Figure(value, float(low), float(high))

    def side(own: _Recording, kl: int, part: int) -> Side:
        outside, mass = (float(sums[:, each].sum() / tokens) for each in (kl + 1, kl + 2))
        perplexity, sample_kl = figure(part + 2, np.exp), tuple(parts[part].tolist())
        return Side(own.name, own.weights_bytes, perplexity, figure(part), outside, mass, sample_kl)

    return Comparison(side(a, 0, 1), side(b, 3, 2), figure(5), len(samples), int(tokens), notes)


def _resampled(parts: Sequence[Array]) -> list[Array]:
    """Sums [RESAMPLES] of each array [samples] over samples drawn with replacement, the same draws for all arrays."""
    count, generator = len(parts[0]), np.random.default_rng(0)
    at_once = max(1, 2**22 // count)
    found = []
    for first in range(0, RESAMPLES, at_once):
        draws = generator.multinomial(count, np.full(count, 1 / count), min(at_once, RESAMPLES - first))
        found.append([draws @ part for part in parts])  # one by one: each sum is the same in any company
    return [np.concatenate(each) for each in zip(*found, strict=True)]


def _divergences(a: _Recording, b: _Recording, start: int, stop: int) -> Array:
    """Sums over some places: KL(a || b), its estimated part, a's mass there; then the same of b, fp64 [6]."""
    total, columns = np.zeros(6), a.columns
    for first in range(start, stop, CHUNK):
        last = min(stop, first + CHUNK)
        ids = columns.ids(first, a.likeliest.read(first, last), b.likeliest.read(first, last))
        weights = columns.weights(ids)
        order = np.argsort(ids, axis=1, kind="stable")  # sums in one order, whichever model is a
        weights, p, q = (
            np.take_along_axis(each, order, 1)
            for each in (weights, a.kept.read(first, last).astype(float), b.kept.read(first, last).astype(float))
        )
        outside = weights > 1
        for at, (x, y) in ((0, (p, q)), (3, (q, p))):
            terms = weights * (np.exp(x) * (x - y) - np.exp(x) + np.exp(y))
            total[at : at + 3] += terms.sum(), (terms * outside).sum(), (weights * np.exp(x) * outside).sum()
    return total
