"""`generate --prompts`: answers as alone, options that work and those that do not, stops, and bad prompts."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.commands import generate
from phi4_mlx.commands.prompts.run import PromptRun
from phi4_mlx.generation import answer_batch
from phi4_mlx.generation.answer_batch import AnswerBatch
from phi4_mlx.models.model import LanguageModel
from tests.conftest import TinyCheckpoint, write_tiny_checkpoint
from tests.kinds import WRITERS

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(write(folder / kind)) for kind, write in WRITERS.items()}


@pytest.fixture
def run(tmp_path: Path, models: dict[str, str]) -> Run:
    def runs(lines: list[Any], *options: str, code: int = 0, out: str = "out.jsonl", kind: str = "phi3") -> Any:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["--model", models[kind], "--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / out)]
        assert generate.main([*command, *options]) == code
        return [json.loads(line) for line in (tmp_path / out).read_text().split("\n")[:-1]] if not code else []

    return runs


def texts(count: int) -> list[str]:
    draw = random.Random(count)
    return ["".join(draw.choices("abcdefgh ", k=draw.randrange(1, 60))) + "x" for _ in range(count)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "options", [["--seed", "3", "--temp", "1.5", "--top-p", "0.9"], ["--temp", "0"]], ids=["seed", "greedy"]
)
def test_each_answer_is_that_of_its_prompt_alone(
    run: Run, models: dict[str, str], kind: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, draw = texts(5), random.Random(5)
    lines = [{"prompt": each, "max_tokens": draw.randrange(1, 12), "seed": n} for n, each in enumerate(prompts)]
    for line in lines[::2]:
        del line["seed"]
    common = ["--ignore-chat-template", *options]
    found = run(lines, *common, kind=kind)
    assert [each["line"] for each in found] == [1, 2, 3, 4, 5]
    for line, answer in zip(lines, found, strict=True):
        capsys.readouterr()
        seed = ["--seed", str(line["seed"])] if "seed" in line else []
        own = ["--max-tokens", str(line["max_tokens"]), *common, *seed]
        assert generate.main(["--model", models[kind], "-p", str(line["prompt"]), *own]) == 0
        assert capsys.readouterr().out == answer["text"] + "\n"


def test_more_prompts_than_rows_are_answered_as_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": text, "max_tokens": 1 + n % 4} for n, text in enumerate(texts(11))]
    options = ["--seed", "1", "--temp", "1"]
    one = run(lines, *options, out="one")
    monkeypatch.setattr(answer_batch, "MAX_ROWS", 3)
    assert run(lines, *options, out="other") == one


def test_quantised_keys_and_values_answer_as_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_checkpoint(tmp_path / "wide", hidden_size=192)  # heads of 32 numbers, as kv_bits needs
    lines, options = texts(4), ["--model", str(model), "--kv-bits", "4", "--max-tokens", "6"]
    found = run(lines, *options)
    for line, answer in zip(lines, found, strict=True):
        capsys.readouterr()
        assert generate.main(["-p", line, *options]) == 0
        assert capsys.readouterr().out == answer["text"] + "\n"
    run(lines, *options[:2], "--max-tokens", "6", code=2)
    assert "--kv-bits 4, not none" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_draws_nothing_twice(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": text, "max_tokens": 1 + n % 4, "id": n} for n, text in enumerate(texts(8))]
    options = ["--seed", "1", "--temp", "1"]
    whole = run(lines, *options, out="whole")
    taken: list[str] = []
    take = PromptRun.take

    def stopping(self: PromptRun, request: Any, answer: Any) -> None:
        if len(taken) in (2, 5):
            taken.append("stopped")
            raise KeyboardInterrupt
        taken.append(request.key)
        take(self, request, answer)

    monkeypatch.setattr(PromptRun, "take", stopping)
    capsys.readouterr()
    run(lines, *options, code=130)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"stopped; 2 of 8 answers are kept in .*out\.jsonl and out\.jsonl\.run, and the same command goes on", line
    )
    run(lines, *options, code=130)
    assert run(lines, *options) == whole
    assert sorted(each for each in taken if each != "stopped") == [*"01234567"]


def test_a_system_prompt_stands_before_prompts_without_one(run: Run, models: dict[str, str]) -> None:
    ask = {"role": "user", "content": "Hi"}
    own = {"role": "system", "content": "Be brief"}
    lines = ["Hi", {"messages": [ask]}, {"messages": [own, ask]}]
    without = [each["prompt_tokens"] for each in run(lines, "--max-tokens", "1", out="without")]
    with_one = [
        each["prompt_tokens"] for each in run(lines, "--max-tokens", "1", "--system-prompt", "Be brief", out="with")
    ]
    assert without[0] == without[1] < without[2] == with_one[0] == with_one[1] == with_one[2]


def test_a_schema_holds_for_every_answer(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    found = run(texts(3), "--schema", str(tmp_path / "s.json"), "--max-tokens", "30")
    assert all(isinstance(json.loads(each["text"])["a"], int) for each in found)


def test_calls_of_tools_are_apart(run: Run) -> None:
    tools = [{"name": "add", "parameters": {"a": {"type": "int"}}}]
    (answer,) = run([{"messages": [{"role": "user", "content": "Hi"}], "tools": tools}], "--max-tokens", "2")
    assert answer["tool_calls"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "Hi"], "--prompt does not work with --prompts"),
        (["--image", "x.png"], "--image does not work with --prompts"),
        (["--audio", "x.wav"], "--audio does not work with --prompts"),
        (["--max-kv-size", "512"], "--max-kv-size does not work with --prompts"),
        (["--draft-model", "x"], "--draft-model does not work with --prompts"),
        (["--speculate", "lookup"], "--speculate does not work with --prompts"),
        (["--prompt-cache-file", "x"], "--prompt-cache-file does not work with --prompts"),
        (["--verbose"], "--verbose does not work with --prompts"),
        (["--schema", "x", "--stop", "y"], "--stop may end an answer before it obeys the schema"),
    ],
)
def test_options_of_one_answer_are_refused_by_name(
    run: Run, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["Hi"], *options, code=2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("options", [["--prompts", "x"], ["--output", "x", "-p", "Hi"]])
def test_prompts_and_output_come_together(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(options) == 2
    err = capsys.readouterr().err
    assert "--prompts" in err and "--output" in err and err.count("\n") == 1


@pytest.mark.parametrize(("prompts", "output"), [("p.jsonl", "./p.jsonl"), ("p.jsonl.run", "p.jsonl")])
def test_prompts_are_not_written_over(
    tmp_path: Path, prompts: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(prompts).write_text('"Hi"\n"Ho"')
    assert generate.main(["--model", "demo", "--prompts", prompts, "--output", output]) == 2
    err = capsys.readouterr().err
    assert f"--output {output} would be written over the prompts" in err and err.count("\n") == 1
    assert Path(prompts).read_text() == '"Hi"\n"Ho"' and len([*tmp_path.iterdir()]) == 1


def test_the_command_loads_nothing_of_files_of_prompts_where_none_is_given() -> None:
    code = (
        "import sys; from phi4_mlx.commands import generate; generate.main(['--stop']);"
        "print([name for name in sys.modules if name.startswith('phi4_mlx.commands.prompts')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("x" * 3000, [], "the prompt has 3,0.* tokens, and the context of 1,024 leaves no room"),
        ({"messages": [{"role": "user", "content": "a"}]}, ["--ignore-chat-template"], "messages need the chat format"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [3]}, [], "tool"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_before_the_first_answer(
    run: Run, tmp_path: Path, line: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["Hi", line, line], *options, code=2)
    err = capsys.readouterr().err
    assert f"{tmp_path / 'p.jsonl'}:2: " in err and "(1 more bad line: 3)" in err and err.count("\n") == 1
    assert re.search(message, err)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_failed_answer_names_its_line_and_keeps_the_others(
    run: Run,
    tmp_path: Path,
    tiny_checkpoint: TinyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from phi4_mlx.errors import CheckpointError

    step = AnswerBatch.step

    def failing(self: AnswerBatch) -> Any:
        return [(request, CheckpointError("NaN") if request.key == "2" else answer) for request, answer in step(self)]

    monkeypatch.setattr(AnswerBatch, "step", failing)
    run([{"prompt": "abc", "max_tokens": n + 1} for n in range(4)], code=2)
    err = capsys.readouterr().err.splitlines()
    assert "stopped; 2 of 4 answers are kept" in err[-2] and err[-1].endswith(f"{tmp_path / 'p.jsonl'}:3: NaN")


def test_the_same_beginning_is_run_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "".join(random.Random(2).choices("abcdefgh ", k=700))
    seen: list[int] = []
    from phi4_mlx.models.text import Model

    hidden = Model.hidden

    def counted(self: LanguageModel, ids: Any, *args: Any, **options: Any) -> Any:
        seen.append(ids.size)
        return hidden(self, ids, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "hidden", counted)
    found = run([f"{shared}{n}" for n in range(6)], "--max-tokens", "2")
    assert sum(seen) < 1.3 * max(each["prompt_tokens"] for each in found)


def test_another_prompts_file_or_model_under_the_same_output_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["Hi"], "--max-tokens", "1")
    capsys.readouterr()
    for lines, options, kind, what in (
        (["Ho"], [], "phi3", "--prompts"), (["Hi"], ["--stop", "x"], "phi3", "--stop none, not 'x'"),
        (["Hi"], [], "phi4flash", "--model"),
    ):  # fmt: skip
        run(lines, "--max-tokens", "1", *options, code=2, kind=kind)
        err = capsys.readouterr().err
        assert what in err and "name another --output" in err and err.count("\n") == 1
