"""Every kind of model in generation, batching, caches, speculation, chat, serving and training.

Two kinds: phi3, whose cache can be trimmed, and the toy of `tests/toy_model.py`, whose cache returns to snapshots.
"""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.adapters.layers import adapter_off, adapter_parameters, add_adapter
from phi4_mlx.chat.conversation import Conversation
from phi4_mlx.checkpoint import KINDS, load, load_model, share_weights
from phi4_mlx.convert.package import convert
from phi4_mlx.data.samples import Sample
from phi4_mlx.errors import RequestError
from phi4_mlx.fingerprint import base_fingerprint
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.memory import plan_context
from phi4_mlx.generation.options import DecodeOptions
from phi4_mlx.generation.prompt_cache_file import load_prompt_cache, save_prompt_cache
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.speculate import PromptLookup, make_proposer
from phi4_mlx.lora.saving.run_folder import RunFolder
from phi4_mlx.lora.settings import Settings as TrainingSettings
from phi4_mlx.lora.training.batches import Batches
from phi4_mlx.lora.training.trainer import Trainer
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.models.snapshot import MAX_SNAPSHOTS
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.prefix_cache import PrefixCache
from phi4_mlx.server.engine.protocol import Finish, Job, Piece
from phi4_mlx.server.engine.settings import Settings
from tests import kinds
from tests.adapters import adapted, save_adapter
from tests.conftest import ROOT
from tests.model_runs import close, decoded
from tests.toy_model import make_toy_model, register_toy, write_toy_checkpoint

MAKERS: dict[str, Callable[..., LanguageModel]] = kinds.MAKERS | {"toy": make_toy_model}
WRITERS: dict[str, Callable[..., Path]] = kinds.WRITERS | {"toy": write_toy_checkpoint}
PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 500, 40)]


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    register_toy(monkeypatch)
    return str(request.param)


@pytest.fixture
def model(kind: str) -> LanguageModel:
    return MAKERS[kind]()


@pytest.fixture
def loaded(kind: str, tmp_path: Path) -> tuple[LanguageModel, Any]:
    return load(WRITERS[kind](tmp_path / kind))


def test_every_registered_kind_is_tested_here() -> None:
    assert KINDS.keys() <= MAKERS.keys() | kinds.SAME.keys()
    assert all(KINDS[name] is KINDS[same] for name, same in kinds.SAME.items())


def test_chunks_of_any_size_give_the_logits_of_one_pass(model: LanguageModel) -> None:
    ids = mx.array([PROMPT])
    whole = model(ids)
    for size in (1, 7, 39):
        cache = model.make_cache()
        parts = [model(ids[:, at : at + size], cache) for at in range(0, len(PROMPT), size)]
        assert close(mx.concatenate(parts, axis=1), whole)
    assert close(model.logits(model.hidden(ids, rows=3)), whole[:, -3:])
    embeddings = model.head(ids)  # the tiny models tie head and embedding
    assert close(model.logits(model.hidden(ids, embeddings=embeddings)), whole)


@pytest.mark.parametrize("step", [1, 5, 64])
def test_a_chunked_prefill_decodes_the_same_tokens(model: LanguageModel, step: int) -> None:
    assert decoded(model, PROMPT, 12, prefill_step_size=step) == decoded(model, PROMPT, 12)


def test_a_cache_is_truncated_to_the_prefix_that_a_new_prompt_shares(model: LanguageModel) -> None:
    """Undo and retry: the same prompt after its answer, then prompts that differ earlier."""
    cache = model.make_cache()
    first = decoded(model, cache.reuse(PROMPT), 12, cache=cache, prefill_step_size=16)
    second = [*PROMPT, *first, 7, 8, 9]
    decoded(model, cache.reuse(second), 12, cache=cache, prefill_step_size=16)
    for prompt in (second, PROMPT, [*PROMPT[:20], 5, 6], [*PROMPT, 3], [9]):
        rest = cache.reuse(prompt)
        assert 0 < len(rest) <= len(prompt) and cache.offset == len(prompt) - len(rest)
        assert decoded(model, rest, 6, cache=cache, prefill_step_size=16) == decoded(model, prompt, 6)


def test_a_repeated_prompt_runs_only_its_last_token(model: LanguageModel) -> None:
    cache = model.make_cache()
    decoded(model, cache.reuse(PROMPT), 12, cache=cache)
    assert cache.reuse(PROMPT) == PROMPT[-1:]


def test_a_fork_of_a_short_prefix_takes_memory_for_that_prefix_only(model: LanguageModel) -> None:
    cache = model.make_cache()
    decoded(model, PROMPT * 20, 1, cache=cache, prefill_step_size=64)
    fork = cache.fork(cache.reusable(64))
    fork.compact()
    expected = model.make_cache()
    decoded(model, PROMPT * 20, 1, cache=expected)
    assert sum(layer.nbytes for layer in fork) <= max(0.2 * expected.nbytes, model.context_cost().fixed_bytes)


def test_a_cache_with_its_snapshots_keeps_no_memory_beyond_its_own(model: LanguageModel) -> None:
    prompt = PROMPT * 20
    decoded(model, prompt, 2, prefill_step_size=128)  # traces
    gc.collect()
    before, cache = mx.get_active_memory(), model.make_cache()
    decoded(model, prompt, 1, cache=cache, prefill_step_size=128)
    assert mx.get_active_memory() - before <= 1.1 * cache.nbytes + 65_536


def test_forced_tokens_keep_the_snapshots_of_the_prompt(model: LanguageModel) -> None:
    class ForcingMask:
        def mask(self) -> None:
            return None

        def accept(self, token: int) -> list[int]:
            return [5, 6, 7]

    cache = model.make_cache()
    decoded(model, cache.reuse(PROMPT), 60, cache=cache, logits_mask=ForcingMask())
    assert cache.reuse(PROMPT) == PROMPT[-1:]


def test_the_snapshots_of_a_long_prompt_cover_its_whole_length(model: LanguageModel) -> None:
    cache, prompt = model.make_cache(), PROMPT * 20
    decoded(model, prompt, 1, cache=cache, prefill_step_size=16)
    for shared in (100, 300, 600, 790):
        assert cache.fork(cache.offset).keep_shared(prompt[:shared]) > 0


def test_a_cache_does_not_keep_its_model_alive(kind: str) -> None:
    model = MAKERS[kind]()
    cache, watch = model.make_cache(), weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None and cache.offset == 0


def test_a_refused_trim_changes_nothing(model: LanguageModel) -> None:
    cache = model.make_cache()
    decoded(model, PROMPT, 1, cache=cache)
    taken = cache.trim(5)
    assert taken == (5 if cache.is_trimmable() else 0)
    assert {layer.offset for layer in cache} == {len(PROMPT) - taken}


def test_a_fork_does_not_change_its_source(model: LanguageModel) -> None:
    cache = model.make_cache()
    decoded(model, PROMPT, 1, cache=cache)
    length = cache.reusable(len(PROMPT) - 1)
    assert length == len(PROMPT) - 1
    fork = cache.fork(length)
    assert decoded(model, PROMPT[length:], 5, cache=fork) == decoded(model, PROMPT, 5)
    assert cache.offset == len(PROMPT) and cache.ids[0].tolist() == PROMPT


def test_a_batch_decodes_each_sequence_as_it_would_be_alone(model: LanguageModel) -> None:
    prompts = [PROMPT, PROMPT[:5], PROMPT[10:33], PROMPT]
    sequences = [BatchSequence(model, list(prompt), 8 + 3 * n) for n, prompt in enumerate(prompts)]
    batch, waiting = Batch(prefill_step_size=16), list(sequences)
    while waiting or batch.active or batch.waiting:
        if waiting:
            batch.add(waiting.pop(0))  # one sequence joins at every step
        for event in batch.step():
            assert not isinstance(event, Fault), event
        for sequence in [each for each in batch.active if each.drawn >= each.max_tokens]:
            batch.end(sequence)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.ids[len(prompt) :][: sequence.max_tokens] == decoded(model, prompt, sequence.max_tokens)


def test_the_prefix_cache_shortens_a_second_prompt(model: LanguageModel) -> None:
    store, cache = PrefixCache(10**7), model.make_cache()
    decoded(model, PROMPT, 1, cache=cache, prefill_step_size=16)
    store.put(model, None, cache)
    for prompt, at_least in (([*PROMPT, 1, 2, 3], len(PROMPT)), (PROMPT, len(PROMPT) - 1), ([*PROMPT[:30], 1], 16)):
        found = store.find(model, None, prompt)
        assert found is not None and at_least <= found.offset < len(prompt)
        assert decoded(model, prompt[found.offset :], 6, cache=found) == decoded(model, prompt, 6)
    assert store.find(model, "adapter", PROMPT) is None


def test_speculation_is_exact_where_the_cache_can_be_rewound_and_refused_elsewhere(model: LanguageModel) -> None:
    prompt = PROMPT[:12] * 3
    if model.make_cache().rewindable:
        plain = decoded(model, prompt, 60)
        for step in (16, 2048):
            assert decoded(model, prompt, 60, proposer=PromptLookup(timed=False), prefill_step_size=step) == plain
        return
    assert make_proposer("lookup", model, rewindable=model.make_cache().rewindable) is None
    with pytest.raises(RequestError, match="cannot; drop the proposer"):
        decoded(model, prompt, 12, proposer=PromptLookup(timed=False))


def test_a_chat_answers_a_question_the_same_after_undo(loaded: tuple[LanguageModel, Any]) -> None:
    def ask(conversation: Conversation, question: str) -> str:
        events = conversation.ask(question, DecodeOptions(max_tokens=8))
        return "".join(event.text for event in events if hasattr(event, "text"))

    conversation = Conversation(*loaded)
    first, second = ask(conversation, "one"), ask(conversation, "two")
    conversation.turns.pop()
    assert ask(conversation, "two") == second
    assert conversation.usage.cached_tokens > 0
    conversation.turns.clear()
    assert ask(conversation, "one") == first


def test_the_engine_gives_the_answers_of_generate_step(loaded: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, Settings("any", kv_limit_bytes=10**8, prefix_limit_bytes=10**7))
    jobs = [Job(n, tuple(PROMPT[: 20 + n]), 10, Sampling()) for n in range(3)]
    jobs += [replace(jobs[0], id=3), replace(jobs[1], id=4, prompt=(*jobs[1].prompt, 7))]
    events = [event for job in jobs for event in engine.submit(job)]
    while engine.busy:
        events += engine.step()
    ends = {event.job: event for event in events if isinstance(event, Finish)}
    assert ends.keys() == {job.id for job in jobs}, events
    for job in jobs:
        text = "".join(event.text for event in events if isinstance(event, Piece) and event.job == job.id)
        expected = decoded(model, list(job.prompt), ends[job.id].answer_tokens)
        assert text == tokenizer.decode([t for t in expected if t not in tokenizer.eos_ids])


def test_a_second_turn_and_a_second_client_run_their_new_tokens_alone(
    loaded: tuple[LanguageModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    engine, end, ran = Engine(model, tokenizer, Settings("any", None, {}, 32, 10**8, 10**8)), min(tokenizer.eos_ids), 0
    hidden = type(model).hidden

    def counted(model: Any, ids: mx.array, *others: Any, **options: Any) -> mx.array:
        nonlocal ran
        ran += ids.size
        return hidden(model, ids, *others, **options)

    def ask(prompt: list[int]) -> tuple[str, int, int]:
        """The answer of 5 tokens, its cached tokens, and the prompt's tokens that were run."""
        nonlocal ran
        ran, events = 0, engine.submit(Job(1, tuple(prompt), 5, Sampling(temp=0.0)))
        while engine.busy:
            events += engine.step()
        finish = events[-1]
        assert isinstance(finish, Finish), finish
        text = "".join(event.text for event in events if isinstance(event, Piece))
        return text, finish.cached_tokens, ran - (finish.answer_tokens - 1)

    monkeypatch.setattr(type(model), "hidden", counted)
    system, question = PROMPT * 10 + [end], [7, 8, 9, 10, end, 5]
    first = [*system, *question]
    assert ask(first)[1:] == (0, len(first))
    second = [*first, *decoded(model, first, 4), end, 20, 21, 22, end, 5]
    other = [*system, 30, 31, 32, end, 5]
    for prompt, known in (
        (second, len(first)),
        (other, len(system)),
        (first, len(first) - 1),
        (second, len(second) - 1),
    ):
        text, cached, run = ask(prompt)
        assert known <= cached == len(prompt) - run
        assert text == tokenizer.decode([t for t in decoded(model, prompt, 5) if t not in tokenizer.eos_ids])


def test_jobs_of_an_adapter_and_of_the_model_share_an_engine(loaded: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    twin = adapted(share_weights(model), scale=8.0)
    save_adapter(twin, tmp_path / "one", {})
    engine = Engine(model, tokenizer, Settings("any", None, {"one": str(tmp_path / "one")}, 32, 10**8, 10**8))
    jobs = [Job(n, tuple(PROMPT[: 20 + n]), 8, Sampling(temp=0.0), adapter=[None, "one"][n % 2]) for n in range(4)]
    events = [event for job in jobs for event in engine.submit(job)]
    while engine.busy:
        events += engine.step()
    answers, ends = {}, {event.job: event for event in events if isinstance(event, Finish)}
    for job in jobs:
        expected = decoded(twin if job.adapter else model, list(job.prompt), ends[job.id].answer_tokens)
        answers[job.id] = "".join(event.text for event in events if isinstance(event, Piece) and event.job == job.id)
        assert answers[job.id] == tokenizer.decode([t for t in expected if t not in tokenizer.eos_ids])
    assert answers[0] != answers[1] or answers[2] != answers[3]


def test_decoding_continues_from_a_prompt_cache_file(loaded: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    cache = model.make_cache()
    decoded(model, PROMPT[:-5], 1, cache=cache)
    save_prompt_cache(tmp_path / "kept", cache, model, tokenizer)
    loaded_cache = load_prompt_cache(tmp_path / "kept", model, tokenizer)
    rest = loaded_cache.reuse(PROMPT)
    assert rest == PROMPT[-5:]
    assert decoded(model, rest, 6, cache=loaded_cache) == decoded(model, PROMPT, 6)


@pytest.mark.slow
def test_lora_training_lowers_the_loss_and_leaves_the_base_unchanged(model: LanguageModel, tmp_path: Path) -> None:
    before, base = model(mx.array([PROMPT])), base_fingerprint(model)
    add_adapter(model, rank=4)
    samples = [Sample(PROMPT[n : n + 20], [False] + [True] * 19, f"line {n}") for n in range(8)]
    settings = TrainingSettings(iters=30, batch_size=4, learning_rate=2e-2, max_seq_length=64, grad_checkpoint=True)
    batches = Batches(samples, batch_size=settings.batch_size, max_seq_length=settings.max_seq_length)
    folder = RunFolder(tmp_path, len(model.layers), keep_checkpoints=1)
    losses = [step.loss for step in Trainer(model, batches, settings, folder).run()]
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    assert adapter_parameters(model) and base_fingerprint(model) == base
    with adapter_off(model):
        assert close(model(mx.array([PROMPT])), before)


def test_a_checkpoint_loads_and_its_weights_can_be_shared(kind: str, tmp_path: Path) -> None:
    model = load_model(WRITERS[kind](tmp_path / kind))
    assert type(model) is type(MAKERS[kind]())
    assert close(share_weights(model)(mx.array([PROMPT])), MAKERS[kind]()(mx.array([PROMPT])))


def test_the_converter_quantises_exactly_the_layers_that_the_model_allows(kind: str, tmp_path: Path) -> None:
    convert(WRITERS[kind](tmp_path / kind), tmp_path / "small", quantize=True, q_group_size=32)
    model, dense = load_model(tmp_path / "small"), MAKERS[kind]()
    quantised = {path for path, module in model.named_modules() if hasattr(module, "bits")}
    assert quantised == {path for path, module in dense.named_modules() if dense.quantizable(path, module)}
    assert model.weights_bytes < 0.4 * dense.weights_bytes
    assert decoded(model, PROMPT, 4)


def test_the_memory_plan_equals_the_bytes_of_the_cache_and_its_snapshots(model: LanguageModel) -> None:
    plan, cache = plan_context(model), model.make_cache()
    decoded(model, PROMPT, 1, cache=cache)
    taken = sum(layer.nbytes for layer in cache)
    assert taken + MAX_SNAPSHOTS * plan.cost.fixed_bytes == plan.cache_bytes(len(PROMPT))
    assert plan.most_tokens == model.config.max_position_embeddings


PARTS = {"rope", "embed_tokens", "norm", "lm_head", "self_attn", "mlp"}  # attributes private to models/


def accesses_to_parts(source: str) -> list[str]:
    """Attribute accesses into the parts of a model."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PARTS | {"model"}:
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in ("model", "_model", "draft", "twin", "base", "_base") and (
                node.attr in PARTS or owner.endswith(".model")
            ):
                found.append(ast.unparse(node))
    return found


def test_code_outside_models_uses_only_the_contract() -> None:
    found = {}
    for path in [*(ROOT / "phi4_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        if "models" not in path.parts:
            if inside := accesses_to_parts(source):
                found[path.name] = inside
            names = {"phi4_mlx/__init__.py", "phi4_mlx/checkpoint.py"}  # the public name; the table of kinds
            assert "models.text" not in source or str(path.relative_to(ROOT)) in names, path
    assert not found


@pytest.mark.parametrize("source", ["x = model.model.norm.weight", "self._model.rope.at(1)", "draft.lm_head"])
def test_an_access_to_a_part_of_a_model_is_found(source: str) -> None:
    assert accesses_to_parts(source)


@pytest.mark.parametrize("source", ["self.model.hidden(ids)", "model.config.vocab_size"])
def test_the_contract_of_a_model_is_not_an_access_to_its_parts(source: str) -> None:
    assert not accesses_to_parts(source)
