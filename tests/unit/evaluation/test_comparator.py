"""Models of mlx-lm through our harness: their scores and answers are mlx-lm's own."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import cache

from phi4_mlx.errors import CheckpointError, RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.comparator import MlxLmModel, load_comparator
from phi4_mlx.evaluation.scoring import scores
from phi4_mlx.evaluation.subject import Subject
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.conftest import TOKENIZER

BASE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 512, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama in windows": {"model_type": "llama", "tie_word_embeddings": True, **WINDOWS},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2", "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": LONG},
}  # fmt: skip


def config(kind: str) -> dict[str, Any]:
    return BASE | CONFIGS[kind]


def make(kind: str) -> nn.Module:
    """A model of mlx-lm with random weights whose logits have about unit scale."""
    raw = config(kind)
    module = importlib.import_module(f"mlx_lm.models.{raw['model_type']}")
    inner = module.Model(module.ModelArgs.from_dict(raw))
    keys = iter(mx.random.split(mx.random.key(3), 200))
    drawn = tree_map(
        lambda old: mx.random.normal(old.shape, key=next(keys)) * (0.1 if old.ndim == 1 else old.shape[-1] ** -0.5),
        inner.parameters(),
    )
    inner.update(drawn)
    mx.eval(inner.parameters())
    return inner.eval()


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(20, 500) for _ in range(count)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_mlx_lms_logits(tmp_path: Path, kind: str) -> None:
    inner, draw = make(kind), random.Random(1)
    before = ids(draw, 20)
    requests = []
    for _ in range(3):
        context = before + ids(draw, draw.randrange(1, 30))
        requests += [(context, ids(draw, draw.randrange(1, 6))) for _ in range(4)]
    subject = Subject(MlxLmModel(inner, kind, config(kind)), Tokenizer([], {}), kind, kind, bos_id=1)
    with Answers(tmp_path / "answers") as answers:
        found = scores(subject, requests, answers)
    for (context, continuation), score in zip(requests, found, strict=True):
        logits = inner(mx.array([context + continuation]))[0, len(context) - 1 : -1]
        logprobs = nn.log_softmax(logits)[mx.arange(len(continuation)), mx.array(continuation)]
        assert score.logprob == pytest.approx(logprobs.sum().item(), abs=1e-4)
        assert score.greedy == (mx.argmax(logits, axis=-1).tolist() == continuation)


def write(folder: Path, kind: str) -> Path:
    """The folder of a model, with the tiny tokenizer."""
    folder.mkdir()
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config(kind)))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(make(kind).parameters())))
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_of_several_lengths_are_those_of_mlx_lm(tmp_path: Path, kind: str) -> None:
    from mlx_lm import generate, load

    folder = write(tmp_path / "model", kind)
    subject = load_comparator(str(folder))
    prompts = ["a", "the quick brown fox jumps over", "one two three"]
    with Answers(tmp_path / "answers") as answers:
        found = ask(subject, [Question(text, text, max_tokens=12) for text in prompts], answers)
    model, tokenizer = load(str(folder))
    for text, answer in zip(prompts, found, strict=True):
        assert answer.content == generate(model, tokenizer, text, max_tokens=12)


def test_a_chat_is_rendered_by_the_models_own_template(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    path = folder / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = load_comparator(str(folder)).tokenizer
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(messages[:1])) == "[ab]>"
    assert tokenizer.decode(tokenizer.chat_format.render_open(tokenizer, messages)).startswith("[ab][cd")
    with pytest.raises(RequestError, match="no system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    subject = load_comparator(str(folder))
    with Answers(tmp_path / "answers") as answers:
        assert ask(subject, [Question("plain", "abc", max_tokens=2)], answers)[0].tokens == 2
        with pytest.raises(RequestError, match="no chat template; --no-apply-chat-template"):
            ask(subject, [Question("chat", [{"role": "user", "content": "abc"}])], answers)


def test_plain_text_never_becomes_a_control_token(tmp_path: Path) -> None:
    tokenizer = load_comparator(str(write(tmp_path / "model", "llama"))).tokenizer
    text, number = next(iter(tokenizer.control_ids.items()))
    assert number in tokenizer.encode(f"a{text}", specials=True)
    assert number not in tokenizer.encode(f"a{text}")
    assert tokenizer.decode(tokenizer.encode("a b  c")) == "a b  c"


def test_a_model_with_other_caches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "make_prompt_cache", lambda model: [cache.ArraysCache(2)])
    with pytest.raises(RequestError, match=r"tiny: .* keep keys and values"):
        MlxLmModel(make("llama"), "tiny", config("llama"))


def test_a_model_that_mlx_lm_does_not_load_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    (folder / "config.json").write_text(json.dumps(config("llama") | {"model_type": "nothing"}))
    with pytest.raises(CheckpointError, match=r"mlx-lm cannot load .*nothing"):
        load_comparator(str(folder))
