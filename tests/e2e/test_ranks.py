"""generate, chat and the server over two ranks: the answers of one process, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from phi4_mlx.checkpoint import load_model
from phi4_mlx.cli import main
from tests.adapters import adapted, save_adapter
from tests.conftest import ROOT, write_tiny_checkpoint
from tests.kinds import WRITERS
from tests.rank_commands import HANG_S, RankCommand, alone, environment, over_ranks
from tests.rank_jobs import free_ports

pytestmark = pytest.mark.slow

GREEDY = ("--temp", "0")
SEEDED = ("--temp", "0.9", "--top-p", "0.95", "--seed", "5")
TEXT = ("--ignore-chat-template", "-p", "one two three one two three one two", "--max-tokens", "24")


@pytest.mark.parametrize("options", [(*GREEDY, "--speculate", "lookup"), SEEDED], ids=["greedy", "seeded"])
def test_the_demo_answers_over_a_pipeline_as_in_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    words = ("generate", "--model", "demo", "-p", "Who are you? Answer twice.", "--max-tokens", "40", *options)
    assert over_ranks(tmp_path, *words, "--parallel", "pipeline") == alone(*words)


@pytest.mark.parametrize("options", [(*GREEDY, "--speculate", "off"), SEEDED], ids=["greedy", "seeded"])
def test_a_model_answers_by_tensor_parallel_as_in_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    words = ("generate", "--model", str(write_tiny_checkpoint(tmp_path / "model", seed=4)), *TEXT, *options)
    assert over_ranks(tmp_path, *words, "--parallel", "tensor") == alone(*words)


@pytest.mark.parametrize("kind", ["phi4flash", "phi4mm"])
def test_every_kind_of_model_answers_over_a_pipeline(tmp_path: Path, kind: str) -> None:
    words = ("generate", "--model", str(WRITERS[kind](tmp_path / "model", seed=4)), *TEXT, *GREEDY)
    assert over_ranks(tmp_path, *words, "--parallel", "pipeline") == alone(*words)


def write_adapter(model: Path, folder: Path, seed: int = 0) -> str:
    """An adapter for the model in a folder; returns its path."""
    save_adapter(adapted(load_model(model), seed=seed), folder, {})
    return str(folder)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_an_adapter_is_shared_out_with_the_model(tmp_path: Path, parallel: str) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", seed=4)
    plain = ("generate", "--model", str(model), *TEXT)
    words = (*plain, "--adapter-path", write_adapter(model, tmp_path / "adapter"))
    answer = over_ranks(tmp_path, *words, "--parallel", parallel)
    assert answer == alone(*words) and answer != alone(*plain)


def test_the_way_is_chosen_with_a_reason_and_a_small_cache_works(tmp_path: Path) -> None:
    model = str(write_tiny_checkpoint(tmp_path / "model", num_attention_heads=3, num_key_value_heads=1))
    words = ("generate", "--model", model, *TEXT, "--kv-bits", "8", "--max-kv-size", "512")
    (code, out, err), other = RankCommand(tmp_path, *words).wait()
    assert (code, other) == (0, (0, "", "")) and "2 ranks over ring, --parallel pipeline: " in err
    assert out == alone(*words)


def test_chat_reads_the_standard_input_of_rank_0(tmp_path: Path) -> None:
    words, given = ("chat", "--model", "demo"), "Who are you?\nWhat is your name?\n"
    assert over_ranks(tmp_path, *words, "--parallel", "pipeline", given=given) == alone(*words, given=given)


def test_mlx_launch_starts_a_command(tmp_path: Path) -> None:
    words = ("generate", "--model", "demo", "-p", "Who are you?", "--max-tokens", "12")
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(free_ports(2)[0])]
    done = subprocess.run(
        [*launch, "--", sys.executable, "-m", "phi4_mlx", *words, "--parallel", "pipeline"],
        env=environment(tmp_path) | {"PHI4_MLX_JOIN_S": "60"}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=HANG_S,
    )  # fmt: skip
    assert done.stdout.rstrip("\n") == alone(*words).rstrip("\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--prompt-cache-file", "f"), "--prompt-cache-file does not work over ranks"),
        (("--parallel", "tensor"), "needs num_attention_heads to be a multiple of 2, and this model has 3"),
        (("--model", "nowhere"), "nowhere"),
    ],
)
def test_a_mistake_on_all_ranks_is_one_line_of_rank_0(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    (code, out, err), other = RankCommand(tmp_path, "generate", "--model", "demo", "-p", "a", *words).wait()
    assert (code, out, other) == (2, "", (2, "", "")), err
    (said,) = err.splitlines()
    assert line in said


def test_groups_that_tensor_parallel_would_cut_are_refused_by_rank_0(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny", hidden_size=192, intermediate_size=192)
    packed = tmp_path / "packed"
    assert main(["convert", "--hf-path", str(model), "--mlx-path", str(packed), "-q"]) == 0
    words = ("generate", "--model", str(packed), "-p", "a", "--parallel", "tensor")
    (code, out, err), other = RankCommand(tmp_path, *words).wait()
    assert (code, out, other) == (2, "", (2, "", "")), err
    assert "groups of its quantisation, and it has 3 in a row; use --parallel pipeline" in err and err.count("\n") == 1


def test_a_mistake_after_the_start_ends_both(tmp_path: Path) -> None:
    words = ("generate", "--model", "demo", "--parallel", "pipeline", "-p", "a", "--max-tokens", "99999")
    (code, out, err), (other, *printed) = RankCommand(tmp_path, *words).wait()
    assert (code, out, other, printed) == (2, "", 2, ["", ""]), err
    assert err.count("\n") == 1 and "the context holds 4096" in err


def test_ranks_with_different_models_are_refused_by_both(tmp_path: Path) -> None:
    one, two = (str(write_tiny_checkpoint(tmp_path / name, seed=n)) for n, name in enumerate(("one", "two")))
    ranks = RankCommand(
        tmp_path, "generate", "--model", one, "-p", "a", others=("generate", "--model", two, "-p", "a")
    ).wait()
    for code, out, err in ranks:
        assert (code, out) == (2, "") and "the model's fingerprint is" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (("generate", "--kv-bits", "4"), "--kv-bits is not given on rank 0 (127.0.0.1) but 4 on rank 1 (127.0.0.1)"),
        (("chat",), "the command is generate on rank 0 (127.0.0.1) but chat on rank 1 (127.0.0.1)"),
    ],
)
def test_ranks_with_different_options_are_refused_by_both(tmp_path: Path, others: tuple[str, ...], said: str) -> None:
    same = ("--model", "demo", "-p", "a")
    for code, out, err in RankCommand(tmp_path, "generate", *same, others=(*others, *same)).wait():
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err


def test_a_model_that_one_rank_lacks_is_named_by_both(tmp_path: Path) -> None:
    words, lacks = ("generate", "--model", "demo", "-p", "a"), ("generate", "--model", "nowhere", "-p", "a")
    for code, out, err in RankCommand(tmp_path, *words, others=lacks).wait():
        assert (code, out) == (2, "") and "not usable" in err and "nowhere" in err


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("Follower.counter = property(lambda self: 1, lambda self, value: None)", "operation 1 came after operation 1"),
        ("RunningDigest.append = lambda self, ids: append(self, [*ids][1:])", "the cache here has 26"),
    ],
)
def test_a_rank_one_step_off_is_refused_and_not_added_up(tmp_path: Path, fault: str, line: str) -> None:
    before = (
        "from phi4_mlx.ranks.follower import Follower; from phi4_mlx.ranks.digest import RunningDigest; "
        f"append = RunningDigest.append; {fault}"
    )
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    ranks = RankCommand(tmp_path, "generate", "--model", model, *TEXT, "--parallel", "tensor", before=before).wait()
    for code, out, err in ranks:
        assert (code, out) == (1, "") and err.count("rank 1 (127.0.0.1) is out of step: ") == err.count(line) == 1


def test_a_command_that_all_ranks_would_repeat_is_refused(tmp_path: Path) -> None:
    (code, out, err), other = RankCommand(tmp_path, "models").wait()
    assert (code, out, other) == (2, "", (2, "", "")) and "2 ranks would all do the same" in err


def test_parallel_needs_ranks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "chat", "--model", "demo", "--parallel", "tensor"], cwd=ROOT,
        env=environment(Path()), input="", capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 2 and "--parallel tensor needs several ranks" in done.stderr


class Served:
    """A server over two ranks."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.command = RankCommand(folder, "server", "--port", "0", *options)
        self.lines: list[str] = []
        self.others: list[str] = []
        ready = threading.Event()

        def read(rank: int, lines: list[str]) -> None:
            for line in self.command.ranks[rank].stderr or ():
                lines.append(line)
                if "listening on" in line:
                    ready.set()
            ready.set()

        for rank, lines in enumerate((self.lines, self.others)):
            threading.Thread(target=read, args=(rank, lines), daemon=True).start()
        assert ready.wait(HANG_S) and "listening on" in self.lines[-1], self.lines
        self.url = f"http://127.0.0.1:{self.lines[-1].rpartition(':')[2].strip()}"

    def ask(self, text: str, **fields: object) -> str:
        body = {"model": "x", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
        body["model"] = httpx.get(f"{self.url}/v1/models", timeout=HANG_S).json()["data"][0]["id"]
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body | fields, timeout=HANG_S)
        found: str = reply.json()["choices"][0]["message"]["content"]
        return found

    def ended(self, within_s: float = HANG_S) -> list[int]:
        """The exit codes of both ranks."""
        deadline = time.monotonic() + within_s
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.command.ranks]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path, "--model", "demo", "--parallel", "pipeline")
    yield server
    server.command.kill()


def test_a_server_over_ranks_answers_together_and_ends_in_order(served: Served) -> None:
    questions = ["Who are you?", "What is your name?", "Say hello.", "Who are you? Who made you?"]
    answers = dict.fromkeys(questions, "")

    def ask(question: str) -> None:
        answers[question] = served.ask(question)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in questions[:2]:
        words = ("generate", "--model", "demo", "-p", question, "--max-tokens", "16", *GREEDY)
        assert answers[question].strip() == alone(*words).strip()
    seeded = {"temperature": 0.9, "seed": 3}
    assert served.ask("Say hello.", **seeded) == served.ask("Say hello.", **seeded)
    served.command.ranks[0].send_signal(signal.SIGTERM)
    assert served.ended() == [0, 0] and served.others == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_server_everywhere(served: Served, victim: int) -> None:
    served.ask("Who are you?")
    os.kill(served.command.ranks[victim].pid, signal.SIGKILL)
    codes = served.ended(60)
    assert codes[1 - victim] == 1
    said = served.others if victim == 0 else [line for line in served.lines if line.startswith("phi4_mlx: ")]
    assert len(said) == 1 and f"rank {victim}" in said[0]
    assert not any("the engine died" in line for line in served.lines)


def test_a_server_answers_under_adapters_by_name_by_tensor_parallel(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", seed=4)
    adapters = {name: write_adapter(model, tmp_path / "adapters" / name, n) for n, name in enumerate(("one", "two"))}
    given = ("--model", str(model), "--adapters", str(tmp_path / "adapters"), "--speculate", "lookup")
    server = Served(tmp_path, *given, "--parallel", "tensor")
    try:
        url = f"{server.url}/v1/completions"
        for name in (None, *adapters, "one"):
            body = {"model": name or "model", "prompt": "one two three one two", "max_tokens": 16, "temperature": 0}
            reply = httpx.post(url, json=body | {"logprobs": 2}, timeout=HANG_S).json()["choices"][0]
            adapter = () if name is None else ("--adapter-path", adapters[name])
            words = ("--model", str(model), "--ignore-chat-template", "-p", body["prompt"], "--max-tokens", "16")
            assert reply["text"].strip() == alone("generate", *words, *adapter, *GREEDY).strip()
            assert all(len(top) in (2, 3) for top in reply["logprobs"]["top_logprobs"])
    finally:
        server.command.kill()


def test_prompts_of_a_file_are_answered_by_one_model_over_ranks(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(text)}\n" for text in ("Who are you?", "Say hello.", "What is new?")))
    words = ("generate", "--model", "demo", "--prompts", str(prompts), "--max-tokens", "12", "--output")
    over_ranks(tmp_path, *words, str(tmp_path / "ranks.jsonl"), "--parallel", "pipeline")
    alone(*words, str(tmp_path / "alone.jsonl"))
    assert (tmp_path / "ranks.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
