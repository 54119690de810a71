"""Two runs side by side: the documents of both, paired, with a test of their difference."""

from __future__ import annotations

from collections.abc import Mapping

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.paired import Paired, paired_test
from phi4_mlx.evaluation.result import Json, TaskResult, shown
from phi4_mlx.evaluation.run import Run
from phi4_mlx.evaluation.tables import markdown_table
from phi4_mlx.terminal.amount import amount


def compared(one: Run, other: Run) -> str:
    """Compares two runs as Markdown.

    Args:
        one: the first run.
        other: the second run.

    Returns:
        A table of the tasks of both, and what differs in their settings, documents and versions.

    Raises:
        RequestError: they have no task with documents in common.
    """
    rows, notes = [], _about(one, other)
    for name in [name for name in one.results if name in other.results]:
        first, second = one.results[name], other.results[name]
        notes += [f"{name}: {each}" for each in _differing(first.settings, second.settings)]
        if first.main.name != second.main.name:
            notes.append(f"{name} is left out: its metric is {first.main.name} in A and {second.main.name} in B")
            continue
        pair, left_out = _paired(first, second)
        notes += [f"{name}: {each}" for each in left_out]
        if pair is not None:
            rows.append([name, first.main.name, *_cells(pair)])
    for run, letter, names in ((one, "A", other.results), (other, "B", one.results)):
        if only := [name for name in run.results if name not in names]:
            notes.append(f"only in {letter}: {', '.join(only)}")
    if not rows:
        raise RequestError(f"the runs have no scored documents in common{'; ' if notes else ''}{'; '.join(notes)}")
    head = ["task", "metric", "A", "B", "B - A", "A higher", "B higher", "documents", "p", "test"]
    title = f"A is {one.model} ({one.fingerprint[:8]}), B is {other.model} ({other.fingerprint[:8]})."
    about = (
        "B - A has one standard error of the paired difference; p is two-sided, and not corrected for several tasks."
    )
    listed = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join(each for each in (title, markdown_table(head, rows), about, listed) if each) + "\n"


def _paired(first: TaskResult, second: TaskResult) -> tuple[Paired | None, list[str]]:
    """(the comparison on documents of both, None if there is none; what was left out)"""
    ours = {str(sample["id"]): sample for sample in first.samples}
    theirs = {str(sample["id"]): sample for sample in second.samples}
    both = [name for name in ours if name in theirs]
    notes = []
    if alone := len(ours) + len(theirs) - 2 * len(both):
        notes.append(f"{amount(alone, 'document')} of one run only left out")
    other = [name for name in both if ours[name].get("document") != theirs[name].get("document")]
    if other:
        notes.append(
            f"{amount(len(other), 'document')} of other content under the same id left out, such as {other[0]}"
        )
    kept = [name for name in both if name not in set(other)]
    pairs = [(ours[name].get("score"), theirs[name].get("score")) for name in kept]
    scored = [(float(one), float(two)) for one, two in pairs if one is not None and two is not None]
    if len(scored) < len(pairs):
        notes.append(f"{amount(len(pairs) - len(scored), 'document')} without a score left out")
    if not scored:
        return None, notes
    return paired_test([one for one, _ in scored], [two for _, two in scored]), notes


def _cells(pair: Paired) -> list[str]:
    error = "" if pair.stderr is None else f" ± {pair.stderr:.4f}"
    means = [f"{pair.first:.4f}", f"{pair.second:.4f}", f"{pair.difference:+.4f}{error}"]
    p_value = f"{pair.p_value:.2g}" if pair.p_value >= 1e-4 else f"{pair.p_value:.0e}"
    return [*means, f"{pair.wins:,}", f"{pair.losses:,}", f"{pair.count:,}", p_value, pair.test]


def _about(one: Run, other: Run) -> list[str]:
    """Differences between the runs as wholes."""
    same = ["A and B are the same model"] if one.fingerprint == other.fingerprint else []
    return same + [f"versions: {each}" for each in _differing(one.versions, other.versions)]


def _differing(first: Mapping[str, Json], second: Mapping[str, Json]) -> list[str]:
    """Settings that are not the same."""
    return [
        f"{name} is {shown(first.get(name))} in A and {shown(second.get(name))} in B"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
