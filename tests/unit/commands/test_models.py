"""`phi4-mlx models` on a cache in a temporary folder: the list, removing, and downloading from a Hub of the test."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from phi4_mlx import cli
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.hub import DEFAULT_MODEL, resolve
from phi4_mlx.terminal.amount import size
from tests.conftest import ROOT, TinyCheckpoint
from tests.fake_hub import COMMIT, fake_hub
from tests.tiny_sambay import write_tiny_sambay

OLD = 1_700_000_000  # 2023-11-14


def put(cache: Path, name: str, source: Path, commit: str = COMMIT, refs: tuple[str, ...] = ("main",)) -> Path:
    """Puts the files of a folder into a cache, as a revision of a model last used in 2023; returns its folder."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        os.utime(blob, (OLD, OLD))
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    for ref in refs:
        (repo / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def models(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`models(*words)` -> (exit code, standard output, standard error)"""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["models", *words])
        return code, *capfd.readouterr()

    return run


Models = Callable[..., tuple[int, str, str]]


def nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def listed(models: Models) -> dict[str, dict[str, Any]]:
    """The models of `--json`, by name; the last revision of each."""
    code, out, err = models("--json")
    assert (code, err) == (0, "")
    return {each["id"]: each for each in json.loads(out)["models"]}


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_cache_is_a_line_that_says_what_to_do(exists: bool, cache: Path, models: Models) -> None:
    if not exists:
        cache.rmdir()
    code, out, err = models()
    header, demo, flash, multimodal, _, last = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["id", "size", "revision", "context", "last", "used", "loads"]
    for name, line in zip(EMBEDDED, (demo, flash, multimodal), strict=True):
        assert re.match(rf"{name} +[1-4]\.\d\d MB  embedded +4,096 +yes(; reads pictures and sound)?$", line)
    assert last.startswith(f"{cache} holds no model; `phi4-mlx models pull {DEFAULT_MODEL}` downloads the default one")
    assert [*listed(models)] == [*EMBEDDED]
    assert models("list") == (code, out, err)
    assert models("list", "--json") == models("--json", "list") == models("--json")


def test_the_list_says_what_is_where_and_what_loads(
    cache: Path, models: Models, tiny_checkpoint: TinyCheckpoint
) -> None:
    good, other = tiny_checkpoint("good"), tiny_checkpoint("other")
    folder = put(cache, "owner/good", good)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    put(cache, "owner/other", other, refs=())
    (good / "model.safetensors").unlink()
    put(cache, "owner/weightless", good)
    put(cache.parent / "data", "owner/data", good).parents[1].rename(cache / "datasets--owner--data")
    (cache / "models--owner--damaged" / "refs").mkdir(parents=True)
    (cache / "models--owner--damaged" / "refs" / "main").write_text(COMMIT)
    (cache / ".DS_Store").touch()
    (cache / "models--").mkdir()
    (cache / "models--owner--file").touch()

    code, out, err = models()
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert (code, err) == (0, "")
    assert [*lines] == ["id", *EMBEDDED, "owner/damaged", "owner/good", "owner/other", "owner/weightless", "4"]
    assert re.search(rf" {COMMIT[:8]} main +1,024  2023-11-1[45]  yes$", lines["owner/good"])
    why = "no: model_type 'llama' is not supported"
    assert re.search(rf" {COMMIT[:8]}  +1,024  2023-11-1[45]  {why}$", lines["owner/other"])
    assert lines["owner/weightless"].endswith("  no: holds no model*.safetensors")
    assert re.search(r" 0 bytes +none .*  no: damaged: `phi4-mlx models rm owner/damaged` re", lines["owner/damaged"])
    assert f"4 revisions in {cache}: " in out

    found = listed(models)
    assert found["owner/good"] == {
        "id": "owner/good", "revision": COMMIT, "refs": ["main"], "path": str(folder), "bytes": nbytes(folder),
        "context": 1024, "last_used": "2023-11-14T22:13:20+00:00", "loads": True, "why_not": None,
        "reads_media": False,
    }  # fmt: skip
    assert [each["loads"] for each in found.values()] == [*[True] * len(EMBEDDED), False, True, False, False]
    assert found["owner/damaged"]["revision"] is None and found["demo"]["path"] == str(resolve("demo"))


def test_the_context_is_the_one_that_a_prompt_gets(cache: Path, models: Models, tmp_path: Path) -> None:
    put(cache, "owner/flash", write_tiny_sambay(tmp_path / "flash", max_position_embeddings=262_144))
    found = listed(models)["owner/flash"]
    assert (found["context"], found["loads"]) == (65_536, True)


def test_two_revisions_are_two_lines_and_their_files_are_counted_once(
    cache: Path, models: Models, tiny_checkpoint: TinyCheckpoint
) -> None:
    source = tiny_checkpoint()
    put(cache, "owner/tiny", source, "a" * 40)
    put(cache, "owner/tiny", source, "b" * 40, ("v2",))
    (cache / "models--owner--tiny" / "refs" / "main").unlink()
    code, out, _ = models()
    assert code == 0 and len(re.findall(r"^owner/tiny .* (aaaaaaaa|bbbbbbbb v2) .* yes$", out, re.M)) == 2
    assert out.splitlines()[-1].startswith(f"2 revisions in {cache}: ")
    assert models("rm", "owner/tiny", "--yes") == (0, f"owner/tiny: removed, {size(nbytes(source))} freed\n", "")


def test_a_download_that_was_interrupted_says_how_it_goes_on(
    cache: Path, models: Models, tiny_checkpoint: TinyCheckpoint
) -> None:
    source = tiny_checkpoint()
    put(cache, "owner/whole", source)
    (source / "model.safetensors").unlink()
    for name in ("owner/part", "owner/whole"):
        put(cache, name, source, "c" * 40, ())
        (cache / f"models--{name.replace('/', '--')}" / "blobs" / "abc.incomplete").write_bytes(b"x" * 5000)
    found = json.loads(models("--json")[1])["models"]
    reasons = {(each["id"], each["revision"][:1]): each["why_not"] for each in found[len(EMBEDDED) :]}
    pull = "incomplete: `phi4-mlx models pull {}` downloads the rest"
    assert reasons == {
        ("owner/part", "c"): pull.format("owner/part"),
        ("owner/whole", "0"): None,
        ("owner/whole", "c"): pull.format("owner/whole"),
    }
    assert models("rm", "owner/part", "--yes")[1] == f"owner/part: removed, {size(nbytes(source) + 5000)} freed\n"
    assert not (cache / "models--owner--part").exists()


def test_removing_takes_one_model_and_no_other(cache: Path, models: Models, tiny_checkpoint: TinyCheckpoint) -> None:
    source = tiny_checkpoint()
    for name in ("owner/new-name", "owner/old-name", "single"):  # a renamed model has the same commits
        put(cache, name, source)
    assert models("rm", "owner/old-name", "--yes") == (
        0, f"owner/old-name: removed, {size(nbytes(source))} freed\n", "",
    )  # fmt: skip
    assert [*listed(models)] == [*EMBEDDED, "owner/new-name", "single"] and listed(models)["owner/new-name"]["loads"]
    assert models("rm", "single", "--yes")[0] == 0 and [*listed(models)] == [*EMBEDDED, "owner/new-name"]
    (cache / "models--owner--damaged" / "blobs").mkdir(parents=True)
    (cache / "models--owner--damaged" / "blobs" / "x").write_bytes(b"x" * 1234)
    assert models("rm", "owner/damaged", "--yes")[1] == "owner/damaged: removed, 1.23 KB freed\n"
    assert not (cache / "models--owner--damaged").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rm", "owner/tiny"], "no person is at a terminal to confirm; --yes removes without a question"),
        (["rm", "owner/tny", "--yes"], "'owner/tny' is not in CACHE; did you mean owner/tiny?"),
        (["rm", "owner/tny"], "'owner/tny' is not in CACHE; did you mean owner/tiny?"),
        (["rm", "../../x", "--yes"], "'../../x' is not in CACHE"),
        (["rm", "demo", "--yes"], "demo is a part of this package, not of the cache, and stays"),
        (["rm", "demo-flash"], "demo-flash is a part of this package, not of the cache, and stays"),
        (["pull", "demo-flash"], "demo-flash is a part of this package; it needs no download"),
        (["pull", "dmeo"], "'dmeo' is neither a folder nor a Hub id like"),
        (["--json", "rm", "owner/tiny"], "--json prints the list, and rm prints none; drop one of the two"),
        (["rm"], "the following arguments are required: ID"),
        (["pul", "owner/tiny"], "argument COMMAND: 'pul' is not one of list, pull, rm; did you mean pull?"),
        (["rm", "owner/tiny", "--yse"], "unrecognized arguments: --yse; did you mean --yes?"),
        (["rm", "owner/tiny", "owner/other"], "unrecognized arguments: owner/other"),
        (["--jsn"], "unrecognized arguments: --jsn; did you mean --json?"),
    ],
)
def test_mistakes_are_one_line_and_remove_nothing(
    words: list[str], said: str, cache: Path, models: Models, tiny_checkpoint: TinyCheckpoint
) -> None:
    put(cache, "owner/tiny", tiny_checkpoint())
    code, out, err = models(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(rf"phi4-mlx models( rm)?: {re.escape(said.replace('CACHE', str(cache)))}", err), err
    assert [*listed(models)] == [*EMBEDDED, "owner/tiny"]


def test_a_cache_that_is_a_file_is_one_line(cache: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (cache / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "file"))
    code, out, err = models()
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{cache / 'file'} cannot be read as a Hugging Face" in err


def environment(url: str, cache: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "TERM": "xterm"}


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "removed"), [("y", True), ("YES", True), ("", False), ("yep", False), (None, False)])
def test_removing_asks(typed: str | None, removed: bool, tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = put(tmp_path / "hub", "owner/tiny", tiny_checkpoint())
    env = environment("http://127.0.0.1:9", tmp_path / "hub")
    words = ["-m", "phi4_mlx", "models", "rm", "owner/tiny"]
    child = pexpect.spawn(sys.executable, words, cwd=str(ROOT), env=env, timeout=60, encoding="utf-8")
    child.expect_exact("remove owner/tiny, 1 revision, ")
    child.expect_exact("? [y/N] ")
    for _ in range(60):  # what is typed before the question waits for it is discarded
        child.sendline(typed) if typed is not None else child.sendeof()
        if child.expect([r"removed, .* freed|nothing was removed", pexpect.TIMEOUT], timeout=1) == 0:
            break
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and folder.exists() != removed


@pytest.mark.slow
def test_pull_downloads_what_the_list_then_shows(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    good, other = tiny_checkpoint("good"), tiny_checkpoint("other")
    (good / "code.py").write_text("raise SystemExit")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with fake_hub({"owner/good": good, "owner/other": other}) as url:
        env = environment(url, tmp_path / "hub")

        def run(*words: str) -> tuple[int, str, str]:
            command = [sys.executable, "-m", "phi4_mlx", "models", *words]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
            return done.returncode, done.stdout, done.stderr

        for revision in ([], ["--revision", "main"]):
            code, out, err = run("pull", "owner/good", *revision)
            assert (code, err) == (0, "")
            end = f"chat with it: python -m phi4_mlx chat --model owner/good {' '.join(revision)}".rstrip()
            assert out.startswith("owner/good: ") and out.endswith(f"/{COMMIT}; {end}\n")
        code, out, err = run("pull", "owner/other")
        assert (code, out) == (2, "") and "model_type 'llama' is not supported" in err and err.count("\n") == 1
        for words, said in (
            (["owner/none"], "owner/none does not exist, or needs a login"),
            (["owner/god"], "did you mean owner/good?"),
            (["owner/good", "--revision", "v9"], "has no revision 'v9'"),
        ):
            code, out, err = run("pull", *words)
            assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err
    code, out, err = run("--json")  # the Hub is gone
    found = {each["id"]: each for each in json.loads(out)["models"]}
    assert found["owner/good"]["loads"] and found["owner/good"]["refs"] == ["main"]
    assert not (Path(found["owner/good"]["path"]) / "code.py").exists()
    assert sorted(path.name for path in Path(found["owner/other"]["path"]).iterdir()) == ["config.json"]
    assert run("pull", "owner/good")[0] == 0
    (Path(found["owner/good"]["path"]) / "model.safetensors").unlink()
    code, out, err = run("pull", "owner/good")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"is not cached, and the Hub|holds no model\*\.safetensors", err)  # by the library's version


@pytest.mark.slow
def test_pull_shows_its_progress_and_stops_at_once(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    source = tiny_checkpoint()
    with (source / "model.safetensors").open("ab") as file:
        file.truncate(2**22)
    with fake_hub({"owner/tiny": source}, bytes_per_s=2**18) as url:
        env = environment(url, tmp_path / "hub")
        words = ["-m", "phi4_mlx", "models", "pull", "owner/tiny"]
        child = pexpect.spawn(sys.executable, words, cwd=str(ROOT), env=env, timeout=60, encoding="utf-8")
        child.expect(r"model\.safetensors: +\d+%.* [\d.]+[kM]?/4\.19M")
        child.kill(signal.SIGINT)
        child.expect_exact("stopped; complete files are kept, and the same command downloads the others")
        child.expect(pexpect.EOF)
        child.close()
    assert child.exitstatus == 130
    blobs = (tmp_path / "hub" / "models--owner--tiny" / "blobs").iterdir()
    assert max(path.stat().st_size for path in blobs) < 2**22
