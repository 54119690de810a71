"""Imports go up the design's table only: a row imports rows above it, never its own row or one below.

Late imports inside functions count, and so do imports for type checking.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

# One line a row, top first. A room is a folder or a file directly under phi4_mlx/.
ROWS = """
errors
files
terminal
config
hub
tools
tokens
data
adapters
models
grammar
checkpoint
checkpoint_share
fingerprint
ranks
convert
export
generation
agent transcription
lora server evaluation
doctor
chat commands bridge
cli
__main__
"""
ROW_OF = {room: row for row, line in enumerate(ROWS.split("\n")) for room in line.split()}


def sources(root: Path) -> dict[str, Path]:
    """Every module by its installed name; the converter's folder stands at the top of the checkout."""
    found = {}
    for folder, package in ((root / "phi4_mlx", "phi4_mlx"), (root / "convert", "phi4_mlx.convert")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if path != root / "phi4_mlx" / "convert" / "__init__.py":  # the signpost to the real folder
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = sources(ROOT)


def imports(source: str, module: str, is_package: bool, modules: Mapping[str, Path]) -> Iterator[str]:
    """The modules of this package that a source imports, early and late."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        yield from (name for name in names if name == "phi4_mlx" or name.startswith("phi4_mlx."))


def graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {
        module: set(imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", modules)) - {module}
        for module, path in modules.items()
    }


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def breaches(edges: Mapping[str, set[str]]) -> list[str]:
    """One line for each import that the table forbids: the two modules, and the rule."""
    found = []
    for module, imported in sorted(edges.items()):
        here = room(module)
        for other in sorted(imported):
            there = room(other)
            if not here:  # the public API stands over everything
                continue
            if not there:
                found.append(f"{module} imports {other}: nothing inside imports the public API")
            elif there not in ROW_OF:
                found.append(f"{module} imports {other}: {there} has no row in the table")
            elif here != there and ROW_OF[there] >= ROW_OF[here]:
                where = "in the same row" if ROW_OF[there] == ROW_OF[here] else "below it"
                found.append(f"{module} imports {other}: {there}/ stands {where}, and a row imports rows above it only")
    return found


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; empty if there is none."""
    left = {module: set(imported) for module, imported in edges.items()}
    while left:
        free = {module for module, imported in left.items() if not imported & left.keys()}
        if not free:
            return sorted(left)
        left = {module: imported for module, imported in left.items() if module not in free}
    return []


def test_every_room_has_a_row() -> None:
    assert {room(module) for module in MODULES} - {""} <= ROW_OF.keys()


def test_imports_go_up_the_table_only() -> None:
    found = breaches(graph(MODULES))
    assert not found, "\n".join(found)


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert not circle(graph(MODULES))


@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        ("from phi4_mlx.generation import stream\n", "below it"),
        ("def late():\n    from phi4_mlx.chat.session import Chat\n", "below it"),
        ("def late():\n    import phi4_mlx.lora.run\n", "below it"),
        ("if TYPE_CHECKING:\n    from phi4_mlx.agent import ToolLoop\n", "below it"),
        ("from importlib import import_module\nimport_module('phi4_mlx.agent')\n", "below it"),
        ("from phi4_mlx import load\n", "public API"),
    ],
)
def test_a_planted_import_is_found(planted: str, rule: str) -> None:
    edges = {"phi4_mlx.models.text": set(imports(planted, "phi4_mlx.models.text", False, MODULES))}
    (found,) = breaches(edges)
    assert found.startswith("phi4_mlx.models.text imports ") and rule in found


def test_neighbours_in_a_row_do_not_import_each_other() -> None:
    (found,) = breaches({"phi4_mlx.lora.run": {"phi4_mlx.server.app"}})
    assert "in the same row" in found


def test_a_late_circle_is_found() -> None:
    late = "def later():\n    from phi4_mlx.bridge import __main__\n"
    edges = graph(MODULES)
    edges["phi4_mlx.bridge.worker"] |= set(imports(late, "phi4_mlx.bridge.worker", False, MODULES))
    assert {"phi4_mlx.bridge.__main__", "phi4_mlx.bridge.worker"} <= set(circle(edges))


def test_importing_the_package_brings_in_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import phi4_mlx;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'phi4_mlx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import phi4_mlx brought in {done.stdout.strip()}"


def test_text_needs_no_package_for_media() -> None:
    code = (
        "import sys, mlx.core, mlx.nn; before = set(sys.modules); import phi4_mlx.checkpoint, phi4_mlx.generation;"
        "print(*sorted({'numpy', 'PIL', 'soundfile', 'pypdfium2'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"text brings in {done.stdout.strip()}"
