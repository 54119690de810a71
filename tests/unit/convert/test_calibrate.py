"""Calibration of every kind of model: what it writes, how a killed run goes on, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from phi4_mlx.checkpoint import load, load_model
from phi4_mlx.convert import calibrate as module
from phi4_mlx.convert.package import convert
from phi4_mlx.convert.work_folder import WorkFolder
from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError
from phi4_mlx.models.model import LanguageModel
from tests.conftest import BOUNDARY, write_tiny_checkpoint
from tests.kinds import WRITERS

GROUP = 32
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "house", "where", "it", "slept", "again"]


class Killed(BaseException):
    """The end of a process, as far as a test can have it in its own."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 tokens or so, some of them in sequences beyond the RoPE boundary."""
    path = tmp_path_factory.mktemp("texts") / "train.jsonl"
    lines = [" ".join(WORDS[(3 * n + k * (n % 5 + 1)) % len(WORDS)] for k in range(15 + n % 7)) for n in range(24)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, " ".join(WORDS * 3)]))
    return path


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Fewer schemes and tokens, blocks of rows that split even a tiny matrix, and no picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi4_mlx.convert.calibrated.WIDTHS", (3, 4, 6))
        patch.setattr("phi4_mlx.convert.report._draw", lambda path, report: [])
        patch.setattr(module, "VARIANT_TOKENS", 200)
        patch.setattr(module, "BLOCK_NUMBERS", 96 * 300)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source"))


def calibrated(source: Path, out: Path, texts: Path, **options: Any) -> Path:
    convert(source, out, quantize=True, q_group_size=GROUP, q_calibration=texts, **options)
    return out


def weights_of(package: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load_model(package).parameters()))


def same(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def log_probs(model: LanguageModel, ids: mx.array) -> mx.array:
    logits = model(ids).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(package: Path, source: Path, texts: Path) -> float:
    """KL to the source on the calibration text, by whole models."""
    model, tokenizer = load(source)
    other = load_model(package)
    found = []
    for line in texts.read_text().splitlines():
        ids = mx.array([tokenizer.encode(json.loads(line)["text"])])
        ours, theirs = log_probs(other, ids), log_probs(model, ids)
        found.append((mx.exp(theirs) * (theirs - ours)).sum(axis=-1).reshape(-1))
    kl: float = mx.concatenate(found).mean().item()
    return kl


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_packages_of_every_kind_are_closer_than_plain_ones_of_the_same_bytes(
    kind: str, untied: bool, tmp_path: Path, texts: Path
) -> None:
    if untied and kind != "phi3":
        pytest.skip("published tied")
    source = WRITERS[kind](tmp_path / "source", **({"tie_word_embeddings": False} if untied else {}))
    convert(source, tmp_path / "plain", quantize=True, q_group_size=GROUP)
    calibrated(source, tmp_path / "mixed", texts)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "mixed")]
    assert sizes[1] <= sizes[0]
    kls = [divergence(tmp_path / name, source, texts) for name in ("plain", "mixed")]
    assert kls[1] < 0.8 * kls[0]
    plain, mixed = (load_model(tmp_path / name) for name in ("plain", "mixed"))
    kinds = [{path: type(each) for path, each in model.named_modules()} for model in (plain, mixed)]
    assert kinds[0] == kinds[1]  # what stays dense is the same
    assert not list(tmp_path.glob(".*")) and (tmp_path / "mixed" / "quantization.json").exists()


def test_bits_given_are_those_of_every_matrix(tmp_path: Path, folder: Path, texts: Path) -> None:
    out = calibrated(folder, tmp_path / "out", texts, q_bits=3, embed_bits=6)
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert quantization == {"mode": "affine", "bits": 3, "group_size": GROUP, "model.embed_tokens": {
        "mode": "affine", "bits": 6, "group_size": GROUP,
    }}  # fmt: skip
    convert(folder, tmp_path / "plain", quantize=True, q_bits=3, embed_bits=6, q_group_size=GROUP)
    ours, theirs = weights_of(out), weights_of(tmp_path / "plain")
    assert {name: (each.dtype, each.shape) for name, each in ours.items()} == {
        name: (each.dtype, each.shape) for name, each in theirs.items()
    }
    assert divergence(out, folder, texts) < 0.8 * divergence(tmp_path / "plain", folder, texts)


@pytest.mark.slow
def test_more_bits_are_closer(tmp_path: Path, folder: Path, texts: Path) -> None:
    outs = [calibrated(folder, tmp_path / f"{bpw}", texts, q_bpw=bpw) for bpw in (4.2, 5.5, 16)]
    kls = [divergence(out, folder, texts) for out in outs]
    assert kls[0] > 2 * kls[1] > 3 * kls[2]
    quantization = json.loads((tmp_path / "16" / "config.json").read_text())["quantization"]
    assert quantization == {"mode": "affine", "bits": 6, "group_size": GROUP}  # the most that is tried here


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Ends the process before a step: 0 is the embedding, 1 and 2 are the blocks, 3 is the head."""
    begin = WorkFolder.begin

    def stop(self: WorkFolder) -> None:
        if self.step == step:
            raise Killed
        begin(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(WorkFolder, "begin", stop)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, folder: Path, texts: Path) -> Path:
    return calibrated(folder, tmp_path_factory.mktemp("unbroken") / "out", texts)


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bits(
    step: int, tmp_path: Path, folder: Path, texts: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(step):
        calibrated(folder, tmp_path / "out", texts)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    calibrated(folder, tmp_path / "out", texts, tell=said.append)
    assert len(said) == 1 and f"{step} steps are done" in said[0]
    assert same(tmp_path / "out", unbroken)
    assert not list(tmp_path.glob(".*"))


def test_a_run_killed_within_a_step_runs_that_step_again(
    tmp_path: Path, folder: Path, texts: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module.Solver.quantize, 0

    def quantize(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module.Solver, "quantize", quantize)
        with pytest.raises(Killed):
            calibrated(folder, tmp_path / "out", texts)
    calibrated(folder, tmp_path / "out", texts)
    assert same(tmp_path / "out", unbroken)


def test_a_folder_of_another_run_starts_again_and_says_so(tmp_path: Path, folder: Path, texts: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    for options, reason in (({"q_bits": 3}, "scheme"), ({"source": other}, "checkpoint")):
        with killed_at(2):
            calibrated(**{"source": folder, "out": tmp_path / "out", "texts": texts, **options})
        said: list[str] = []
        with killed_at(1):
            calibrated(folder, tmp_path / "out", texts, tell=said.append)
        assert len(said) == 1 and "starts again" in said[0] and reason in said[0]
    for content in ("{", '{"step": 1, "state": {}, "settings": []}'):
        (tmp_path / ".out.calibration" / "progress.json").write_text(content)
        with killed_at(0):
            calibrated(folder, tmp_path / "out", texts, tell=said.append)
        assert said[-1].startswith("the calibration starts again") and said[-1].endswith("has no readable progress")


@pytest.mark.parametrize("link", [False, True])
def test_something_else_in_place_of_the_work_folder_is_kept(
    link: bool, tmp_path: Path, folder: Path, texts: Path
) -> None:
    there = tmp_path / ".out.calibration"
    if link:
        (tmp_path / "elsewhere").mkdir()
        there.symlink_to(tmp_path / "elsewhere")
    else:
        there.write_text("mine")
    with pytest.raises(RequestError, match=r"\.out\.calibration is not a folder.*remove it$"):
        calibrated(folder, tmp_path / "out", texts)
    assert there.is_symlink() if link else there.read_text() == "mine"


def test_a_damaged_candidate_is_refused(tmp_path: Path, folder: Path, texts: Path) -> None:
    with killed_at(3):
        calibrated(folder, tmp_path / "out", texts)
    (victim, *_) = sorted((tmp_path / ".out.calibration").glob("streams-*/*"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"streams-3"):
        calibrated(folder, tmp_path / "out", texts)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path, texts: Path) -> None:
    peaks = []
    for layers in (1, 6):
        source = write_tiny_checkpoint(tmp_path / f"{layers}", num_hidden_layers=layers, intermediate_size=512)
        calibrated(source, tmp_path / f"out-{layers}", texts, q_bits=4)
        peaks.append(json.loads((tmp_path / f"out-{layers}" / "quantization.json").read_text())["peak_bytes"])
        mx.clear_cache()
    assert peaks[1] < 1.02 * peaks[0] + 5 * 2 * 96 * 4  # the norms of all layers are in memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_bits": 4, "q_bpw": 4.5}, r"--q-bits 4 .*--q-bpw 4\.5 .*leave one of them out"),
        ({"q_bpw": 1.9}, r"--q-bpw 1\.9 is not a number from 2 to 16"),
        ({"q_bpw": float("nan")}, r"--q-bpw nan is not"),
        ({"q_bpw": 3.9}, r"3\.9 .*takes 4"),
        ({"q_mode": "mxfp4"}, r"--q-mode affine, not mxfp4"),
        ({"q_calibration": None, "q_bpw": 4.5}, r"--q-bpw 4\.5 .*--q-calibration"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, folder: Path, texts: Path
) -> None:
    group = {} if "q_mode" in options else {"q_group_size": GROUP}
    with pytest.raises(RequestError, match=message):
        convert(folder, tmp_path / "out", quantize=True, **{"q_calibration": texts, **group, **options})
    assert not list(tmp_path.iterdir())


def test_few_tokens_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "the cat sat"}\n')
    with pytest.raises(RequestError, match=r"has \d+ tokens, and needs at least 1,000"):
        calibrated(folder, tmp_path / "out", tmp_path / "few.jsonl")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_weights_too_large_for_the_dtype_are_refused_by_name(name: str, tmp_path: Path, texts: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    weights[name][-1] = 1e5
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(RequestError, match=rf"^{name} has numbers too large for float16, such as 100000; .*bfloat16"):
        calibrated(source, tmp_path / "out", texts, dtype="float16")


def test_text_that_is_not_used_is_told(
    tmp_path: Path, folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = tmp_path / "long.jsonl"
    longest.write_text(texts.read_text() + json.dumps({"text": " ".join(WORDS * 100)}) + "\n")
    monkeypatch.setattr(module, "MOST_TOKENS", 1500)
    said: list[str] = []
    with killed_at(0):
        calibrated(folder, tmp_path / "out", longest, tell=said.append)
    found = re.search(r"cut at 1,024 tokens: 1; the longest had ([\d,]+) tokens", said[0])
    assert found and int(found[1].replace(",", "")) > 1024
    assert re.match(r"[\d,]+ of [\d,]+ tokens of calibration data are used", said[-1])


def test_a_model_that_overflows_is_refused_by_name(tmp_path: Path, texts: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.0.mlp.gate_up_proj.weight"] *= 1e30
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(Phi4Error, match=r"^model\.layers\.\d\.\S+: the second moments of its inputs contain NaN"):
        calibrated(source, tmp_path / "out", texts)


def test_long_sequences_run_under_the_long_table(
    tmp_path: Path, folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states of a text beyond the boundary are those of the whole model."""
    seen: list[tuple[Any, mx.array]] = []
    original: Callable[..., mx.array] = module._Run._hidden  # type: ignore[attr-defined]

    def hidden(self: Any, batch: Any, name: str) -> mx.array:
        found = original(self, batch, name)
        seen.append((batch, found))
        return found

    monkeypatch.setattr(module._Run, "_hidden", hidden)  # type: ignore[attr-defined]
    calibrated(folder, tmp_path / "out", texts, q_bits=4)
    model = load_model(folder)
    lengths = set()
    for batch, found in seen[-2:]:  # those of the text come last
        rows = model.hidden(mx.array(batch.ids)).reshape(-1, found.shape[-1])[mx.array(batch.wanted)]
        assert mx.abs(found - rows).max() < 1e-3
        lengths.add(batch.ids.shape[1] > BOUNDARY)
    assert lengths == {False, True}
