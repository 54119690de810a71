"""Paths in a line: as terminals paste dragged files, as file managers copy them, and in sentences."""

from __future__ import annotations

import pytest

from phi4_mlx.terminal.typed_paths import find_paths

FILES = {"/d/a.png", "/d/b c.png", "/d/it's.png", "/d/x?.png", "/home/me/h.png", "/d/back\\slash.png", "/d/é.png"}


@pytest.mark.parametrize(
    ("line", "paths"),
    [
        ("/d/a.png", ["/d/a.png"]),
        ("/d/a.png ", ["/d/a.png"]),
        ("/d/b c.png", ["/d/b c.png"]),
        (r"/d/b\ c.png", ["/d/b c.png"]),
        (r"/d/b\ c.png /d/a.png ", ["/d/b c.png", "/d/a.png"]),
        ("'/d/b c.png' what is this?", ["/d/b c.png"]),
        ('"/d/b c.png"', ["/d/b c.png"]),
        (r"'/d/it'\''s.png' '/d/a.png'", ["/d/it's.png", "/d/a.png"]),
        (r"/d/it\'s.png", ["/d/it's.png"]),
        (r'"/d/it'"'"r's.png"', ["/d/it's.png"]),
        ("file:///d/b%20c.png", ["/d/b c.png"]),
        ("file://localhost/d/a.png and", ["/d/a.png"]),
        ("file:///d/%C3%A9.png", ["/d/é.png"]),
        ("~/h.png", ["/home/me/h.png"]),
        ("what is in /d/a.png?", ["/d/a.png"]),
        ("what is in /d/x?.png", ["/d/x?.png"]),
        ("(/d/a.png), please", ["/d/a.png"]),
        ("it's in /d/a.png, isn't it", ["/d/a.png"]),
        ("'tis /d/a.png, 'twas /d/b\\ c.png", ["/d/a.png", "/d/b c.png"]),
        ("/d/back\\slash.png", ["/d/back\\slash.png"]),
        ("/d/a.png\n/d/b c.png\nwhat are these?", ["/d/a.png", "/d/b c.png"]),
        ("/d/none.png", []),
        ("a.png d/a.png", []),
        ("http://d/a.png", []),
        ("x/d/a.png", []),
        ("'/d/a.png", []),
        ("file://host/d/a.png", []),
        ("", []),
        (" \n ", []),
        ("/" + "x" * 10_000, []),
        ("/d/a.png\0", []),
    ],
)
def test_paths_that_exist_are_found(line: str, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = find_paths(line, FILES.__contains__)
    assert [each.path for each in found] == paths
    for each in found:
        assert not line[each.start : each.end].endswith((" ", ",")) and line[each.start : each.end].strip()


def test_a_long_paste_is_read_once() -> None:
    asked: list[str] = []
    assert find_paths("/d/a.txt " * 20_000, lambda path: bool(asked.append(path))) == []
    assert len(asked) <= 40_000
