"""Prompts have exactly the length asked for, and hide each sentence at its depth, with any tokenizer."""

from __future__ import annotations

import base64
import gzip
import json
import random
from dataclasses import replace

import pytest

from phi4_mlx.checkpoint import load_tokenizer_and_format
from phi4_mlx.evaluation.long_context.haystack import SLACK, Haystack
from phi4_mlx.evaluation.long_context.language import CODES, DEMO, load_language
from phi4_mlx.evaluation.long_context.problem import KINDS, Problem
from phi4_mlx.tokens.tokenizer import ByteTokenizer, Tokenizer
from tests.conftest import DATA, TOKENIZER, Demo

DEPTHS = (0.0, 0.3, 1.0)


@pytest.fixture(scope="module")
def published(demo: Demo) -> Tokenizer:
    """Phi-4-mini's own tokens, straight from the rank table."""
    lines = gzip.decompress((DATA / "o200k_base.tiktoken.gz").read_bytes()).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    config = json.loads((DATA / "phi-4-mini-instruct" / "tokenizer_config.json").read_text())
    added = [{"id": int(token), **entry} for token, entry in config["added_tokens_decoder"].items()]
    spec = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = ByteTokenizer({**spec, "added_tokens": added, "model": {"vocab": {}}}, ranks)
    tokenizer.chat_format = demo[1].chat_format
    return tokenizer


def problems(code: str, depth: float, seed: int = 0) -> list[Problem]:
    language = load_language(code)
    forms = {kind: KINDS[kind].forms_in(language) for kind in KINDS}
    return [
        KINDS[kind].make(random.Random(seed), language, own[round(2 * depth) % len(own)], depth)
        for kind, own in forms.items()
        if own
    ]


def check(tokenizer: Tokenizer, code: str, length: int, slack: int) -> None:
    """Checks the length of each prompt, and the place of its first sentence."""
    haystack = Haystack(load_language(code), tokenizer, seed=0)
    for depth in DEPTHS:
        for problem in problems(code, depth):
            prompt = haystack.prompt(problem, length)
            assert prompt is not None and prompt.endswith(problem.question)
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            assert length - slack <= len(ids) <= length
            frame = problem.language.texts["frame"].split("{text}")[0]
            text = prompt.removeprefix(frame).removesuffix(problem.question).strip()
            assert all(text.count(insert.text) >= 1 for insert in problem.inserts)
            first = problem.inserts[0].text
            longest = max(len(tokenizer.encode(sentence)) for sentence in (first, *problem.language.filler))
            before = len(tokenizer.encode(text[: text.index(first)]))
            room = len(tokenizer.encode(text)) - len(tokenizer.encode(first))
            hidden = sum(len(tokenizer.encode(insert.text)) for insert in problem.inserts)
            # At the end, several sentences stand one after the other; and filler is needed to move them apart.
            if problem.kind == "needle" or (depth < 1 and 2 * hidden < room):
                assert abs(before - depth * room) <= longest


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
def test_lengths_are_exact_with_the_published_tokenizer(code: str, published: Tokenizer) -> None:
    for length in (512, 777):
        check(published, code, length, slack=0)


@pytest.mark.slow
@pytest.mark.parametrize("code", [*CODES, DEMO])
def test_lengths_are_close_with_a_tokenizer_of_bytes(code: str, demo: Demo) -> None:
    check(demo[1], code, 2500, SLACK)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["zh", "th", "ar", "hu"])
def test_lengths_are_close_with_sentencepiece(code: str) -> None:
    check(load_tokenizer_and_format(DATA / "tiny_sentencepiece"), code, 3000, SLACK)


@pytest.mark.slow
def test_no_prompt_is_longer_or_much_shorter_at_any_length(demo: Demo) -> None:
    for code in ("en", "ja"):
        problem = problems(code, 0.5)[0]
        haystack = Haystack(problem.language, demo[1], seed=0)
        for length in range(50, 700, 7):
            prompt = haystack.prompt(problem, length)
            assert prompt is None or length - SLACK <= haystack.tokens(prompt) <= length
            assert prompt is not None or length < 600


def test_prompts_of_any_length_share_their_beginning(demo: Demo) -> None:
    haystack = Haystack(load_language("en"), demo[1], seed=0)
    (problem, *_), (other, *_) = problems("en", 1.0), problems("en", 1.0, seed=1)
    short, long = haystack.prompt(problem, 600), haystack.prompt(other, 1200)
    assert short and long
    shared = next(at for at, (a, b) in enumerate(zip(short, long, strict=False)) if a != b)
    assert shared > len(short) / 2


def test_a_seed_fixes_the_filler(demo: Demo) -> None:
    problem = problems("de", 0.5)[0]
    made = [Haystack(problem.language, demo[1], seed).prompt(problem, 700) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_sentences_keep_their_order_where_depths_are_equal(demo: Demo) -> None:
    problem = problems("en", 1.0)[0]
    inserts = tuple(replace(problem.inserts[0], text=f"Sentence {name}.") for name in "ABC")
    prompt = Haystack(problem.language, demo[1], 0).prompt(replace(problem, inserts=inserts), 400)
    assert prompt and "Sentence A. Sentence B. Sentence C.\n\n" in prompt


def test_a_length_without_room_gives_no_prompt(demo: Demo) -> None:
    problem = problems("en", 0.5)[0]
    haystack = Haystack(problem.language, demo[1], 0)
    least = next(length for length in range(1, 999) if haystack.prompt(problem, length))
    assert haystack.tokens(problem.question) < least < 200
    assert haystack.prompt(problem, least - 1) is None
