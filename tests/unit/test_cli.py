"""`python -m phi4_mlx COMMAND`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phi4_mlx import cli
from tests.conftest import ROOT


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


def test_an_unknown_command_lists_the_known_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generat"]) == 2
    known = ", ".join(cli.COMMANDS)
    line = f"phi4-mlx: 'generat' is not a command; the commands are {known}; see --help\n"
    assert capfd.readouterr().err == line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("phi4-mlx ")


def test_an_invalid_option_is_reported_without_importing_mlx() -> None:
    code = (
        "import sys; from phi4_mlx.cli import main; code = main(['generate', '--temp', 'nan', '--prompt', 'x']);"
        "print(code, 'mlx' in sys.modules, 'tiktoken' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
