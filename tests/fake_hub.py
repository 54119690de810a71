"""A Hugging Face Hub on this machine: folders served as repositories, so that tests download without a network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def fake_hub(repos: Mapping[str, Path], bytes_per_s: float = 1e12) -> Iterator[str]:
    """Serves repositories, each with one commit and the branch main.

    Args:
        repos: id -> the folder with its files.
        bytes_per_s: speed of a download.

    Yields:
        The address, for HF_ENDPOINT.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, whole: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            api = path.startswith("api/models/")
            words = path.removeprefix("api/models/").split("/")
            repo, rest = "/".join(words[:2]), words[2:]
            if repo not in repos:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, whole)
            files = {each.name: each.read_bytes() for each in repos[repo].iterdir()}
            if rest[1:2] not in ([], ["main"], [COMMIT]):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, whole)
            if api and rest[:1] == ["tree"]:
                tree = [self._entry(name, data) for name, data in files.items()]
                return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, whole)
            if api:
                listed = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                info = {"id": repo, "sha": COMMIT, "siblings": listed, "tags": [], "private": False}
                return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, whole)
            if (name := rest[-1]) not in files:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, whole)
            entry = self._entry(name, files[name])
            return self._send(200, files[name], {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": COMMIT}, whole)

        def _entry(self, name: str, data: bytes) -> dict[str, object]:
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], whole: bool) -> None:
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if begin else status)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            for name, value in {**headers, "Content-Length": str(len(body) - begin), "Accept-Ranges": "bytes"}.items():
                self.send_header(name, value)
            self.end_headers()
            for at in range(begin, len(body) * whole, 2**16):
                time.sleep(min(1.0, 2**16 / bytes_per_s))
                self.wfile.write(body[at : at + 2**16])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
