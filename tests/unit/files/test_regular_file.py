"""The door for every file that is read: regular files of a limited size, whatever stands in their place."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from phi4_mlx import checkpoint, load
from phi4_mlx.adapters.layers import read_adapter
from phi4_mlx.convert.package import convert
from phi4_mlx.data.jsonl import read_lines
from phi4_mlx.errors import CheckpointError, Phi4Error, RequestError
from phi4_mlx.files.regular_file import SMALL_BYTES, TOKENIZER_BYTES, read_regular
from phi4_mlx.files.user_file import read_file
from phi4_mlx.grammar.grammars import schema_grammar
from phi4_mlx.lora.config_file import read_config_file
from phi4_mlx.tools.python_file import tool_functions
from tests.adapters import adapted, save_adapter
from tests.conftest import ROOT, TinyCheckpoint, TinyModel
from tests.test_layers import MODULES


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def circle(path: Path) -> None:
    path.symlink_to(path)


def enormous(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(TOKENIZER_BYTES + 1)


STANDINS = [pipe, endless, folder, listening, dangling, circle]
PACKAGE = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors", "model.safetensors.index.json",
]  # fmt: skip


@pytest.fixture(params=[*STANDINS, enormous], ids=lambda standin: standin.__name__)
def standin(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return request.param


def put(standin: Callable[[Path], None], path: Path) -> None:
    """Puts something else in place of a file."""
    path.unlink(missing_ok=True)
    standin(path)


@pytest.mark.parametrize("name", PACKAGE)
def test_nothing_in_a_package_blocks_or_fills_the_memory(
    tiny_checkpoint: TinyCheckpoint, standin: Callable[[Path], None], name: str
) -> None:
    source = tiny_checkpoint()
    put(standin, source / name)
    for read in (load, lambda path: convert(path, path.parent / "out")):
        with pytest.raises(Phi4Error, match=re.escape(name)) as caught:
            read(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_nothing_in_an_adapter_blocks_or_fills_the_memory(
    tiny_model: TinyModel, tmp_path: Path, standin: Callable[[Path], None], name: str
) -> None:
    save_adapter(adapted(tiny_model()), tmp_path, {})
    put(standin, tmp_path / name)
    with pytest.raises(Phi4Error, match=re.escape(name)):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: schema_grammar(str(path)),
        lambda path: tool_functions(str(path)),
        lambda path: read_config_file(str(path)),
        lambda path: read_lines(path, lambda row, name: row),
        read_file,
    ],
)
def test_nothing_that_a_user_names_blocks_or_fills_the_memory(
    tmp_path: Path, standin: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    put(standin, tmp_path / "named")
    if standin is enormous and read.__code__.co_names[0] == "read_lines":
        pytest.skip("data has no limit, but its lines have")
    with pytest.raises(RequestError, match=r"named cannot be read"):
        read(tmp_path / "named")


def test_a_missing_file_and_a_name_with_a_nul_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing cannot be read: No such file"):
        read_file(tmp_path / "nothing")
    with pytest.raises(RequestError, match="cannot be read: its name has a NUL"):
        read_file(tmp_path / "no\0thing")


def test_the_limit_is_the_last_size_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="it is larger than 4 bytes, the limit"):
        read_regular(tmp_path / "file", 4)


@pytest.mark.parametrize("size", [3, 7])
def test_a_file_that_changes_while_it_is_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    fstat, calls = os.fstat, 0

    def changing(descriptor: int) -> os.stat_result:
        nonlocal calls
        status, calls = fstat(descriptor), calls + 1
        if calls == 2:  # the kind has been checked, and the size has been read
            os.truncate(path, size)
        return status

    monkeypatch.setattr(os, "fstat", changing)
    with pytest.raises(OSError, match="it changed while it was read; try again"):
        read_regular(path)


def test_weights_that_shrink_while_they_are_read_are_reported(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint()
    evaluate = mx.eval

    def late(*arrays: object) -> None:
        os.truncate(source / "model.safetensors", 40_000)
        evaluate(*arrays)

    monkeypatch.setattr(checkpoint.mx, "eval", late)
    with pytest.raises(CheckpointError, match="changed on the disk"):
        load(source)


def test_the_shells_own_pipes_are_read_and_limited() -> None:
    """`<(command)` and /dev/stdin, which end when their writer does."""
    code = "import sys; from pathlib import Path; from phi4_mlx.files.user_file import read_file;" \
           "print(len(read_file(Path(sys.argv[1]), 1000)))"  # fmt: skip

    def run(line: str) -> subprocess.CompletedProcess[str]:
        script = line.replace("READ", f'"{sys.executable}" -c "$0"')
        return subprocess.run(["bash", "-c", script, code], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert run("READ <(sleep 0.1; echo 12345)").stdout == "6\n"
    assert run("echo 12345 | READ /dev/stdin").stdout == "6\n"
    assert "larger than 1,000 bytes" in run("yes | READ /dev/stdin").stderr
    assert "it is a device, not a regular file" in run("READ /dev/stdin < /dev/zero").stderr


# Reading calls outside `files/regular_file.py`: (module, call) -> the reason.
ALLOWED = {
    ("phi4_mlx.adapters.folder", "mx.load"): "after read_header, which opens it as a regular file",
    ("phi4_mlx.adapters.shipped", "mx.load"): "after read_header",
    ("phi4_mlx.checkpoint", "mx.load"): "after read_header",
    ("phi4_mlx.checkpoint_share", "mx.load"): "after read_header",
    ("phi4_mlx.convert.work_folder", "mx.load"): "a file of our own run, in a folder of our own",
    ("phi4_mlx.files.line_file", "os.open"): "locks; what is no regular file is refused",
    ("phi4_mlx.files.line_file", "open"): "the file that it has open",
    ("phi4_mlx.evaluation.distributions", "open"): "what this process wrote, in a folder of our own",
    ("phi4_mlx.evaluation.languages.texts", "read_text"): "a file of this package",
    ("phi4_mlx.evaluation.languages.token_table", "read_text"): "a file of this package",
    ("phi4_mlx.evaluation.suite", "read_text"): "a file of this package",
    ("phi4_mlx.evaluation.task_index", "read_bytes"): "the files of the installed lm-eval",
    ("phi4_mlx.generation.cache_store.folder", "os.open"): "locks, and a file that must not exist yet",
    ("phi4_mlx.generation.memory_pressure", "read_text"): "files of the kernel, whose size is 0 until they are read",
    ("phi4_mlx.generation.prompt_cache_file", "mx.load"): "after read_whole_header",
    ("phi4_mlx.ranks.watcher", "open"): "a file of the kernel, in a process without this package",
    ("phi4_mlx.lora.saving.checkpoints", "mx.load"): "a file of our own run, renamed into place",
    ("phi4_mlx.files.atomic", "os.open"): "locks and flushes",
    ("phi4_mlx.files.regular_file", "os.open"): "the door itself",
    ("phi4_mlx.chat.transcript", "os.open"): "creates a private file",
    ("phi4_mlx.chat.microphone", "os.open"): "creates a private file",
    ("phi4_mlx.tokens.media.heic", "read_bytes"): "what a converter made in a folder of our own",
    ("phi4_mlx.tokens.media.picture_file", "open"): "Pillow, given an open file",
    ("phi4_mlx.tokens.media.sound_file", "open"): "what a converter made in a folder of our own",
    ("phi4_mlx.terminal.line_editor", "os.open"): "creates a private file",
    ("phi4_mlx.terminal.command", "os.open"): "/dev/null",
    ("phi4_mlx.terminal.command", "open"): "/dev/null",
    ("phi4_mlx.lora.saving.run_lock", "os.open"): "locks",
    ("phi4_mlx.grammar.worker", "read_text"): "the system's count of this process's memory",
}
READERS = {"read_text", "read_bytes", "mx.load", "np.load", "os.open", "io.open", "os.fdopen", "from_file", "mmap.mmap"}


def readers(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """The calls of a module that read a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = name.rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
        mode = [each.value for each in node.args[method != "open" :] if isinstance(each, ast.Constant)]
        writes = any(isinstance(each, str) and re.fullmatch(r"[wxa][bt+]*|r\+b?", each) for each in mode)
        if (name == "open" or method == "open" or (method and {name, method} & READERS)) and not writes:
            yield module, name if name in READERS or not method else method


def test_no_module_opens_a_file_for_reading_but_through_the_door() -> None:
    found = {call for module, path in MODULES.items() for call in readers(module, path)}
    assert found - ALLOWED.keys() - {("phi4_mlx.files.regular_file", "os.fdopen")} == set()
    assert ALLOWED.keys() <= found, "an allowed call is gone; drop its line"


@pytest.mark.parametrize(
    "planted", ["path.read_text()", "open(path)", "path.open('rb')", "mx.load(path)", "os.open(path, os.O_RDONLY)"]
)
def test_a_planted_reader_is_found(tmp_path: Path, planted: str) -> None:
    (tmp_path / "planted.py").write_text(f"import os\nx = {planted}\n")
    assert list(readers("planted", tmp_path / "planted.py"))


def test_the_limits_hold_the_largest_files_of_the_family() -> None:
    """An index of 14B has 0.1 MB; the vocabulary of o200k 16 MB."""
    index = {"weight_map": {f"model.layers.{n}.mlp.gate_up_proj.weight": "model-00001-of-00006.safetensors" for n in range(1000)}}  # fmt: skip # noqa: E501
    assert len(json.dumps(index)) < SMALL_BYTES / 8
    assert TOKENIZER_BYTES > 4 * 16_000_000
