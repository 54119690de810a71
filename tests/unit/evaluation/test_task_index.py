"""lm-eval's tasks by name: the same names as its own index, without the seconds that takes."""

from __future__ import annotations

import pytest

from phi4_mlx.evaluation.task_index import known_tasks


@pytest.mark.slow
def test_every_name_of_lm_eval_is_known_with_its_file() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    expected = TaskManager().task_index
    found = known_tasks()
    assert expected.keys() <= found.keys() and len(found) - len(expected) < 10
    for name, entry in expected.items():
        assert found[name].path == entry.yaml_path, name
        assert (found[name].kind == "group") == (entry.kind is Kind.GROUP), name
