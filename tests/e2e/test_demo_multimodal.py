"""The embedded package `demo-multimodal`: small, the text demo for text, right about pictures and sound."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from phi4_mlx import Model, Tokenizer, load, read_audio, read_image
from phi4_mlx.checkpoint import load_config
from phi4_mlx.config.multimodal import MultimodalConfig
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.tokens.prompt import Mode
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import corpus
import cpu_math
import ctc
import evaluate
import examination
import learn_pictures
import pictures
import sounds
import tower_math

Demo = tuple[Model, Tokenizer]

FOLDER = EMBEDDED["demo-multimodal"]
MAX_BYTES = 4 * 10**6


@pytest.fixture(scope="module")
def multimodal() -> Demo:
    return load("demo-multimodal", verify=True)


def right(multimodal: Demo, cases: list[examination.Case]) -> int:
    model, tokenizer = multimodal
    return sum(
        tokenizer.decode(evaluate.reply(model, tokenizer, tokenizer.apply_chat_template(case.messages))) == case.answer
        for case in cases
    )


def test_the_package_is_complete_and_small() -> None:
    verify_manifest(FOLDER)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES
    config = load_config(FOLDER)
    assert isinstance(config, MultimodalConfig) and config.vision.grid == 6


def test_the_text_model_is_the_demo_byte_for_byte() -> None:
    assert (FOLDER / "model.safetensors").read_bytes() == (EMBEDDED["demo"] / "model.safetensors").read_bytes()


def test_text_is_answered_as_by_the_demo(multimodal: Demo) -> None:
    model, tokenizer = multimodal
    demo, demo_tokenizer = load("demo")
    for prompt in corpus.prompts(3, 10):
        asked, _ = evaluate.question_and_answer(tokenizer, prompt)
        assert asked == evaluate.question_and_answer(demo_tokenizer, prompt)[0]
        ids = mx.array([asked])
        assert mx.array_equal(model(ids), demo(ids))
        assert evaluate.reply(model, tokenizer, asked, 8) == evaluate.reply(demo, demo_tokenizer, asked, 8)


@pytest.mark.parametrize(
    ("kind", "path", "question", "answer"),
    [
        ("image", "samples/shapes.png", "How many shapes are there?", "3"),
        ("image", "samples/shapes.png", "Where is the yellow triangle?", "at the bottom"),
        ("image", "samples/seven.png", "What digit is it?", "7"),
        ("audio", "clips/046.ogg", "Transcribe the audio clip into text.", "eight nine go"),
    ],
)
def test_questions_about_samples(kind: str, path: str, question: str, answer: str, multimodal: Demo) -> None:
    medium = {"type": kind, kind: str(ROOT / "examples" / "demo" / path)}
    case = examination.Case("", [medium, {"type": "text", "text": question}], answer)
    assert right(multimodal, [case]) == 1


def test_questions_about_held_out_pictures(multimodal: Demo) -> None:
    assert right(multimodal, list(examination.about_pictures(40, seed=2))) >= 37


def test_questions_about_held_out_clips(multimodal: Demo) -> None:
    assert right(multimodal, list(examination.about_sound(40, seed=2))) >= 36


def test_a_spoken_question_about_a_picture(multimodal: Demo) -> None:
    assert right(multimodal, list(examination.about_both(20, seed=2))) >= 18


def test_the_answer_follows_a_swapped_picture(multimodal: Demo) -> None:
    pairs = list(examination.swapped(15, seed=2))
    assert right(multimodal, [case for pair in pairs for case in pair]) >= 26


@pytest.mark.parametrize("size", [(84, 84), (300, 300), (40, 40)])
def test_a_square_picture_of_any_size_costs_25_tokens(size: tuple[int, int], multimodal: Demo) -> None:
    _, tokenizer = multimodal
    image = {"type": "image", "image": np.full((*size, 3), 200, np.uint8)}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": [image]}])
    assert prompt.mode is Mode.VISION and prompt.media[0].tokens == learn_pictures.SLOTS
    assert len(prompt) == learn_pictures.SLOTS + 3


def test_held_out_pictures_and_clips_are_never_drawn_for_training() -> None:
    rng = random.Random(0)
    seen = {str(pictures.make_picture(rng).things) for _ in range(200)}
    held_out = [pictures.make_picture(rng, held_out=True) for _ in range(200)]
    assert all(pictures.is_held_out(picture.things) for picture in held_out if picture.things)
    assert not seen & {str(picture.things) for picture in held_out if picture.things}
    assert not {*sounds.VOICES} & {*sounds.HELD_OUT_VOICES} and not {*sounds.SPEEDS} & {*sounds.HELD_OUT_SPEEDS}


def test_training_computes_the_rows_that_answers_use(multimodal: Demo) -> None:
    model, _ = multimodal
    batch = [pictures.make_picture(random.Random(seed)) for seed in range(2)]
    clip = read_audio(examination.CLIPS / "000.ogg")
    with tower_math.fast_tower_math():
        rows = learn_pictures.rows_of(model.vision, learn_pictures.crops(batch))
        heard = model.audio.rows(model.audio(clip.features[None]), "speech")
    for picture, found in zip(batch, rows, strict=True):
        expected = model.encode(read_image(picture.pixels, crop_size=84, max_crops=1), Mode.VISION)
        np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(heard[0], model.encode(clip, Mode.SPEECH), atol=2e-2)


@pytest.mark.parametrize(("function", "other"), [(tower_math.gelu, nn.gelu_approx)])
def test_functions_of_towers_equal_mlx_s(function: object, other: object) -> None:
    x = mx.linspace(-6, 6, 101)
    for each in (lambda f: f(x), lambda f: mx.grad(lambda y: f(y).sum())(x)):
        np.testing.assert_allclose(each(function), each(other), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_equal_mlx_s(channels: int) -> None:
    mx.random.seed(0)
    x, weight = mx.random.normal((2, 9, 7, channels)), mx.random.normal((3, 3, 3, 1))
    options = {"stride": 2, "padding": 1, "groups": channels}
    np.testing.assert_allclose(tower_math.conv2d(x, weight, **options), mx.conv2d(x, weight, **options), atol=1e-5)
    x, weight = mx.random.normal((2, 9, 3)), mx.random.normal((3, 3, 1))
    np.testing.assert_allclose(tower_math.conv1d(x, weight, groups=3), mx.conv1d(x, weight, groups=3), atol=1e-5)


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 0]], [[1], [0, 1]]])
def test_ctc_is_the_sum_over_all_alignments(rows: list[list[int]]) -> None:
    blank, time = 2, 4
    logits = mx.random.normal((len(rows), time, blank + 1), key=mx.random.key(1))
    chances = np.array(mx.softmax(logits, axis=-1), np.float64)
    total = 0.0
    for row, wanted in enumerate(rows):
        paths = itertools.product(range(blank + 1), repeat=time)
        sums = sum(
            np.prod(chances[row, range(time), path])
            for path in paths
            if [key for key, _ in itertools.groupby(path) if key != blank] == wanted
        )
        total -= np.log(sums) / len(rows)
    assert abs(ctc.loss(logits, ctc.Labels.of(rows, blank, 2)).item() - total) < 1e-3


def test_samples_are_small() -> None:
    folder = Path(ROOT / "examples" / "demo")
    assert all(path.stat().st_size < 5000 for path in (folder / "samples").glob("*.png"))
    assert len(examination.clips()) == examination.CLIP_COUNT


def test_attention_without_a_mask_equals_mlx_s() -> None:
    q, k, v = (mx.random.normal((2, 4, 5, 8), key=mx.random.key(seed)) for seed in range(3))
    bias = mx.random.normal((1, 4, 5, 5), key=mx.random.key(4))
    for mask in (None, bias, bias > 0):
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        np.testing.assert_allclose(tower_math.attention(q, k, v, scale=0.3, mask=mask), expected, atol=1e-5)
    assert cpu_math.attention is not tower_math.attention
