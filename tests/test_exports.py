"""The public API: a sorted list, imported lazily, nothing hidden behind a module of the same name."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import phi4_mlx
from tests.conftest import ROOT

# Names that other programs use. One may be added; none may go.
PROMISED = {
    "finetune",
    "generate",
    "generate_step",
    "load",
    "make_logits_processors",
    "make_sampler",
    "run_tools",
    "stream_generate",
    "CheckpointError",
    "ConfigError",
    "ModelConfig",
    "Phi4Error",
    "RequestError",
    "TokenizerError",
}


def test_the_list_is_sorted_and_has_no_doubles() -> None:
    assert list(phi4_mlx.__all__) == sorted(set(phi4_mlx.__all__))


def test_every_promised_name_is_there() -> None:
    assert set(phi4_mlx.__all__) >= PROMISED


@pytest.mark.parametrize("name", sorted(phi4_mlx.__all__))
def test_every_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    thing = getattr(phi4_mlx, name)
    assert not inspect.ismodule(thing), f"phi4_mlx.{name} is a module"
    assert inspect.getdoc(thing), f"phi4_mlx.{name} has no docstring"


def test_dir_lists_the_api_and_other_names_fail_as_usual() -> None:
    assert set(dir(phi4_mlx)) >= set(phi4_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        phi4_mlx.generat  # noqa: B018


def test_no_submodule_bears_the_name_of_a_public_function() -> None:
    """Once imported, a module hides the function: so `convert` is `phi4_mlx.convert.package.convert`."""
    submodules = {module.name for module in pkgutil.iter_modules(phi4_mlx.__path__)}
    assert not submodules & set(phi4_mlx.__all__)


def test_names_are_imported_only_when_asked_for() -> None:
    code = "import phi4_mlx, sys; print(*[m for m in sys.modules if m.startswith('phi4_mlx.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
