"""The files of the chat page: what is served and how, their size on the wire, and no chains of requests."""

from __future__ import annotations

import gzip
import posixpath
import re

import pytest
from starlette.requests import Request
from starlette.responses import Response

from phi4_mlx.server.page_files import FOLDER, POLICY, page_file, page_names

WIRE_BYTES = 400_000  # of the whole page, compressed
LINES = 450  # of one file of ours
FILES = sorted(page_names())
OURS = [name for name in FILES if not name.startswith("vendor/")]


def answer(name: str, **headers: str) -> Response:
    lines = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    file = page_file(name)
    assert file is not None
    return file.answer(Request({"type": "http", "method": "GET", "headers": lines}))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_with_its_type_and_the_policy(name: str) -> None:
    response = answer(name)
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[name.rpartition(".")[2]]
    assert response.headers["content-type"].startswith(kind)
    expected = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
    assert (expected | {"referrer-policy": "no-referrer"}).items() <= dict(response.headers).items()
    assert response.body == (FOLDER / name).read_bytes()


def test_the_policy_allows_only_files_of_the_server() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'" and "unsafe" not in POLICY and "*" not in POLICY and "http" not in POLICY
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'" and rules["frame-ancestors"] == "'none'"


@pytest.mark.parametrize(
    ("accepted", "zipped"),
    [
        ("gzip, deflate, br", True), ("GZIP", True), ("*", True), ("br;q=1.0, gzip;q=0.2", True),
        ("identity, *;q=0.1", True), ("", False), ("identity", False), ("br", False),
         ("gzip;q=0", False), ("gzip; q=0.0", False), ("*;q=0", False),
        ("gzip;q=0, *", False), ("gzip;q=x", False),
    ],
)  # fmt: skip
def test_a_file_is_compressed_for_those_who_accept_it(accepted: str, zipped: bool) -> None:
    response = answer("main.js", accept_encoding=accepted)
    assert (response.headers.get("content-encoding") == "gzip") == zipped
    assert response.headers["vary"] == "accept-encoding"
    body = gzip.decompress(bytes(response.body)) if zipped else response.body
    assert body == (FOLDER / "main.js").read_bytes() and int(response.headers["content-length"]) == len(response.body)


def test_a_browser_that_has_a_file_does_not_get_it_again() -> None:
    etag = answer("main.js").headers["etag"]
    assert answer("main.js").headers["cache-control"] == "no-cache"
    for known in (etag, f'"other", {etag}', "*"):
        again = answer("main.js", if_none_match=known)
        assert again.status_code == 304 and again.body == b"" and again.headers["etag"] == etag
    assert answer("main.js", if_none_match='"other"').status_code == 200
    assert len({answer(name).headers["etag"] for name in FILES}) == len(FILES)


def test_the_page_is_small_on_the_wire() -> None:
    assert sum(len(answer(name, accept_encoding="gzip").body) for name in FILES) < WIRE_BYTES


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_is_short_and_plain(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.count("\n") < LINES
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", text)
    assert not re.search(r"\son[a-z]+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text) or not name.endswith(".html")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(["']?https?:""", text)


def test_the_browser_asks_for_all_modules_at_once() -> None:
    """A module that main.js does not name would be fetched a round trip later."""
    main = (FOLDER / "main.js").read_text(encoding="utf-8")
    named = set(re.findall(r'^import (?:.* from )?"\./([^"]+)";', main, re.MULTILINE))
    assert named <= set(FILES)
    for name in OURS:
        source = (FOLDER / name).read_text(encoding="utf-8")
        for given in re.findall(r'^(?:import|export)\b[^;]*?"(\.[^"]+)";', source, re.MULTILINE):
            imported = posixpath.normpath(posixpath.join(posixpath.dirname(name), given))
            assert imported in named, f"{name} imports {imported}, which main.js does not name"


def test_the_first_paint_waits_for_the_style_and_the_theme_alone() -> None:
    """A module that the page itself named would be fetched beside the style."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>", html)
    assert scripts == ['<script src="page/early.js">', '<script type="module" src="page/main.js">']
    assert html.index("early.js") < html.index('rel="stylesheet"') < html.index("main.js")
    assert "modulepreload" not in html
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', html)) <= set(FILES)
