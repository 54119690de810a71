"""The content of the wheel and the sdist: the converter inside the package, the embedded model, the type marker."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from phi4_mlx.files.embedded import EMBEDDED
from tests.conftest import ROOT

SOURCES = ("phi4_mlx", "convert", "tests", "examples")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    backend = "from setuptools import build_meta; import sys; build_meta.{}(sys.argv[1])"
    run([sys.executable, "-c", backend.format("build_sdist"), str(dist)], checkout)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(dist / "unpacked")
    (unpacked,) = (dist / "unpacked").iterdir()
    run([sys.executable, "-c", backend.format("build_wheel"), str(dist)], unpacked)
    return dist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_has_one_top_level_package(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"phi4_mlx"}
    converter = ("convert/__main__.py", "convert/package.py", "convert/calibration.jsonl")
    languages = ("evaluation/languages/texts.json", "evaluation/languages/tokens.json")
    languages += ("evaluation/long_context/languages/th.json",)
    suite = [f"evaluation/suites/phi-4-mini/{name}" for name in ("suite.yaml", "arc_challenge.yaml", "letters")]
    for name in ("py.typed", *converter, *languages, *suite, "models/text.py"):
        assert (installed / "phi4_mlx" / name).is_file(), name
    init = (installed / "phi4_mlx" / "convert" / "__init__.py").read_text()
    assert init == (ROOT / "convert" / "__init__.py").read_text()  # the real one, not the one for checkouts


@pytest.mark.parametrize("source", EMBEDDED.values(), ids=EMBEDDED)
def test_the_wheel_has_the_embedded_models_byte_for_byte(source: Path, installed: Path) -> None:
    target = installed / "phi4_mlx" / source.name
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("words", [["phi4_mlx.convert"], ["phi4_mlx.chat"], ["phi4_mlx", "generate"]])
def test_the_commands_run_from_the_wheel(words: list[str], installed: Path) -> None:
    where = run([sys.executable, "-c", "import phi4_mlx.convert as c; print(c.__path__)"], installed)
    assert str(installed) in where
    assert "usage:" in run([sys.executable, "-m", *words, "--help"], installed)


def test_the_sdist_can_be_developed(built: Path) -> None:
    """It has the `__init__.py` through which an editable install finds the converter, and the tests."""
    (unpacked,) = (built / "unpacked").iterdir()
    for name in ("phi4_mlx/convert/__init__.py", "convert/package.py", "tests/conftest.py", "Makefile", "LICENSE"):
        assert (unpacked / name).is_file(), name
    assert not list(unpacked.rglob("__pycache__"))
