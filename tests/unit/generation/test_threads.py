"""Threads: a model of one thread answers in others, several at a time, and an answer may move between them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import pytest

from phi4_mlx import (
    finetune,
    generate,
    load,
    load_prompt_cache,
    make_logits_processors,
    make_sampler,
    run_tools,
    save_prompt_cache,
    stream_generate,
)
from phi4_mlx.generation.batch import Batch
from phi4_mlx.generation.sequence import BatchSequence, Fault
from phi4_mlx.generation.speculate import PromptLookup
from phi4_mlx.models.shared_stream import shared_stream
from tests.conftest import BOUNDARY, ROOT, TinyCheckpoint

T = TypeVar("T")
PROMPT = list(range(10, 40))


def in_thread(work: Callable[[], T]) -> T:
    """The result of some work in a new thread; raises its exception."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.extend((work(), None))
        except BaseException as error:
            done.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = done
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


@pytest.fixture(params=[False, True], ids=["eager", "lazy"])
def loaded(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Any:
    """(model, tokenizer), loaded in a thread that has ended."""
    folder = tiny_checkpoint(hidden_size=192)  # heads of 32, which can be quantised
    return in_thread(lambda: load(folder, lazy=request.param))


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "across the boundary": lambda: {"max_tokens": 2 * BOUNDARY},
    "sampled": lambda: {"sampler": make_sampler(temp=0.8, top_p=0.9, min_p=0.01, seed=3)},
    "processed": lambda: {"logits_processors": make_logits_processors({3: 1.0}, repetition_penalty=1.2)},
    "guessed": lambda: {"proposer": PromptLookup()},
    "quantised": lambda: {"kv_bits": 8},
    "stopped": lambda: {"stop": ["zz"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_any_thread_answers_with_a_model_of_another(loaded: Any, way: str) -> None:
    def answer() -> str:
        return generate(*loaded, PROMPT, **{"max_tokens": 20, **WAYS[way]()})

    assert in_thread(answer) == answer() == in_thread(answer) != ""


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_moves_from_thread_to_thread(loaded: Any, way: str) -> None:
    options = {"max_tokens": 20, **WAYS[way]()}
    whole = "".join(each.text for each in stream_generate(*loaded, PROMPT, **options))
    moving = in_thread(lambda: stream_generate(*loaded, PROMPT, **{**options, **WAYS[way]()}))
    text = next(moving).text  # in this thread, then each token in one of its own
    while (response := in_thread(lambda: next(moving, None))) is not None:
        text += response.text
        assert len(in_thread(response.logprobs.tolist)) == 512
    assert text == whole


def test_several_threads_take_turns(loaded: Any) -> None:
    prompts = [PROMPT[at:] for at in range(6)]
    alone = [generate(*loaded, prompt, max_tokens=60) for prompt in prompts]
    together: list[str] = [""] * len(prompts)
    turns: list[int] = []

    def answer(at: int) -> None:
        for response in stream_generate(*loaded, prompts[at], max_tokens=60):
            together[at] += response.text
            turns.append(at)

    threads = [threading.Thread(target=answer, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert turns != sorted(turns, key=turns.index)  # a token each, not an answer each


def test_a_cache_and_its_file_go_from_thread_to_thread(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    whole = generate(model, tokenizer, PROMPT, max_tokens=12)
    cache = in_thread(model.make_cache)
    in_thread(lambda: generate(model, tokenizer, PROMPT[:-4], max_tokens=1, cache=cache))
    rest = in_thread(lambda: cache.reuse(PROMPT))
    in_thread(lambda: save_prompt_cache(tmp_path / "c", cache, model, tokenizer))
    again = in_thread(lambda: load_prompt_cache(tmp_path / "c", model, tokenizer))
    assert in_thread(lambda: generate(model, tokenizer, rest, max_tokens=12, cache=cache)) == whole
    new = again.reuse(PROMPT)
    assert in_thread(lambda: generate(model, tokenizer, new, max_tokens=12, cache=again)) == whole


def test_schemas_and_tools_work_in_any_thread(loaded: Any) -> None:
    def now() -> str:
        """The time."""
        return "noon"

    schema = {"type": "string", "maxLength": 5}
    answers = [in_thread(lambda: generate(*loaded, PROMPT, schema=schema, max_tokens=40)) for _ in range(2)]
    assert answers[0] == answers[1] == generate(*loaded, PROMPT, schema=schema, max_tokens=40)
    ask = [{"role": "user", "content": "when?"}]
    result = in_thread(lambda: run_tools(*loaded, ask, [now], tool_choice="required", max_rounds=2, max_tokens=60))
    assert result.messages[-1]["content"] or result.rounds == 2


def test_threads_without_a_seed_draw_different_tokens(loaded: Any) -> None:
    def answer() -> str:
        return generate(*loaded, PROMPT, max_tokens=30, sampler=make_sampler(temp=1.0))

    assert len({in_thread(answer) for _ in range(3)}) == 3

    def seeded() -> str:
        mx.random.seed(7)
        return answer()

    assert in_thread(seeded) == in_thread(seeded)


@pytest.mark.slow
def test_a_program_whose_thread_has_just_ended_exits_cleanly() -> None:
    program = """
import threading
from phi4_mlx import generate, load
def work():
    global model
    model, tokenizer = load("demo")
    print(generate(model, tokenizer, "hello", max_tokens=3))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_a_model_freed_in_another_thread_leaves_no_trace_behind(tiny_checkpoint: TinyCheckpoint) -> None:
    """MLX finds compiled steps by an address, and only the thread that frees them forgets them."""
    folders = [tiny_checkpoint(f"theta {theta}", rope_theta=theta) for theta in (1e3, 1e4, 1e5)]
    expected = [in_thread(lambda: generate(*load(folder), PROMPT, max_tokens=12)) for folder in folders]  # noqa: B023
    assert len(set(expected)) == 3
    for _ in range(4):
        for folder, answer in zip(folders, expected, strict=True):
            held = [load(folder)]
            assert generate(*held[0], PROMPT, max_tokens=12) == answer

            def free(held: list[Any] = held) -> None:
                held.clear()
                gc.collect()

            in_thread(free)


def test_a_batch_moves_from_thread_to_thread(loaded: Any) -> None:
    """Its prompts are prefilled in chunks, cross the RoPE boundary, leave early and are read elsewhere."""

    def answers(call: Callable[[Callable[[], Any]], Any]) -> tuple[list[list[int]], list[float]]:
        batch = call(lambda: Batch(prefill_step_size=8))
        sampled = {"sampler": make_sampler(temp=0.7, seed=5)}
        sequences = [
            BatchSequence(loaded[0], PROMPT[: 9 + 7 * n], BOUNDARY, **(sampled if n == 1 else {})) for n in range(3)
        ]
        for sequence in sequences:
            batch.add(sequence)
        scores: list[float] = []
        for step in range(2 * BOUNDARY):
            events = call(batch.step)
            assert not any(isinstance(event, Fault) for event in events), events
            scores += [float(event.logprobs.max()) for event in events]
            if step == 6:
                cache = call(lambda: batch.end(sequences[0]))
                assert cache is not None and cache.offset > 0
                rest = cache.reuse([*sequences[0].ids, 7])
                assert call(lambda: generate(*loaded, rest, max_tokens=3, cache=cache))  # noqa: B023
            for sequence in [each for each in batch.active if each.drawn == BOUNDARY]:
                batch.end(sequence)
        return [sequence.ids for sequence in sequences], scores

    assert answers(in_thread) == answers(lambda work: work())


def test_logits_are_read_in_the_thread_of_the_call(loaded: Any) -> None:
    model = loaded[0]
    ids = mx.array([PROMPT])
    alone = model(ids).tolist()
    assert in_thread(lambda: model(ids).tolist()) == alone
    together: list[Any] = []

    def read() -> None:
        with shared_stream():
            together.append(model(ids).tolist())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone] * 4


def test_training_runs_in_any_thread(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    settings = {"model": str(folder), "data": str(tmp_path), "iters": 3, "lora_parameters": {"rank": 2}}
    paths = [tmp_path / name for name in ("here", "there")]

    def train(path: Path) -> None:
        finetune({**settings, "adapter_path": str(path)}, tell=lambda line: None)

    train(paths[0])
    in_thread(lambda: train(paths[1]))
    answers = [generate(*load(folder, adapter_path=path), PROMPT, max_tokens=8) for path in paths]
    assert answers[0] == answers[1]
    assert (paths[0] / "adapters.safetensors").read_bytes() == (paths[1] / "adapters.safetensors").read_bytes()
