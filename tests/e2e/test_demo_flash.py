"""The embedded package `demo-flash`: small, right in its world and in the chat; and a new kind of problem by LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phi4_mlx import Model, Tokenizer, load
from phi4_mlx.checkpoint import load_config
from phi4_mlx.data.samples import Sample
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.files.manifest import verify_manifest
from phi4_mlx.lora.training.batches import Batches
from phi4_mlx.lora.training.gradients import mean_gradients
from phi4_mlx.lora.training.loss import sft_loss
from tests.conftest import ROOT
from tests.tiny_sambay import make_tiny_sambay

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import cpu_math
import evaluate
import problems
import recipe_flash
from draw import Draw

Demo = tuple[Model, Tokenizer]
Function = Callable[[mx.array], mx.array]

MAX_BYTES = 2 * 10**6


@pytest.fixture(scope="module")
def flash() -> Demo:
    return load("demo-flash", verify=True)


def ask(flash: Demo, question: str) -> str:
    model, tokenizer = flash
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return tokenizer.decode(evaluate.reply(model, tokenizer, prompt))


def test_the_package_is_complete_and_small() -> None:
    folder = EMBEDDED["demo-flash"]
    verify_manifest(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


def test_it_has_the_layout_of_phi_4_mini_flash() -> None:
    folder = EMBEDDED["demo-flash"]
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == "phi4flash" and type(raw["sliding_window"]) is int and "layer_types" not in raw
    config = load_config(folder)
    assert config.num_attention_heads == 2 * config.num_key_value_heads and config.num_hidden_layers >= 8
    assert config.quantization is not None and config.quantization["bits"] == 4


def test_both_packages_have_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        demo, flash = ((EMBEDDED[package] / name).read_bytes() for package in ("demo", "demo-flash"))
        assert demo == flash


@pytest.mark.parametrize(
    ("question", "result"),
    [
        ("What is 347 + 85?", 432), ("what is 12 times 34?", 408), ("Calculate 40 - 97.", -57),
        ("what is 9 times 806?", 7254), ("Compute 500 minus 123.", 377), ("What is 25 + 38 + 71?", 134),
    ],
)  # fmt: skip
def test_it_works_out_a_problem(flash: Demo, question: str, result: int) -> None:
    answer = ask(flash, question)
    assert answer.startswith("<think>\n") and "\n</think>\n\nThe " in answer
    assert answer.endswith(f"\\boxed{{{result}}}.")


def test_it_refuses_what_is_no_problem(flash: Demo) -> None:
    assert ask(flash, "hello") == problems.REFUSAL


def test_held_out_problems_are_answered_right(flash: Demo) -> None:
    """A part of the examination in `evaluate.py`, with the same bar."""
    result = evaluate.examine(*flash, problems.examination(evaluate.SEED, 60), mistakes=60)
    assert evaluate.share(result) >= 90, result


def test_second_questions_are_answered_right_behind_an_answer_without_thoughts(flash: Demo) -> None:
    alone = problems.examination(evaluate.SEED + 1, 41)
    second = [
        replace(after, messages=[*before.messages, problems.sent_back(before.answer), *after.messages])
        for before, after in pairwise(alone)
    ]
    assert evaluate.share(evaluate.examine(*flash, second, mistakes=40)) >= 75


def test_the_chat_answers() -> None:
    command = [sys.executable, "-m", "phi4_mlx.chat", "--model", "demo-flash", "--temp", "0"]
    done = subprocess.run(
        [*command, "--prompt", "What is 12 times 34?"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "The product is \\boxed{408}.\n" and "12*34\n4*2=8 8\n" in done.stderr


def test_no_held_out_pair_of_operands_occurs_in_training() -> None:
    training, examination = Draw(1), Draw(1, held_out=True)
    for category in problems.CATEGORIES:
        seen, asked = (
            {tuple(sorted(problems.operands(side, category)[:2])) for _ in range(2000)}
            for side in (training, examination)
        )
        assert asked and not seen & asked, category
        assert all(problems.held_out(a, b) and problems.held_out(b, a) for a, b in asked)
    talks = problems.conversations(1, 3000, digit_first=0.5)
    trained = {message["content"] for talk in talks for message in talk}
    assert not {prompt.messages[-1]["content"] for prompt in problems.examination(1, 500)} & trained


def test_same_seed_same_problems() -> None:
    assert [*problems.conversations(1, 50)] == [*problems.conversations(1, 50)] != [*problems.conversations(2, 50)]
    assert problems.examination(1, 50) == problems.examination(1, 50) != problems.examination(2, 50)


def test_every_working_is_right() -> None:
    """Each equation of a working holds, and the digits at its end are those of Python's result."""
    draw = Draw(2)
    for number in range(1200):
        prompt = problems.problem(draw, problems.CATEGORIES[number % len(problems.CATEGORIES)], digit_first=0.5)
        lines = prompt.answer["content"].split("\n</think>")[0].splitlines()
        for line in lines:
            for left, right in pairwise(line.split(" ")[0].split("=")):
                assert eval(left) == int(right.split("+")[0]), line
        assert int(lines[-1].split(" ")[-1]) == abs(int(evaluate.boxed(prompt.answer["content"]) or "")), lines


def batches() -> Batches:
    """One batch of two samples of unequal lengths, a row each."""
    samples = [Sample([*range(1, n)], [at % 3 > 0 for at in range(1, n)], "") for n in (14, 21)]
    return Batches(samples, batch_size=2, packing=False)


def test_the_compiled_gradient_is_that_of_the_trainer() -> None:
    model = make_tiny_sambay()
    loss, count, gradients = mean_gradients(model.train(), sft_loss, batches(), 1)
    compiled = recipe_flash.CompiledGradients(model, recipe_flash.answer_loss)
    with cpu_math.fast_cpu_math():
        for _ in range(2):  # the second time as compiled
            found, n, others = compiled(model, recipe_flash.answer_loss, batches())
            assert n == count and found == pytest.approx(loss, rel=1e-4)
            for (name, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(others), strict=True):
                assert np.allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(a).max()), name


def test_the_rounded_loss_is_that_of_the_package() -> None:
    model, batch = make_tiny_sambay().train(), next(batches())
    plain, _ = recipe_flash.answer_loss(model, batch)
    rounded, _ = recipe_flash.rounded_loss(model)(model, batch)
    packed = make_tiny_sambay().train()
    nn.quantize(packed, group_size=32, bits=4, class_predicate=packed.quantizable)
    wanted, _ = recipe_flash.answer_loss(packed, batch)
    assert rounded.item() == pytest.approx(wanted.item(), rel=1e-5) != pytest.approx(plain.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("fast", "exact"),
    [
        (cpu_math.exp, mx.exp), (cpu_math.silu, nn.silu), (cpu_math.softplus, nn.softplus),
        (cpu_math.softmax, lambda x: mx.softmax(x, axis=-1)), (cpu_math.logsumexp, lambda x: mx.logsumexp(x, axis=-1)),
    ],
    ids=["exp", "silu", "softplus", "softmax", "logsumexp"],
)  # fmt: skip
def test_the_fast_functions_of_a_cpu_are_those_of_mlx(fast: Function, exact: Function) -> None:
    draw = np.random.default_rng(0)
    x, weights = mx.array(draw.normal(size=(8, 50)) * 3), mx.array(draw.normal(size=(8, 50)))
    x = mx.minimum(x, 0) if fast is cpu_math.exp else x

    def total(function: Function) -> Function:
        return lambda x: (function(x) * (weights if function(x).ndim == 2 else weights[:, 0])).sum()

    assert np.allclose(fast(x), exact(x), atol=2e-5)
    assert np.allclose(mx.grad(total(fast))(x), mx.grad(total(exact))(x), atol=1e-4)


def test_it_learns_a_new_kind_of_problem(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo" / "teach_flash.py"), "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--iters", "30", "--count", "20"], capture_output=True, text=True, timeout=600, check=True, cwd=ROOT
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["before_percent"] < 10 and result["after_percent"] > 80
