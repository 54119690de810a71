"""A text cached once for the questions of other processes, and a conversation that another chat continues."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from phi4_mlx import load, load_prompt_cache
from phi4_mlx.terminal.amount import size
from tests.conftest import ROOT

TEXT = "Order of the 3rd of May. Ada wants 4 lamps at 25 each. " * 12
QUESTIONS = ("what is 12 * 31?", "hello", "\nwhat are you?")


def run(command: str, *arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", command, *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        cwd="/",
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    return done


def prefilled(done: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """(tokens from the cache, tokens of the prompt that were prefilled)"""
    found = re.search(r"(?:(\d+) cached tokens; )?prompt (\d+) tokens", done.stderr)
    assert found, done.stderr
    return int(found[1] or 0), int(found[2])


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cached") / "text.cache"
    options = ["--model", "demo", "--prompt-cache-file", str(file), "--system-prompt", "Be brief."]
    printed = run("cache-prompt", *options, stdin=TEXT + "\n").stdout
    model, tokenizer = load("demo")
    ids = load_prompt_cache(file, model, tokenizer).ids[0].tolist()
    assert printed == f"{file}: {len(ids)} tokens, {size(file.stat().st_size)}\n"
    for question in ("hello", "are 1 and 2 numbers?"):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{TEXT}\n\n{question}"}]
        assert tokenizer.apply_chat_template(messages)[: len(ids)] == ids
    assert run("cache-prompt", *options, "--prompt", TEXT).stdout == printed
    return file


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_many_questions_on_a_cached_text(cached: Path, question: str) -> None:
    options = ["--model", "demo", "--max-tokens", "30", "--verbose"]
    warm = run("generate", *options, "--prompt-cache-file", str(cached), "--prompt", question)
    whole = f"{TEXT}\n\n{question}"
    cold = run("generate", *options, "--system-prompt", "Be brief.", "--prompt", whole)
    assert warm.stdout == cold.stdout
    before, new = prefilled(warm)
    assert before + new == prefilled(cold)[1]
    _, tokenizer = load("demo")
    asked = len(tokenizer.encode(question))
    assert new <= asked + 3  # end marker, start of the answer, and at most one token that merges with the text


def test_in_fewer_bits(tmp_path: Path, cached: Path) -> None:
    file = tmp_path / "text.cache"
    run("cache-prompt", "--model", "demo", "--prompt-cache-file", str(file), "--kv-bits", "4", stdin=TEXT)
    assert file.stat().st_size < cached.stat().st_size / 4
    done = run("generate", "--model", "demo", "--verbose", "--prompt-cache-file", str(file), "--prompt", "hi")
    assert done.stdout.strip() and prefilled(done)[1] < 5


def test_what_does_not_fit_is_one_line(tmp_path: Path, cached: Path) -> None:
    ask = ["generate", "--model", "demo", "--prompt", "hi", "--prompt-cache-file"]
    assert "No such file" in run(*ask, str(tmp_path / "none"), code=2).stderr
    damaged = bytearray(cached.read_bytes())
    damaged[-5000] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    assert "is damaged: its checksum is wrong; make one with" in run(*ask, str(tmp_path / "damaged"), code=2).stderr
    demo = ROOT / "phi4_mlx" / "demo"
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in demo.iterdir():
        if file.is_file():
            (changed / file.name).write_bytes(file.read_bytes())
    config = (demo / "config.json").read_text()
    epsilon = re.search(r'"rms_norm_eps": ([^,\n]+)', config)
    assert epsilon
    (changed / "config.json").write_text(config.replace(epsilon[0], '"rms_norm_eps": 1e-3'))
    other = [each if each != "demo" else str(changed) for each in ask]
    assert "was made with another model, and fits no other" in run(*other, str(cached), code=2).stderr
    for option in ("--system-prompt=x", "--ignore-chat-template", "--kv-bits=8", "--max-kv-size=512"):
        line = run(*ask, str(cached), option, code=2).stderr
        assert f"{option.partition('=')[0]} is fixed by the file of --prompt-cache-file" in line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", "x"], "--prompt-cache-file"),
        (["--prompt", " ", "--prompt-cache-file", "x"], "the prompt is empty"),
        (["--prompt", "x", "--prompt-cache-file", "/no/such/x"], "/no/such/x cannot be written"),
        (["--prompt", "x", "--prompt-cache-file", "/"], "/ cannot be written"),
        (["--prompt", "x", "--prompt-cache-file", "x", "--kv-bits", "5"], "--kv-bits"),
        (["--prompt", "word " * 5000, "--prompt-cache-file", "x"], "the context holds 4096"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], complaint: str) -> None:
    assert complaint in run("cache-prompt", "--model", "demo", *arguments, code=2).stderr


def test_a_chat_continues_the_conversation_of_another(tmp_path: Path) -> None:
    def chat() -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "phi4_mlx.chat", "--model", "demo", "--temp", "0"],
            cwd=str(tmp_path),
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path), "TERM": "xterm"}
            | {"HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1", "COLUMNS": "200"},
            dimensions=(40, 200),
            encoding="utf-8",
            timeout=60,
        )
        child.delaybeforesend = 0.1
        child.expect_exact("Ctrl-D leaves")
        return child

    def last_prompt(child: pexpect.spawn, question: str) -> tuple[int, int]:
        child.send(f"{question}\r")
        child.send("/stats\r")
        child.expect(r"last prompt +([\d,]+) tokens: ([\d,]+) from the cache")
        assert child.match
        whole, cached = (int(child.match[n].replace(",", "")) for n in (1, 2))
        child.expect_exact("RoPE table")
        return whole, whole - cached

    first = chat()
    for question in ("hello", "my name is Ada", "what are you?"):
        last_prompt(first, question)
    first.send("/save talk\r")
    first.expect_exact("its prompt cache to talk.cache.safetensors")
    whole, new = last_prompt(first, "what is my name?")
    first.send("\x04")
    first.expect(pexpect.EOF)

    second = chat()
    second.send("/load talk\r")
    second.expect(r"loaded 3 turns .*, with the prompt cache of (\d+) tokens")
    assert last_prompt(second, "what is my name?") == (whole, new) and new < 15
    second.send("\x04")
    second.expect(pexpect.EOF)
