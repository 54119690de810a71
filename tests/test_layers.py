"""Imports go down only. The floors are the design; a module that is not in the table has no place yet."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    0: "errors config",
    1: "byte_bpe command json_scanner line_editor manifest markdown tensor_file models.rope cache tokenizer sampling",
    2: "models lora.layers lora.adapter lora.peft chat_format grammar_words schema tools tool_calls",
    3: "checkpoint constrain fingerprint memory prompt_file toolbox",
    4: "decoding generation",
    5: "agent batch rows conversation convert lora mcp_tools speculate transcript user_files",
    6: "benchmark bridge bridge_lines bridge_model bridge_worker cache_prompt chat chat_commands chat_screen "
    "chat_session chat_tools completion context server",
    7: "cli __main__",
}
FLOOR_OF = {f"phi4_mlx.{name}": floor for floor, names in FLOORS.items() for name in names.split()}
PUBLIC_API = 8  # phi4_mlx/__init__.py stands on the roof: nothing inside imports it


def modules() -> dict[str, Path]:
    """Every module by its installed name; the converter's folder stands at the top of the checkout."""
    found = {}
    for folder, package in ((ROOT / "phi4_mlx", "phi4_mlx"), (ROOT / "convert", "phi4_mlx.convert")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if path != ROOT / "phi4_mlx" / "convert" / "__init__.py":  # the signpost to the real folder
                found[name] = path
    return found


MODULES = modules()


def floor(module: str) -> int | None:
    """The floor of the longest name in the table that is `module`, or a package that it lives in."""
    if module == "phi4_mlx":
        return PUBLIC_API
    while module and module not in FLOOR_OF:
        module = module.rpartition(".")[0]
    return FLOOR_OF.get(module)


def imports(tree: ast.AST, module: str, path: Path) -> Iterator[tuple[str, bool]]:
    """(module of ours that is imported, whether at import time), late imports inside functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names
            ]
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for name in names:
            if name == "phi4_mlx" or name.startswith("phi4_mlx."):
                yield name, id(node) not in late


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def called_name(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def all_imports(module: str) -> list[tuple[str, bool]]:
    path = MODULES[module]
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), module, path))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_a_floor(module: str) -> None:
    assert floor(module) is not None, f"{module} is not in FLOORS: which floor is it on?"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"phi4_mlx"}))
def test_imports_go_down_only(module: str) -> None:
    here = floor(module)
    assert here is not None
    for imported, _ in all_imports(module):
        there = floor(imported)
        assert there is not None and there <= here, (
            f"{module} (floor {here}) imports {imported} (floor {there})"
        )


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {to for to, early in all_imports(name) if early and to != name} for name in MODULES}
    while graph:  # take away what imports nothing that is left; a circle never goes away
        free = {name for name, to in graph.items() if not (to & graph.keys())}
        assert free, f"these import one another in a circle: {sorted(graph)}"
        graph = {name: to for name, to in graph.items() if name not in free}


def test_importing_the_package_brings_in_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import phi4_mlx;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'phi4_mlx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import phi4_mlx brought in {done.stdout.strip()}"
