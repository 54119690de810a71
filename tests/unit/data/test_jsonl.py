"""JSONL files: where they are found, and every bad line is reported, with its number, before any line is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi4_mlx.data import jsonl
from phi4_mlx.data.jsonl import find_split, read_lines
from phi4_mlx.errors import RequestError


def written(folder: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    return path


def read(path: Path) -> list[tuple[dict[str, Any], str]]:
    return read_lines(path, lambda record, source: (record, source))


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \r\n\n"])
def test_lines_are_read_with_their_names(tmp_path: Path, end: bytes) -> None:
    lines = b'\xef\xbb\xbf{"text": "a"}\r', '{"text": "\u00f6\u2028"}'.encode(), b'{"n": [1]}'
    path = written(tmp_path, *lines, end=end)
    assert read(path) == [
        ({"text": "a"}, "train.jsonl:1"), ({"text": "\u00f6\u2028"}, "train.jsonl:2"), ({"n": [1]}, "train.jsonl:3")
    ]  # fmt: skip


BAD_LINES = {
    "cut short": (b'{"text": "a', "not JSON: Unterminated string starting at column 10"),
    "no JSON": (b"hello", "not JSON: Expecting value at column 1"),
    "two objects": (b'{"a": 1} {"b": 2}', "not JSON: Extra data at column 10"),
    "a list": (b"[1, 2]", "holds [1, 2], not an object"),
    "a text": (b'"hello"', "holds 'hello', not an object"),
    "not UTF-8": ('{"text": "Größe"}'.encode("latin-1"), "not UTF-8: byte 0xf6 at offset 12"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    "half a character": (b'{"text": "\xe2\x82"}', "not UTF-8: byte 0xe2"),
    "empty": (b"", "the line is empty"),
    "blank": (b" \t\r", "the line is empty"),
    "key twice": (b'{"text": "a", "text": "b"}', "key 'text' occurs twice"),
    "key twice, deep": (b'{"messages": [{"role": "user", "role": "tool"}]}', "key 'role' occurs twice"),
    "NaN": (b'{"text": NaN}', "NaN is not a JSON number"),
    "minus infinity": (b'{"text": [-Infinity]}', "-Infinity is not a JSON number"),
    "deep": (b'{"a":' + 100_000 * b"[" + 100_000 * b"]" + b"}", "too many nested brackets"),
    "digits": (b'{"a": ' + 10_000 * b"1" + b"}", "not JSON that can be read: Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("at", [1, 3])
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path: Path, name: str, at: int) -> None:
    line, reason = BAD_LINES[name]
    path = written(tmp_path, *[b'{"text": "a"}'] * (at - 1), line, b'{"text": "b"}')
    with pytest.raises(RequestError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{at}: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_one_bad_line_among_ten_thousand(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}'] * 10_000
    lines[6_789] = b'{"text": }'
    with pytest.raises(RequestError, match=r"train\.jsonl:6790: not JSON: Expecting value at column 10$"):
        read(written(tmp_path, *lines))


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    good, bad = b'{"text": "a"}', b"{"
    with pytest.raises(RequestError, match=r"l:2: .* \(1 more bad line: 4\)$"):
        read(written(tmp_path, good, bad, good, bad))
    with pytest.raises(RequestError, match=r"l:2: the line is empty \(2 more bad lines: 3, 5\)$"):
        read(written(tmp_path, good, b"", b"", good, b"", good, good))
    with pytest.raises(RequestError, match=r"l:1: .* \(8 more bad lines: 2, 3, 4, 5, 6, \.\.\.\)$"):
        read(written(tmp_path, *[bad] * 9))


def test_what_the_reader_refuses_is_told_like_any_bad_line(tmp_path: Path) -> None:
    def refuse(record: dict[str, Any], source: str) -> None:
        if record["n"] == 2:
            raise RequestError("two is too many")
        if record["n"] == 3:
            raise RecursionError

    path = written(tmp_path, *[json.dumps({"n": n}).encode() for n in (1, 2, 3)])
    with pytest.raises(RequestError, match=r"train\.jsonl:2: two is too many \(1 more bad line: 3\)"):
        read_lines(path, refuse)


def test_a_line_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 50)
    short, long = b'{"text": "a"}', b'{"text": "' + 1000 * b"a" + b'"}'
    with pytest.raises(RequestError, match=r"train\.jsonl:2: the line is longer than 50 bytes"):
        read(written(tmp_path, short, long, short))
    with pytest.raises(RequestError, match=r"\(1 more bad line: 3\)"):  # what follows keeps its number
        read(written(tmp_path, long, short, b"{"))
    with pytest.raises(RequestError, match="longer than 50 bytes"):
        read(written(tmp_path, long, end=b""))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RequestError, match=r"train\.jsonl is empty"):
        read(written(tmp_path, content, end=b""))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(RequestError, match=r"train\.jsonl cannot be read: it is a folder"):
        read(tmp_path / "train.jsonl")


def test_splits_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no train\.jsonl"):
        find_split(tmp_path)
    path = written(tmp_path, b"{}")
    (tmp_path / "valid.jsonl").touch()
    assert find_split(tmp_path) == find_split(str(tmp_path), "train") == path
    assert find_split(tmp_path, "valid") == tmp_path / "valid.jsonl"
    assert find_split(tmp_path, "test") is None
    assert find_split(path) == path
    assert find_split(path, "valid") is None
    with pytest.raises(RequestError, match="split 'dev' is not known; known are train, valid, test"):
        find_split(tmp_path, "dev")


@pytest.mark.parametrize("name", ["", "no-such-folder", "data/train.jsonl", "./data/set", "a/b/c", "/no/such", "../x"])
def test_what_is_no_path_and_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"holds no train" if name == "" else "neither a folder, nor a file"):
        find_split(name)


@pytest.mark.parametrize("place", ["", "data"])
def test_the_hub_is_asked_for_the_jsonl_file_and_for_parquet_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repo: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repo, repo_type, *allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(RequestError, match=r"owner/name holds no train\.jsonl"):
        find_split("owner/name")
    (tmp_path / place).mkdir(exist_ok=True)
    path = written(tmp_path / place, b"{}")
    assert find_split("owner/name") == path
    assert find_split("owner/name", "valid") is None
    assert [each[:3] for each in asked] == [
        ("owner/name", "dataset", name)
        for name in ("train.jsonl", "train.parquet", "train.jsonl", "valid.jsonl", "valid.parquet")
    ]
    assert asked[0] == ("owner/name", "dataset", "train.jsonl", "data/train.jsonl")
    assert {"data/validation-*.parquet", "default/valid/*.parquet"} <= set(asked[4])


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
    with pytest.raises(RequestError, match=f"the Hub dataset owner/name is not cached, and {reason}$"):
        find_split("owner/name")
