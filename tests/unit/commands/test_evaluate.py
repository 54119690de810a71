"""`python -m phi4_mlx evaluate`: tasks from YAML and from copies of data sets, resumed runs, refusals, reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx import cli
from phi4_mlx.evaluation import harness
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.result import TaskResult

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    {split}: {file}
{split}_split: {split}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
Evaluate = Callable[..., str]


@pytest.fixture
def tasks(copies: Path, tmp_path: Path) -> Path:
    """A folder with a task of one's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Is {number} even?", "answer": number % 2} for number in range(6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "even.yaml").write_text(YAML.format(name="even", split="test", file=folder / "test.jsonl"))
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs the command on the demo; returns what it prints, or its one line where it exits with 2."""

    def run(*words: object, code: int = 0) -> str:
        given = ["evaluate", "--model", "demo", "--output-dir", str(tmp_path / "out"), *map(str, words)]
        found = cli.main(given)
        shown = capsys.readouterr()
        assert found == code, shown.err
        lines = [line for line in shown.err.splitlines() if "left" not in line or code]
        assert not code or len(lines) == 1, shown.err
        return shown.out if not code else lines[0]

    return run


def results(folder: Path) -> dict[str, TaskResult]:
    found = json.loads((folder / "results.json").read_text())["results"]
    return {name: TaskResult.from_json(value) for name, value in found.items()}


def test_a_task_of_ones_own(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    shown = evaluate("--tasks", "even", "--include-path", tasks)
    (result,) = results(tmp_path / "out").values()
    scores = [sample["score"] for sample in result.samples]
    assert result.main.name == "acc" and result.main.count == 6 and result.main.value == sum(scores) / 6
    for sample in result.samples:  # the likelier of the two is the answer
        (yes, _), (no, _) = sample["answer"]
        assert sample["score"] == ((no > yes) == sample["target"])
    value = json.loads((tmp_path / "out" / "results.json").read_text())
    assert value["model"] == "demo" and len(value["fingerprint"]) == 32
    assert value["versions"].keys() >= {"lm-eval", "mlx", "phi4-mlx"}
    assert (tmp_path / "out" / "results.md").read_text() + "\n" == shown
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000


def test_the_same_command_goes_on_without_asking_again(
    evaluate: Evaluate, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", "even", "--include-path", tasks)
    put, kept = Answers.put_all, []

    def stop(self: Answers, answers: dict[str, object]) -> None:
        put(self, dict(list(answers.items())[:5]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "put_all", stop)
        assert cli.main(["evaluate", "--model", "demo", "--output-dir", str(tmp_path / "out"), *map(str, words)]) == 130
    assert not results(tmp_path / "out")

    def count(self: Answers, answers: dict[str, object]) -> None:
        kept.extend(answers)
        put(self, answers)

    monkeypatch.setattr(Answers, "put_all", count)
    shown = evaluate(*words)
    assert len(kept) == 12 - 5
    assert evaluate(*words) == shown and len(kept) == 12 - 5


def test_a_stopped_run_keeps_the_results_of_the_run_before(
    evaluate: Evaluate, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", "even", "--include-path", tasks)
    evaluate(*words)
    before = results(tmp_path / "out")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phi4_mlx.evaluation.lm_run.run_lm_task", stop)
    assert cli.main(["evaluate", "--model", "demo", "--output-dir", str(tmp_path / "out"), *map(str, words)]) == 130
    assert results(tmp_path / "out") == before


def test_names_and_documents_are_checked_before_the_first_answer(
    evaluate: Evaluate, tasks: Path, tmp_path: Path
) -> None:
    (tasks / "other.yaml").write_text(YAML.format(name="other", split="test", file=tasks / "test.jsonl"))
    words = ("--tasks", "even", "other", "--include-path", tasks)
    samples = ("--samples", '{"even": [0], "other": [6]}')
    assert "document 6 of other, which has documents 0 to 5" in evaluate(*words, *samples, code=2)
    assert "no-such-model" in evaluate(*words, "--comparator", "no-such-model", code=2)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_at_the_end_is_told_with_the_way_out(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phi4_mlx.evaluation.pictures.draw_run", full)
    words = ["--model", "demo", "--tasks", "even", "--include-path", str(tasks), "--limit", "1"]
    assert cli.main(["evaluate", *words, "--output-dir", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path} cannot be written: No space left on device; make room" in last


def test_a_folder_of_other_settings_is_refused(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    words = ("--tasks", "even", "--include-path", tasks, "--limit", "1")
    evaluate(*words, "--num-shots", "50", code=2)  # leaves no answer, so the folder is free
    evaluate(*words)
    assert "limit 1, not 2; name another --output-dir" in evaluate(*words[:-1], "2", code=2)
    value = json.loads((tmp_path / "out" / "results.json").read_text())
    (tmp_path / "out" / "results.json").write_text(json.dumps({**value, "fingerprint": "0" * 32}))
    assert "has results of another model, demo" in evaluate(*words, code=2)
    (tmp_path / "out" / "results.json").write_text("{}")
    assert "is not a result of evaluate: it has no 'results'" in evaluate(*words, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to evaluate"),
        (("--tasks", "evn"), "'evn' is not a task; did you mean even?"),
        (("--tasks", "arc_chalenge"), "did you mean arc_challenge?"),
        (("--tasks", "zzzzqqqq"), "own tasks are arena-hard, bfcl"),
        (("--tasks", "even", "--suite", "phi-4-mini"), "not allowed with argument"),
        (("--suite", "phi4mini"), "'phi4mini' is not a suite; did you mean phi-4-mini?"),
        (("--tasks", "even", "--limit", "1", "--samples", "{}"), "both choose documents"),
        (("--tasks", "even", "--samples", '{"even": [6]}'), "document 6 of even, which has documents 0 to 5"),
        (("--tasks", "even", "--samples", '{"even": [-1]}'), "document -1 of even"),
        (("--tasks", "even", "--samples", '{"even": ['), "is not JSON"),
        (("--tasks", "even", "--samples", '{"even": [true]}'), "must map tasks to lists of ids"),
        (("--tasks", "even", "--num-shots", "50"), "even has fewer solved examples than --num-shots 50"),
        (("--tasks", "even.yaml"), "name the task in that file, and its folder with --include-path"),
        (("--tasks", "even", "--data", "/nowhere"), "--data /nowhere does not exist"),
        (("--tasks", "arc_easy", "--data", "EMPTY"), "the data set allenai/ai2_arc (ARC-Easy) is not on this disk"),
    ],
)
def test_a_mistake_is_one_line(
    evaluate: Evaluate,
    tasks: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = [str(tasks) if word == "EMPTY" else word for word in words]
    include = () if "phi4mini" in words else ("--include-path", tasks)
    assert message in evaluate(*given, *include, code=2)
    assert not (tmp_path / "out" / "answers").exists() or message.startswith(("document", "even"))


def test_a_task_without_a_test_split_is_one_line(evaluate: Evaluate, tasks: Path) -> None:
    (tasks / "even.yaml").write_text(YAML.format(name="even", split="training", file=tasks / "test.jsonl"))
    assert "has no test split" in evaluate("--tasks", "even", "--include-path", tasks, code=2)
    named = YAML.format(name="even", split="test", file=tasks / "test.jsonl").replace("    test:", "    train:")
    (tasks / "even.yaml").write_text(named)
    assert "no split 'test'" in evaluate("--tasks", "even", "--include-path", tasks, code=2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("metric: acc", "metric: acca", "even has the metric 'acca', which lm-eval does not know; did you mean acc"),
        ("test.jsonl", "none.jsonl", "even: its data cannot be read: Unable to find"),
        ("test.jsonl", "empty.jsonl", "even: its data has no documents"),
        ("test.jsonl", "broken.jsonl", "even: its data cannot be read"),
        ("{{question}}", "{{nothing.at.all}}", "'nothing' is undefined"),
        ("output_type: multiple_choice", "output_type: essay", "Got invalid output_type 'essay'"),
    ],
)
def test_a_mistake_in_a_task_is_one_line(
    evaluate: Evaluate, tasks: Path, before: str, after: str, message: str
) -> None:
    (tasks / "empty.jsonl").write_text("")
    (tasks / "broken.jsonl").write_text('{"question": ')
    path = tasks / "even.yaml"
    path.write_text(path.read_text().replace(before, after))
    assert message in evaluate("--tasks", "even", "--include-path", tasks, code=2)


def test_errors_of_metrics_that_are_no_mean_are_bootstrapped_here(
    evaluate: Evaluate, tasks: Path, tmp_path: Path
) -> None:
    path = tasks / "even.yaml"
    path.write_text(path.read_text() + "  - metric: f1\n  - metric: mcc\n")
    assert "bootstrapping" not in evaluate("--tasks", "even", "--include-path", tasks)
    stderr = {metric.name: metric.stderr for metric in results(tmp_path / "out")["even"].metrics}
    assert stderr["f1"] is not None and stderr["f1"] > 0


def test_a_broken_yaml_is_named(evaluate: Evaluate, tasks: Path) -> None:
    (tasks / "even.yaml").write_text("task: even\n  bad: [")
    assert f"{tasks / 'even.yaml'} cannot be read" in evaluate("--tasks", "even", "--include-path", tasks, code=2)


def test_code_that_a_model_wrote_runs_only_with_consent(evaluate: Evaluate, tasks: Path) -> None:
    path = tasks / "even.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    words = ("--tasks", "even", "--include-path", tasks)
    assert "--confirm-run-unsafe-code allows it" in evaluate(*words, code=2)
    evaluate(*words, "--confirm-run-unsafe-code")


def test_samples_are_the_documents_asked_for(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text('{"even": [4, 1]}')
    evaluate("--tasks", "even", "--include-path", tasks, "--samples", tmp_path / "ids.json")
    (result,) = results(tmp_path / "out").values()
    assert [sample["id"] for sample in result.samples] == ["even/1", "even/4"]
    assert [sample["target"] for sample in result.samples] == [1, 0]
    alone = results(tmp_path / "out")["even"].samples
    evaluate("--tasks", "even", "--include-path", tasks, "--output-dir", tmp_path / "all")
    whole = results(tmp_path / "all")["even"].samples
    assert alone == [whole[1], whole[4]]


def test_repeats_are_draws_whose_mean_is_the_score(
    evaluate: Evaluate, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    ask = harness.ask
    monkeypatch.setattr(harness, "ask", lambda *given: asked.extend(given[1]) or ask(*given))
    folder = Path(harness.__file__).parent / "suites" / "phi-4-mini"
    words = ("--tasks", "phi-4-mini_math500", "--include-path", folder, "--data", copies, "--max-tokens", "3")
    words += ("--num-shots", "1", "--samples", '{"phi-4-mini_math500": [3, 1]}')
    evaluate(*words, "--temp", "0.8", "--top-p", "0.9", "--repeats", "3")
    assert len({repr(each.prompt) for each in asked}) == 2  # with the same example in each draw
    assert [(each.seed, each.temp, each.top_p, each.max_tokens) for each in asked] == [
        (seed, 0.8, 0.9, 3) for seed in (0, 0, 1, 1, 2, 2)
    ]
    (result,) = results(tmp_path / "out").values()
    assert [sample["id"] for sample in result.samples] == ["phi-4-mini_math500/1", "phi-4-mini_math500/3"]
    for sample in result.samples:
        assert len(sample["draws"]) == len(sample["answer"]) == 3
        assert sample["score"] == pytest.approx(sum(sample["draws"]) / 3)
    assert result.settings["draws"] == 3
    assert [each.name for each in result.metrics] == ["exact_match, mean of 3", "standard error of the draws alone"]


def test_a_changed_copy_of_a_data_set_is_read_again(evaluate: Evaluate, copies: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(copies / "allenai", copy / "allenai")
    words = ("--tasks", "arc_challenge", "--data", copy, "--limit", "1")
    evaluate(*words)
    (before,) = results(tmp_path / "out").values()
    for path in copy.rglob("test.jsonl"):
        path.write_text(path.read_text().replace("Box", "Crate"))
    evaluate(*words)
    (after,) = results(tmp_path / "out").values()
    assert before.samples[0]["document"] != after.samples[0]["document"]


WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list: [{{metric: {metric}}}]
"""
GROUP = "group: both\ntask: [even, written]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


@pytest.mark.slow
def test_a_group_of_scored_and_written_tasks(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    (tasks / "written.yaml").write_text(WRITTEN.format(file=tasks / "test.jsonl", metric="exact_match"))
    (tasks / "both.yaml").write_text(GROUP)
    evaluate("--tasks", "both", "--include-path", tasks)
    (result,) = results(tmp_path / "out").values()
    assert ["tokens" in sample for sample in result.samples] == [False] * 6 + [True] * 6
    assert {metric.name: metric.count for metric in result.metrics}["tokens of an answer"] == 6


def test_repeats_of_a_metric_without_scores_of_documents(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    (tasks / "written.yaml").write_text(WRITTEN.format(file=tasks / "test.jsonl", metric="bleu"))
    evaluate("--tasks", "written", "--include-path", tasks, "--temp", "1", "--repeats", "2")
    (result,) = results(tmp_path / "out").values()
    assert result.main.name == "bleu, mean of 2" and result.main.count == 6
    assert all(sample["score"] is None and len(sample["answer"]) == 2 for sample in result.samples)


@pytest.mark.parametrize("task", ["languages", "long-context"])
def test_a_language_that_is_not_there_is_refused_before_a_model_loads(evaluate: Evaluate, task: str) -> None:
    assert "'xx'" in evaluate("--tasks", task, "--languages", "xx", "--model", "no-such-model", code=2)


@pytest.mark.slow
def test_pages_of_a_comparator_are_in_its_own_folder(evaluate: Evaluate, tmp_path: Path) -> None:
    words = ("--tasks", "languages", "--languages", "de", "--limit", "1", "--max-tokens", "2")
    evaluate(*words, "--comparator", "demo")
    for folder in (tmp_path / "out", tmp_path / "out" / "comparators" / "demo"):
        assert (folder / "languages.md").exists()


def test_two_runs_side_by_side(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    words = ("--tasks", "even", "--include-path", tasks)
    evaluate(*words)
    evaluate(*words, "--limit", "4", "--seed", "3", "--output-dir", tmp_path / "other")
    shown = evaluate("--report", tmp_path / "out", tmp_path / "other" / "results.json")
    row = next(line for line in shown.splitlines() if line.startswith("| even"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "even" and cells[2] == cells[3] and cells[7:9] == ["4", "1"]
    assert "seed is 0 in A and 3 in B" in shown and "2 documents of one run only left out" in shown
    assert "the same model" in shown
    assert "is not JSON" in evaluate("--report", tmp_path / "out", tasks / "even.yaml", code=2)


def test_options_without_effect_are_named(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "even", "--include-path", str(tasks), "--output-dir", str(tmp_path / "out"), "--judge", "demo"]
    idle = ["--lengths", "256", "--languages", "de", "--categories", "simple_python"]
    idle += ["--repeats", "3", "--temp", "0", "--max-tokens", "9"]
    assert cli.main(["evaluate", "--model", "demo", *words, *idle]) == 0
    shown = capsys.readouterr().err
    for option in ("--lengths", "--languages", "--repeats", "--judge", "--categories", "--temp", "--max-tokens"):
        assert f"{option} has no effect" in shown


def test_a_report_names_the_options_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = cli.main(["evaluate", "--report", str(tmp_path), str(tmp_path), "--limit", "3", "--comparator", "demo"])
    told = capsys.readouterr().err
    assert shown == 2 and "--limit and --comparator have no effect with --report" in told


def test_a_comparator_is_asked_the_same_and_has_a_column(evaluate: Evaluate, tasks: Path, tmp_path: Path) -> None:
    words = ("--tasks", "even", "--include-path", tasks)
    evaluate(*words)
    shown = evaluate(*words, "--comparator", "demo")  # through mlx-lm's code, with its fingerprint
    (row,) = (line for line in shown.splitlines() if line.startswith("| even"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == cells[3] != ""
    ours, theirs = results(tmp_path / "out")["even"], results(tmp_path / "out" / "comparators" / "demo")["even"]
    assert [sample["document"] for sample in ours.samples] == [sample["document"] for sample in theirs.samples]
