"""HTTP as bytes, so that what no client would send can be sent."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple

_TIMEOUT_S = 60.0


class Answer(NamedTuple):
    """What came back; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Peer:
    """A connection that is made again when the service has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, request: bytes) -> None:
        """Write; a connection that the service closes meanwhile is no failure."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(request)

    def end(self) -> None:
        """Say that nothing more is sent."""
        assert self._socket is not None
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def receive(self, method: str = "GET") -> Answer | None:
        """One answer; None if the service has closed the connection instead."""
        assert self._socket is not None
        response = HTTPResponse(self._socket, method=method)
        try:
            response.begin()
            body = response.read()
        except (HTTPException, ConnectionError):
            response.close()
            self.close()
            return None
        will_close = response.will_close
        response.close()
        if will_close:
            self.close()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def ask(self, request: bytes, method: str = "GET") -> Answer | None:
        """Send a request and read its answer; once more if an idle connection was closed under it."""
        was_open = self._socket is not None
        self.send(request)
        answer = self.receive(method)
        if answer is None and was_open:
            self.send(request)
            answer = self.receive(method)
        return answer


def request(
    method: str, path: str, body: bytes | str = b"", headers: Mapping[str, str] | None = None, *, key: str | None = None
) -> bytes:
    """A well-formed request; a header that is given replaces the usual one."""
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    fields = {"Host": "localhost"}
    if content:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in (fields | dict(headers or {})).items()),
    ]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + content
