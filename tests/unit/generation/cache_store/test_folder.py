"""The folder of a store: private, within its limit at every moment, and shared by several writers."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.files.lock import lock
from phi4_mlx.files.safetensors import TensorWriter
from phi4_mlx.generation.cache_store import catalogue as catalogue_module
from phi4_mlx.generation.cache_store import folder as folder_module
from phi4_mlx.generation.cache_store import writer as writer_module
from phi4_mlx.generation.cache_store.folder import StoreFolder, private_folder
from phi4_mlx.models.text import Model
from tests.conftest import make_tiny_model
from tests.damage import flipped_bits
from tests.stores import SOON_S, files, found, keep, opened, prefilled, size_of
from tests.waiting import until

IDS = [n % 500 + 3 for n in range(100)]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model(seed=1)


def test_the_folder_and_its_files_are_for_their_owner_alone(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "s"
    keep(folder, model, IDS)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(folder)] == [0o600]
    folder.chmod(0o755)  # holds nothing but files of the store
    assert found(folder, model, IDS) == 99 and stat.S_IMODE(folder.stat().st_mode) == 0o700


def refused(path: Path | str) -> str:
    with pytest.raises(RequestError) as error:
        private_folder(path)
    assert "\n" not in str(error.value) and str(path)[:40] in str(error.value)
    return str(error.value)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir(mode=0o755)
    (tmp_path / "other" / "mine.txt").write_text("")
    assert "exists and is not a folder" in refused(tmp_path / "file")
    assert "is a link; name the folder itself" in refused(tmp_path / "link")
    assert "is open to other users and holds mine.txt" in refused(tmp_path / "other")
    assert "a part of its path is a file" in refused(tmp_path / "file" / "s")
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a folder" in refused(tmp_path / "pipe")
    (tmp_path / "mine").mkdir(mode=0o700)
    opening = os.open
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in refused(tmp_path / "mine")
    monkeypatch.undo()

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opening(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    assert "Read-only file system" in refused(tmp_path / "mine")
    assert not [*(tmp_path / "mine").iterdir()]


def test_the_limit_is_never_exceeded_while_five_times_as_much_is_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, limit, draw, largest = tmp_path / "s", 400_000, random.Random(1), 0
    put = TensorWriter._put

    def watched(writer: TensorWriter, data: memoryview) -> None:
        nonlocal largest
        for start in range(0, len(data), 16384):  # in the middle of a tensor too
            put(writer, data[start : start + 16384])
            largest = max(largest, size_of(folder))

    monkeypatch.setattr(TensorWriter, "_put", watched)
    written = 0
    with opened(folder, model, limit) as store:
        for n in range(32):
            ids = [n, *(draw.randrange(500) for _ in range(draw.randrange(40, 200)))]
            store.offer(model, prefilled(model, ids), leaving=True)
            assert store.flush(SOON_S)
            written += files(folder)[0].stat().st_size
        store.offer(model, prefilled(model, [*range(500)] * 2), leaving=True)  # larger than the limit
        assert store.flush(SOON_S)
    assert 0.8 * limit < largest <= limit and written > 4 * limit and len(files(folder)) > 2


def test_a_lower_limit_holds_from_the_start(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    for n in range(5):
        keep(folder, model, [n] * 90)
    (folder / f".{'a' * 32}.promptcache.{os.getpid()}-7.partial").write_bytes(b"half")
    limit = size_of(folder) // 2
    with opened(folder, model, limit) as store:
        assert [n for n in range(5) if store.find(model, [n] * 90)] == [3, 4]
        assert size_of(folder) <= limit and len(files(folder)) == 2


def test_a_cache_that_can_never_be_stored_is_one_line(model: Model, tmp_path: Path) -> None:
    folder, lines = tmp_path / "s", []
    with opened(folder, model, 20_000, lines.append) as store:
        for n in range(3):
            store.offer(model, prefilled(model, [n] * 90))
        assert store.flush(SOON_S) and store.gauges()["prefix_cache_disk_failures_total"] == 3
    assert len(lines) == 1 and "KB is not stored: all of them may have 20.0 KB on the disk" in lines[0]
    assert not files(folder)


def test_the_least_recently_used_goes_first(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    prompts = [[n] * 90 for n in range(5)]
    for prompt in prompts[:4]:
        keep(folder, model, prompt)
    (size,) = {file.stat().st_size for file in files(folder)}
    with opened(folder, model, 4 * size) as store:
        best = store.find(model, prompts[0])
        assert best is not None and store.load(best, model, prompts[0])
        store.offer(model, prefilled(model, prompts[1]))  # it is there already: a use
        store.offer(model, prefilled(model, prompts[4]))
        assert store.flush(SOON_S)
    assert [found(folder, model, prompt) > 0 for prompt in prompts] == [True, True, False, True, True]


def test_a_full_disk_is_one_line_and_a_pause(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lines, full = tmp_path / "s", [], True
    put = TensorWriter._put

    def refusing(writer: TensorWriter, data: memoryview) -> None:
        put(writer, data[:100])
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(writer, data[100:])

    monkeypatch.setattr(TensorWriter, "_put", refusing)
    monkeypatch.setattr(writer_module, "PAUSE_S", 1000.0)
    for pause_s, tries in ((1000.0, 1), (0.0, 3)):
        monkeypatch.setattr(writer_module, "PAUSE_S", pause_s)
        lines.clear()
        with opened(folder, model, warn=lines.append) as store:
            for n in range(3):
                store.offer(model, prefilled(model, [n] * 90), leaving=True)
                assert store.flush(SOON_S)
            line = f"a prompt cache cannot be written to {folder}: No space left on device; {pause_s:g} s without one"
            assert lines == [line] * tries
            assert not files(folder) and store.gauges()["prefix_cache_disk_failures_total"] == 3
            if not pause_s:
                full = False
                store.offer(model, prefilled(model, [9] * 90), leaving=True)
                assert store.flush(SOON_S) and len(files(folder)) == 1


def test_damaged_files_are_dropped_with_one_line_each(model: Model, tmp_path: Path) -> None:
    folder, draw = tmp_path / "s", random.Random(2)
    keep(folder, model, IDS)
    (path,) = files(folder)
    whole, dropped = path.read_bytes(), 0

    def check(what: Any) -> None:
        nonlocal dropped
        lines: list[str] = []
        with opened(folder, model, warn=lines.append) as store:
            best = store.find(model, IDS)
            assert best is None or store.load(best, model, IDS) is None, what
        if not path.exists():
            (line,) = lines
            assert str(path) in line and "\n" not in line and len(line) < 500, (what, line)
            dropped += 1
        path.write_bytes(whole)

    places = draw.sample(range(len(whole)), 60)
    for place in flipped_bits(path, places, draw):
        check(place)
    assert dropped >= 50  # a bit of the metadata may make it a file of another model
    for end in (0, 7, 100, 5000, len(whole) - 1):
        path.write_bytes(whole[:end])
        check(end)
    assert found(folder, model, IDS) == 99


def test_files_of_other_versions_and_of_other_programs_are_left_alone(model: Model, tmp_path: Path) -> None:
    folder, lines = tmp_path / "s", []
    keep(folder, model, IDS)
    (path,) = files(folder)
    name = b'"phi4_mlx_prompt_cache":"2"'
    path.write_bytes(path.read_bytes().replace(name, name.replace(b"2", b"9")))
    (folder / "note.txt").write_text("mine")
    (folder / ("f" * 32 + ".promptcache.d")).mkdir()
    with opened(folder, model, warn=lines.append) as store:
        assert store.find(model, IDS) is None and not lines
        assert store.gauges()["prefix_cache_disk_entries"] == 1
    assert len(files(folder)) == 3


def test_a_file_that_another_process_has_dropped_is_a_miss(model: Model, tmp_path: Path) -> None:
    folder, lines = tmp_path / "s", []
    keep(folder, model, IDS)
    with opened(folder, model, warn=lines.append) as store:
        best = store.find(model, IDS)
        assert best is not None
        files(folder)[0].unlink()
        assert store.load(best, model, IDS) is None and store.find(model, IDS) is None
        assert not lines and store.gauges()["prefix_cache_disk_failures_total"] == 1


def test_too_many_open_files_drop_nothing(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lines = tmp_path / "s", []
    keep(folder, model, IDS)
    opening = os.open

    def none_left(path: Any, *rest: Any) -> int:
        if str(path).endswith(".promptcache"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opening(path, *rest)

    monkeypatch.setattr(os, "open", none_left)
    with opened(folder, model, warn=lines.append) as store:
        assert store.find(model, IDS) is None
    monkeypatch.undo()
    assert not lines and found(folder, model, IDS) == 99


def test_several_processes_share_a_folder_and_its_limit(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    monkeypatch.setattr(writer_module, "REFRESH_S", 0.05)
    keep(folder, model, [9] * 90)
    limit = 4 * files(folder)[0].stat().st_size
    with opened(folder, model, limit) as one, opened(folder, model, limit) as other:

        def offer(store: Any, numbers: range) -> None:
            for n in numbers:
                store.offer(model, prefilled(model, [n] * 90), leaving=True)

        threads = [threading.Thread(target=offer, args=each) for each in ((one, range(8)), (other, range(100, 108)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
        assert one.flush(SOON_S) and other.flush(SOON_S)
        assert size_of(folder) <= limit and len(files(folder)) == 4
        kept = [n for n in (*range(8), *range(100, 108)) if found(folder, model, [n] * 90)]
        for store in (one, other):  # each finds what the other has written
            until(lambda store=store: [n for n in range(110) if store.find(model, [n] * 90)] == kept)  # type: ignore[misc]


def test_a_writer_waits_for_the_lock_of_another(model: Model, tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "s")
    descriptor = lock(folder, lambda path: os.open(path, os.O_RDONLY))
    with opened(folder, model) as store:
        store.offer(model, prefilled(model, IDS), leaving=True)
        assert not store.flush(0.2) and not files(folder)
        os.close(descriptor)
        assert store.flush(SOON_S) and len(files(folder)) == 1


def test_a_lock_that_is_never_free_does_not_keep_a_program_from_its_end(model: Model, tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "s")
    descriptor = lock(folder, lambda path: os.open(path, os.O_RDONLY))
    with opened(folder, model) as store:
        store.offer(model, prefilled(model, IDS), leaving=True)
        assert not store.close(0.2)
    os.close(descriptor)
    assert not files(folder)


def test_what_killed_writers_have_left_goes_at_the_next_write(model: Model, tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "s")
    left = folder / f".{'a' * 32}.promptcache.{os.getpid()}-7.partial"  # a process with this number runs
    left.write_bytes(b"half")
    keep(folder, model, IDS)
    assert not left.exists() and len(files(folder)) == 1


def test_headers_are_read_once(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, names = tmp_path / "s", []
    for n in range(5):
        keep(folder, model, [n] * 90)
    whole = catalogue_module.read_entry
    monkeypatch.setattr(catalogue_module, "read_entry", lambda path: names.append(path.name) or whole(path))
    with opened(folder, model) as store:
        assert store.find(model, [3] * 90) is not None
        assert sorted(names) == [file.name for file in files(folder)]
        store.offer(model, prefilled(model, [9] * 90))
        assert store.flush(SOON_S) and len(names) == 5
        for n in range(5):
            assert store.find(model, [n] * 90) is not None
    assert len(names) == 5


def test_a_folder_that_is_removed_costs_a_line(model: Model, tmp_path: Path) -> None:
    folder, lines = tmp_path / "s", []
    with opened(folder, model, warn=lines.append) as store:
        folder.rmdir()
        store.offer(model, prefilled(model, IDS), leaving=True)
        assert store.flush(SOON_S) and len(lines) == 1 and "No such file or directory" in lines[0]
        assert store.find(model, IDS) is None


def test_the_room_of_a_folder(tmp_path: Path) -> None:
    folder = StoreFolder(private_folder(tmp_path / "s"), 100)
    for n, name in enumerate("abc"):
        path = folder.path / f"{name * 32}.promptcache"
        path.write_bytes(bytes(30))
        os.utime(path, ns=(n, n))
    names = [file.name for file in folder.files()]
    assert names == [f"{name * 32}.promptcache" for name in "abc"]
    assert folder.make_room(10, folder.files()) == []
    with pytest.raises(OSError, match="No space left on device"):
        folder.make_room(101, folder.files())
    assert folder.make_room(41, folder.files()) == names[:2] and len(folder.files()) == 1


@pytest.mark.parametrize(("free", "kept"), [(10**12, 6), (200_000 + 50_000, 6), (200_000, 5), (100_000, 2), (0, 5)])
def test_a_part_of_the_volume_stays_free(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kept: int
) -> None:
    """The volume has 4 MB, so that 200 KB are to stay free, and the store 230 KB; a file has 47 KB."""
    folder = tmp_path / "s"
    for n in range(5):
        keep(folder, model, [n] * 90)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(4_000_000, 0, free))  # type: ignore[attr-defined]
    lines: list[str] = []
    with opened(folder, model, warn=lines.append) as store:
        store.offer(model, prefilled(model, [9] * 90), leaving=True)
        assert store.flush(SOON_S)
    assert len(files(folder)) == kept and len(lines) == (free == 0)  # nothing is removed where it would not help
