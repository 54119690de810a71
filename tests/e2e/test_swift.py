"""`examples/bridge.swift` against PythonKit's interface, where a Swift compiler is at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import DATA, ROOT

SWIFTC = shutil.which("swiftc")


@pytest.mark.skipif(SWIFTC is None, reason="there is no swiftc")
def test_the_swift_example_type_checks(tmp_path: Path) -> None:
    def compile_swift(*words: str | Path) -> None:
        done = subprocess.run([str(SWIFTC), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    stub = DATA / "PythonKit.swift"
    compile_swift("-emit-module", "-module-name", "PythonKit", "-parse-as-library", stub)
    compile_swift("-typecheck", "-I", tmp_path, ROOT / "examples" / "bridge.swift")
