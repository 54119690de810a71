"""The suite: its figures, its rows on small data in the public formats, its tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.lm_tasks import check_task_names
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.pictures import draw_run
from phi4_mlx.evaluation.result import TaskResult, mean
from phi4_mlx.evaluation.run import Job, Run, load_jobs, read_run, run_job, suite_jobs
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.evaluation.suite import Row, load_suite
from phi4_mlx.evaluation.tables import overall, run_markdown
from phi4_mlx.evaluation.tasks import OWN
from phi4_mlx.terminal.options import advised

SUITE = load_suite("phi-4-mini")
ADVISED = advised("phi4-mini-reasoning")
# Rows of many tasks of one kind: a few of them stand for all.
PARTS = {
    "mmlu": ["mmlu_anatomy"],
    "mmmlu": ["mmmlu_de_de_anatomy", "mmmlu_sw_ke_virology"],
    "mmlu_pro": ["mmlu_pro_biology", "mmlu_pro_computer_science"],
    "bbh_cot_zeroshot": ["bbh_cot_zeroshot_navigate", "bbh_cot_zeroshot_word_sorting"],
}


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    yield load_subject("demo")


def test_the_published_figures_are_those_of_the_cards() -> None:
    """Sums of columns, and the cards' own statements, guard against a digit that slips."""
    article, reasoning = SUITE.sections
    sums = {column: round(sum(row.published[column] for row in article.rows), 1) for column in article.columns}
    assert sums == {
        "Phi-4-mini": 1111.0, "Phi-3.5-mini": 1071.5, "Llama-3.2-3B": 958.9, "Qwen2.5-3B": 1050.4,
        "Qwen2.5-7B": 1190.0, "Gemma-2-9B": 1206.6,
    }  # fmt: skip
    assert len(article.rows) == 17 and article.overall["Phi-4-mini"] == 63.5
    assert {row.name: row.published["Phi-4-mini-reasoning"] for row in reasoning.rows} == {
        "AIME 2024": 57.5, "MATH-500": 94.6, "GPQA Diamond": 52.0,
    }  # fmt: skip
    assert [row.repeats for row in reasoning.rows] == [64, 8, 8]


def test_every_row_names_a_task_that_exists() -> None:
    names = [row.task for row in SUITE.rows]
    assert len(set(names)) == len(names) == 20
    check_task_names(names, [*OWN], SUITE.folder)


def test_a_row_is_sampled_where_the_authors_advise_it() -> None:
    greedy = {job.name: job.options for job in suite_jobs(SUITE, Options(limit=3, seed=5), {})}
    sampled = {job.name: job.options for job in suite_jobs(SUITE, Options(limit=3, seed=5), ADVISED)}
    assert (sampled["AIME 2024"].temp, sampled["AIME 2024"].top_p, sampled["AIME 2024"].repeats) == (0.8, 0.95, 64)
    assert sampled["AIME 2024"].max_tokens == 32768
    assert (greedy["AIME 2024"].temp, greedy["AIME 2024"].repeats) == (0, 1)
    assert sampled["GSM8K"] == greedy["GSM8K"] and greedy["GSM8K"].temp == 0 and greedy["GSM8K"].num_shots == 8
    assert all(each.limit == 3 and each.seed == 5 for each in greedy.values())
    assert suite_jobs(SUITE, Options(repeats=2), ADVISED)[-1].options.repeats == 2


@pytest.mark.slow
@pytest.mark.parametrize("row", SUITE.rows, ids=[row.name for row in SUITE.rows])
def test_a_row_runs_on_small_data_of_its_format(row: Row, subject: Subject, copies: Path, tmp_path: Path) -> None:
    jobs = suite_jobs(SUITE, Options(limit=2, data=copies, max_tokens=3, folder=tmp_path), {})
    (job,) = (job for job in jobs if job.name == row.name)
    for name in PARTS.get(job.task, [job.task]):
        part = Job(name, name, job.options, job.metric)
        tasks = load_jobs([part], skip=False).tasks.get(name, ())
        with Answers(tmp_path / "answers.jsonl") as answers:
            (result,) = run_job(part, tasks, subject, answers, tmp_path, None)
        assert result.main.count == len(result.samples) >= 1
        assert result.main.name == (job.metric or "answers")
        if "shots" in result.settings:
            assert result.settings["shots"] == [job.options.num_shots]
            assert result.settings["chat_template"] == job.options.apply_chat_template


def run_of(model: str, value: float, judge: str = "") -> Run:
    """A run of the suite whose every row has two documents with a mean score of `value` / 2."""
    results = {
        row.name: TaskResult(row.task, [mean("acc", [value, 0.0])], {}, [{"id": "0", "score": value}], row.differs)
        for row in SUITE.rows
    }
    arena = results["Arena Hard"]
    results["Arena Hard"] = replace(arena, groups={judge: [mean("wins", [1, 0, 1, 1])]} if judge else {})
    return Run(model, "f" * 32, {"suite": "phi-4-mini"}, {"mlx": "1"}, results)


def test_ours_stand_beside_the_published_figures() -> None:
    text = run_markdown([run_of("ours", 1.0, "judge demo"), run_of("theirs", 0.5)], SUITE)
    rows = text.partition("## Parts")[0].splitlines()
    table = {line.split(" | ")[0].strip("| "): line for line in rows if line.startswith("|")}
    ours, published = "50.0 ± 50.0 | 25.0 ± 25.0 |  | 2", "67.3 | 65.5 | 61.8 | 65.0 | 72.6 | 71.3"
    assert table["MMLU"] == f"| MMLU | 5-shot | {ours} | {published} |"
    assert "| exported | exported | 75.0 ± 25.0 | 2 | 32.8 |" in table["Arena Hard"]
    assert table["mean of 16 rows"].startswith("| mean of 16 rows |  | 50.0 ± 12.5 | 25.0 ± 6.2 |  | 32 | 67.4 |")
    assert "| 63.5 |" in table["overall, as published"] and "nearest public setting" in text
    assert all(f"- {row.name}: {row.differs}." in text for row in SUITE.rows)
    assert "57.5" in table["AIME 2024"]


def test_rows_without_data_are_named_and_have_no_part_in_the_mean() -> None:
    run = run_of("ours", 1.0)
    del run.results["GPQA"]
    run.missing["GPQA"] = "its data is not on this disk"
    text = run_markdown([run], SUITE)
    assert "mean of 15 rows" in text and "- GPQA: its data is not on this disk" in text
    found = overall(SUITE.sections[0].rows, run)
    assert found is not None and "GPQA" not in [row.name for row in found[1]]


@pytest.mark.parametrize(("offline", "loads", "words"), [
    (False, 1, ["gsm8k_cot: the data set", "the Hub does not answer", "HF_DATASETS_OFFLINE=1"]),
    (True, 3, ["gsm8k_cot: the data set", "HF_DATASETS_OFFLINE is set", "nor is there data for second, third"]),
])  # fmt: skip
def test_a_hub_that_does_not_answer_is_asked_once(
    offline: bool, loads: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    asked = []

    def load(self: TaskManager, names: list[str]) -> None:
        asked.append(names)
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectTimeout)")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(TaskManager, "load", load)
    jobs = [Job(name, "gsm8k_cot", Options()) for name in ("first", "second", "third")]
    with pytest.raises(RequestError) as raised:
        load_jobs(jobs, skip=True)
    assert len(asked) == loads
    assert all(part in str(raised.value) for part in words)


def test_pictures_of_a_suite(tmp_path: Path) -> None:
    from matplotlib.image import imread

    run = run_of("ours", 1.0)
    drawn = draw_run([run, run_of("theirs", 0.5)], SUITE, tmp_path)
    assert drawn == [tmp_path / "results.png", tmp_path / "results-reasoning.png"]
    for path in drawn:
        picture = imread(path)
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05


def test_a_picture_of_one_task_has_its_bar_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    drawn: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.extend(figure.axes))
    run = Run("demo", "0", {}, results={"even": TaskResult("even", [mean("acc", [1.0, 0.0])], {}, [])})
    draw_run([run], None, tmp_path)
    (bar,), (left, right) = drawn[0].patches, drawn[0].get_xlim()
    assert abs(bar.get_x() + bar.get_width() / 2 - (left + right) / 2) < 1e-9


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    run = run_of("ours", 1.0, "judge demo")
    run.write(tmp_path)
    assert read_run(tmp_path) == read_run(tmp_path / "results.json") == run
