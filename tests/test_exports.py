"""The public API: a sorted list, imported lazily, no name shadowed by a submodule."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import phi4_mlx
from tests.conftest import ROOT

# Names that other programs use: add to them, never remove one.
PROMISED = {
    "finetune",
    "generate",
    "generate_step",
    "image_tokens",
    "load",
    "make_logits_processors",
    "make_sampler",
    "read_audio",
    "read_image",
    "run_tools",
    "stream_generate",
    "CheckpointError",
    "ConfigError",
    "ModelConfig",
    "Phi4Error",
    "RequestError",
    "TokenizerError",
}


def test_the_list_is_sorted_without_duplicates() -> None:
    assert list(phi4_mlx.__all__) == sorted(set(phi4_mlx.__all__))


def test_every_promised_name_is_exported() -> None:
    assert set(phi4_mlx.__all__) >= PROMISED


@pytest.mark.parametrize("name", sorted(phi4_mlx.__all__))
def test_every_name_can_be_imported_and_has_a_docstring(name: str) -> None:
    thing = getattr(phi4_mlx, name)
    assert not inspect.ismodule(thing), f"phi4_mlx.{name} is a module"
    assert inspect.getdoc(thing), f"phi4_mlx.{name} has no docstring"


def test_dir_lists_the_api_and_unknown_names_raise() -> None:
    assert set(dir(phi4_mlx)) >= set(phi4_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        phi4_mlx.generat  # noqa: B018


def test_the_version_is_there_without_an_installation() -> None:
    code = "import phi4_mlx, sys; print(phi4_mlx.__version__, *[m for m in sys.modules if m.startswith('phi4_mlx.')])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr  # -S: without site-packages
    assert done.stdout.split() == [phi4_mlx.__version__, "phi4_mlx.terminal", "phi4_mlx.terminal.version"]
    assert "__version__" in dir(phi4_mlx)


def test_no_submodule_has_the_name_of_a_public_function() -> None:
    """An imported submodule would hide the function; so `convert` is `phi4_mlx.convert.package.convert`."""
    submodules = {module.name for module in pkgutil.iter_modules(phi4_mlx.__path__)}
    assert not submodules & set(phi4_mlx.__all__)


def test_names_are_imported_on_first_use() -> None:
    code = "import phi4_mlx, sys; print(*[m for m in sys.modules if m.startswith('phi4_mlx.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
