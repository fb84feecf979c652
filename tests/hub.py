"""A hub of one repository on the loopback interface, speaking the part of the hub's protocol that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_the_tests"
"""Lets its owner into a gated repository."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A running hub.

    Attributes:
        url: its endpoint.
        fetched: names of the files that were downloaded, in order.
        ranges: names of the files of which a range was read, and how many bytes that was.
    """

    url: str
    fetched: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int]] = field(default_factory=list)

    def take(self, name: str, body: bytes, wanted: str | None) -> bytes:
        """The range of a file that is asked for, or all of it; noted."""
        if wanted is None:
            self.fetched.append(name)
            return body
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        assert found is not None, wanted
        part = body[int(found[1]) : int(found[2]) + 1]
        self.ranges.append((name, len(part)))
        return part


@contextmanager
def serve_hub(repo: str, folder: Path, *, gated: bool = False) -> Iterator[Hub]:
    """Serve the files of `folder` as repository `repo` with one commit; `gated` refuses everyone without `TOKEN`."""
    hub = Hub("")
    handler = _handler(repo, folder, gated=gated, hub=hub)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield replace(hub, url=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, which reads its endpoint once at import, to a hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _handler(repo: str, folder: Path, *, gated: bool, hub: Hub) -> type[BaseHTTPRequestHandler]:
    names = sorted(path.name for path in folder.iterdir())
    api, resolve = f"/api/models/{repo}/", f"/{repo}/resolve/{COMMIT}/"

    def etag(name: str) -> str:
        return hashlib.sha1((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.split("?", 1)[0]
            is_let_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if gated and not is_let_in and path.startswith((api, resolve)):
                self.refuse(403, "GatedRepo")
            elif path in (f"{api}revision/main", f"{api}revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in names]
                self.send_json({"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"{api}revision/"):
                self.refuse(404, "RevisionNotFound")
            elif path == f"{api}tree/{COMMIT}":
                sizes = {name: (folder / name).stat().st_size for name in names}
                self.send_json([{"type": "file", "path": n, "size": sizes[n], "oid": etag(n)} for n in names])
            elif path.startswith(resolve) and path.removeprefix(resolve) in names:
                name = path.removeprefix(resolve)
                body = (folder / name).read_bytes()
                part = hub.take(name, body, self.headers.get("Range")) if self.command == "GET" else body
                status = 200 if part is body else 206
                self.send(status, part, {"X-Repo-Commit": COMMIT, "ETag": etag(name)})
            else:
                self.refuse(404, "EntryNotFound" if path.startswith(resolve) else "RepoNotFound")

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code})

        def send_json(self, body: object) -> None:
            self.send(200, json.dumps(body).encode(), {})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Tests read no access log."""

    return Handler
