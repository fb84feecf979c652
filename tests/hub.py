"""A hub of one repository on the loopback interface, speaking the part of the hub's protocol that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, slots=True)
class Hub:
    """A running hub.

    Attributes:
        url: its endpoint.
        fetched: names of the files that were downloaded, in order.
    """

    url: str
    fetched: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(repo: str, folder: Path, *, gated: bool = False) -> Iterator[Hub]:
    """Serve the files of `folder` as repository `repo` with one commit; `gated` refuses everyone."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, *, send_body: bool) -> None:
            path = self.path.split("?", 1)[0]
            api, resolve = f"/api/models/{repo}/", f"/{repo}/resolve/{COMMIT}/"
            if gated and path.startswith((api, resolve)):
                self.send(403, b"", {"X-Error-Code": "GatedRepo"}, send_body)
            elif path in (f"{api}revision/main", f"{api}revision/{COMMIT}"):
                info = {"_id": "1", "id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.send(200, json.dumps(info).encode(), {}, send_body)
            elif path.startswith(f"{api}revision/"):
                self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, send_body)
            elif path == f"{api}tree/{COMMIT}":
                rows = [{"type": "file", "path": name, "size": size(name), "oid": etag(name)} for name in names]
                self.send(200, json.dumps(rows).encode(), {}, send_body)
            elif path.startswith(resolve) and path.removeprefix(resolve) in names:
                name = path.removeprefix(resolve)
                if send_body:
                    fetched.append(name)
                self.send(200, (folder / name).read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": etag(name)}, send_body)
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, send_body)

        def send(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Tests read no access log."""

    names = sorted(path.name for path in folder.iterdir())

    def size(name: str) -> int:
        return (folder / name).stat().st_size

    def etag(name: str) -> str:
        return hashlib.sha1((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", fetched)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
