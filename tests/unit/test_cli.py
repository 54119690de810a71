"""`python -m phi4_mlx COMMAND`: its commands, their help, mistyped names, and the name under which it was started."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from phi4_mlx import cli
from phi4_mlx.hub import DEFAULT_MODEL
from phi4_mlx.lora.settings import FLAGS, LoraParameters, Settings
from phi4_mlx.terminal.command import Parser, shown_default
from tests.conftest import ROOT

MODULES = {name: module for name, (module, _) in cli.COMMANDS.items()}


def parsers() -> Iterator[Parser]:
    """The parser of every command, and of the commands within it."""
    for module in MODULES.values():
        parser: Parser = importlib.import_module(module)._parser()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def options(parser: Parser) -> list[argparse.Action]:
    """The options that `--help` lists, without --help."""
    listed = [each for each in parser._actions if each.option_strings and each.help != argparse.SUPPRESS]
    return [each for each in listed if not isinstance(each, argparse._HelpAction)]


def slips(name: str) -> Iterator[str]:
    """The name with one letter missing, doubled, wrong or swapped with the one before."""
    for at in range(2 * name.startswith("--"), len(name)):
        yield name[:at] + name[at + 1 :]
        yield name[:at] + name[at] + name[at:]
        yield f"{name[:at]}{'x' if name[at] != 'x' else 'y'}{name[at + 1 :]}"
        if at:
            yield name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]


def complaint(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line with which words are refused."""
    assert cli.main(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, (words, err)
    return err


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
    shown = capsys.readouterr().out
    assert "--debug" in shown and shown.startswith(f"usage: phi4-mlx {name} ")


def test_the_help_of_every_option_ends_with_its_default() -> None:
    seen = 0
    for parser in parsers():
        shown = " ".join(parser.format_help().partition("\noptions:\n")[2].split())
        for action in options(parser):
            text = " ".join(parser._get_formatter()._expand_help(action).split())
            assert re.search(r" \((required|default: [^()]+)\)$", text), f"{parser.prog}: {text}"
            assert text.count("(default: ") + text.count("(required)") == 1 and text in shown, f"{parser.prog}: {text}"
            if action.default not in (None, argparse.SUPPRESS) and action.nargs != 0:
                written = str(action.help).replace("(default: %(default)s)", "")
                assert "(default: " not in written, f"{parser.prog}: the parser knows the default of {text}"
            seen += 1
    assert seen > 150


def test_the_defaults_that_are_written_out_are_those_of_the_program() -> None:
    training = importlib.import_module("phi4_mlx.lora.__main__")._parser()
    for name in FLAGS:
        default = getattr(LoraParameters() if hasattr(LoraParameters, name) else Settings(), name)
        (action,) = (each for each in training._actions if each.dest == name)
        assert default is None or str(action.help).endswith(f"(default: {shown_default(default)})")
    named = [each for parser in parsers() for each in options(parser) if each.dest == "model"]
    assert sum(f"(default: {DEFAULT_MODEL})" in str(each.help) for each in named) >= 7  # the others need no model


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "on"), (False, "off"), ([], "none"), ([512, 2048], "512 2048"), (0.0, "0"), (1e-4, "0.0001"), ("x", "x")],
)
def test_a_default_in_words(value: object, shown: str) -> None:
    assert shown_default(value) == shown


@pytest.mark.parametrize("name", [*cli.COMMANDS, "--help", "--version"])
def test_a_mistyped_command_is_answered_with_the_right_one(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for typo in {*slips(name), name.upper(), name.replace("-", "_")} - {*cli.COMMANDS, "--help", "--version"}:
        found = re.search(r"is not a command; did you mean (.*)\?$", complaint([typo], capfd))
        assert found and name in found[1].split(" or "), typo


def test_an_unknown_command_lists_the_known_ones(capfd: pytest.CaptureFixture[str]) -> None:
    known = ", ".join(cli.COMMANDS)
    line = f"phi4-mlx: 'xyzzy' is not a command; the commands are {known}; see --help\n"
    assert complaint(["xyzzy"], capfd) == line
    line = "phi4-mlx lora: unrecognized arguments: export; did you mean phi4-mlx lora.export?\n"
    assert complaint(["lora", "export"], capfd) == line


def test_a_mistyped_option_is_answered_with_the_right_one(capfd: pytest.CaptureFixture[str]) -> None:
    for parser in parsers():
        known = {name for action in parser._actions for name in action.option_strings}
        for name in (name for action in options(parser) for name in action.option_strings if len(name) > 3):
            styles = {name[1:], f"—{name[2:]}", f"-{name}", name.upper(), f"--{name[2:].replace('-', '_')}"}
            for at, typo in enumerate(sorted({*slips(name), *styles} - known)):
                with pytest.raises(SystemExit) as left:
                    _, rest = parser.parse_known_args([typo if at % 2 else f"{typo}=5"])
                    parser.refuse(rest[0])
                line = capfd.readouterr().err
                assert left.value.code == 2 and line.count("\n") == 1, line
                found = re.search(r"unrecognized arguments: .*; did you mean (.*)\?$", line)
                assert found and name in found[1].split(" or "), (parser.prog, typo, line)


def test_a_mistyped_choice_is_answered_with_the_right_one(capfd: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for parser in parsers():
        for action in options(parser):
            for value in (each for each in action.choices or () if isinstance(each, str)):
                for typo in {*slips(value), value.upper()} - {*action.choices}:
                    with pytest.raises(SystemExit):
                        parser.parse_known_args([action.option_strings[0], typo])
                    line = capfd.readouterr().err
                    found = re.search(r"did you mean (.*)\?\n$", line)
                    assert found and value in found[1].split(" or "), (parser.prog, typo, line)
                    seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --nope x", "unrecognized arguments: --nope; see --help"),
        ("generate --max 5", "unrecognized arguments: --max; did you mean --max-tokens or --max-kv-size?"),
        ("generate --top- 5", "unrecognized arguments: --top-; did you mean --top-p or --top-k?"),
        ("generate --prompt -x", "unrecognized arguments: -x; a value that begins with a dash is written --prompt=-x"),
        ("generate -prompt=hi", "unrecognized arguments: -prompt; did you mean --prompt?"),
        ("generate -promt hi", "unrecognized arguments: -promt; did you mean --prompt?"),
        ("generate model demo", "unrecognized arguments: model; did you mean --model?"),
        ("generate hello", "unrecognized arguments: hello; see --help"),
        ("fuse --modle demo", "unrecognized arguments: --modle; did you mean --model?"),
        ("fuse —model demo", "unrecognized arguments: —model; did you mean --model?"),
        ("generate --kv-bits 5", "argument --kv-bits: '5' is not one of 4, 8; see --help"),
        ("generate --kv-bits x", "argument --kv-bits: 'x' is not one of 4, 8; see --help"),
        ("generate --kv-bits 3", "argument --kv-bits: '3' is not one of 4, 8; see --help"),
        ("lora --task dop", "argument --task: 'dop' is not one of sft, dpo, orpo; did you mean dpo?"),
        ("convert --hf-path x --trust-remote-code", "unrecognized arguments: --trust-remote-code; see --help"),
    ],
)
def test_a_refusal_is_one_line(words: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = complaint(words.split(), capfd)
    assert line.startswith(f"phi4-mlx {words.split()[0]}: {said}"), line


def test_what_argparse_accepts_is_not_refused(capfd: pytest.CaptureFixture[str]) -> None:
    parser: Parser = importlib.import_module("phi4_mlx.commands.generate")._parser()
    args, rest = parser.parse_known_args(["-pfoo", "--presence-penalty", "-1", "--system-prompt=--model", "--", "--x"])
    assert (args.prompt, args.presence_penalty, args.system_prompt, rest) == ("foo", -1.0, "--model", ["--", "--x"])
    assert parser.parse_known_args(["--prompt", "-- a question"])[0].prompt == "-- a question"
    assert parser.parse_known_args(["--prompt", "—model"])[0].prompt == "—model"
    converting: Parser = importlib.import_module("phi4_mlx.convert.__main__")._parser()
    args, _ = converting.parse_known_args(["-qd", "--hf-path", "x"])
    assert args.quantize and args.dequantize and capfd.readouterr() == ("", "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from phi4_mlx import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"phi4-mlx {__version__}\n"
    metadata = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert metadata.stdout.strip().splitlines()[-1] == __version__, metadata.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "named"),
    [
        (["-m", "phi4_mlx", "generate"], "python -m phi4_mlx generate"),
        (["-m", "phi4_mlx", "chat"], "python -m phi4_mlx chat"),
        (["-m", "phi4_mlx.chat"], "python -m phi4_mlx.chat"),
        (["-m", "phi4_mlx.lora"], "python -m phi4_mlx.lora"),
        (["-m", "phi4_mlx.lora.export"], "python -m phi4_mlx.lora.export"),
        (["-m", "phi4_mlx", "lora.export"], "python -m phi4_mlx lora.export"),
        (["-m", "phi4_mlx", "export"], "python -m phi4_mlx export"),
        (["-m", "phi4_mlx.convert"], "python -m phi4_mlx.convert"),
        (["-c", "from phi4_mlx.cli import main; raise SystemExit(main())", "export"], "phi4-mlx export"),
        (["-c", "from phi4_mlx.cli import main; raise SystemExit(main())", "bridge"], "phi4-mlx bridge"),
    ],
)
def test_a_message_names_the_command_that_was_typed(start: list[str], named: str) -> None:
    """The console script runs `phi4_mlx.cli.main`, as the last two do."""
    wrong = subprocess.run([sys.executable, *start, "--nope"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"{named}: unrecognized arguments: --nope; see --help\n"


def test_usage_names_the_program_that_was_typed() -> None:
    for start, named in (("-m", "python -m phi4_mlx"), ("-c", "phi4-mlx")):
        program = "phi4_mlx" if start == "-m" else "from phi4_mlx.cli import main; main()"
        done = subprocess.run([sys.executable, start, program], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith(f"usage: {named} COMMAND [options]\n")
        assert f"{named} COMMAND --help lists" in done.stdout


def test_help_and_a_mistake_import_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); from phi4_mlx.cli import COMMANDS, main\n"
        "for words in [['generate', '--temp', 'nan'], ['--help'], ['genrate']]: main(words)\n"
        "for words in [[name, each] for name in COMMANDS for each in ('--help', '--debgu')]: main(words)\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'phi4_mlx'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "", done.stderr
