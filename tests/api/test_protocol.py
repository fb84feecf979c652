"""Connections: slow clients, clients that do not read, too many of them, and bytes that are no HTTP.

uvicorn runs here with an application of the test's own. What `service.api.protocol` takes from the inside of
uvicorn is behind every test of this file.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from service.api.errors import install_error_handlers
from service.api.listener import open_port
from service.api.middleware import SECURITY_HEADERS, RequestMiddleware
from service.api.protocol import ConnectionLimits, EdgeProtocol
from service.loading.progress import LoadProgress
from service.metrics import Metrics
from tests.api.support import TIMEOUT_S, assert_error, eventually

LIMIT_S = 0.2
"""Of the service under test; a client that is slow takes several times as long."""
MAX_HEADER_BYTES = 16384
CHUNK = b"x" * 1000
HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Edge:
    """A server with a small application.

    Attributes:
        has_left: set when the client of `/endless` has left.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._metrics = Metrics(LoadProgress(), model="m", scheme="none", device="cpu")
        self.has_left = threading.Event()
        config = uvicorn.Config(
            RequestMiddleware(self._application(), metrics=self._metrics, max_body_bytes=100_000),
            http=cast("type[asyncio.Protocol]", partial(EdgeProtocol, limits=limits, metrics=self._metrics)),
            ws="none",
            lifespan="off",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        listener = open_port("127.0.0.1", 0)
        # Accepted connections inherit it: a client that does not read is felt after so much.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.address = listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A connection by hand."""
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(TIMEOUT_S)
        client.connect(self.address)
        return client

    def talk(self, data: bytes) -> bytes:
        """Send bytes, and read until the server closes."""
        with self.connect() as client:
            client.sendall(data)
            return read_all(client)

    def count(self, labels: str) -> float:
        """What the one counter with these labels says."""
        (line,) = (line for line in self._metrics.text().splitlines() if labels in line)
        return float(line.rpartition(" ")[2])

    def _application(self) -> FastAPI:
        app = FastAPI()
        install_error_handlers(app)

        @app.get("/livez")
        def livez() -> str:
            return "ok"

        @app.post("/echo")
        async def echo(request: Request) -> Response:
            return Response(await request.body())

        @app.get("/slow")
        def slow() -> StreamingResponse:
            async def chunks() -> AsyncIterator[bytes]:
                for part in (b"begin ", b"middle ", b"end"):
                    yield part
                    await asyncio.sleep(LIMIT_S)

            return StreamingResponse(chunks())

        @app.get("/endless")
        def endless() -> StreamingResponse:
            async def chunks() -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield CHUNK
                        await asyncio.sleep(0)
                finally:
                    self.has_left.set()

            return StreamingResponse(chunks())

        return app


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(65536):
        data += part
    return data


def read_answer(client: socket.socket) -> bytes:
    """One answer that states its length, on a connection that stays open."""
    data = b""
    while b"\r\n\r\n" not in data or len(data) < _length_of_answer(data):
        part = client.recv(65536)
        assert part, data
        data += part
    return data


def _length_of_answer(data: bytes) -> int:
    head, _, _ = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    assert found
    return len(head) + 4 + int(found[1])


@contextmanager
def serve(**changes: Any) -> Iterator[Edge]:
    limits = {"receive_timeout_s": LIMIT_S, "send_timeout_s": LIMIT_S, "max_connections": 100} | changes
    edge = Edge(ConnectionLimits(**limits))
    edge.thread.start()
    try:
        assert eventually(lambda: edge.server.started)
        yield edge
    finally:
        edge.server.should_exit = True
        edge.thread.join(TIMEOUT_S)
        assert not edge.thread.is_alive()


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    """One whose limits of time are short."""
    with serve() as edge:
        yield edge


@pytest.fixture(scope="module")
def patient() -> Iterator[Edge]:
    """One whose limits of time are never reached."""
    with serve(receive_timeout_s=TIMEOUT_S, send_timeout_s=TIMEOUT_S) as edge:
        yield edge


def _answers(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer in a row, all with a stated length."""
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"])
        answers.append((int(first.split()[1]), headers, data[:length]))
        data = data[length:]
    return answers


def _assert_refused(data: bytes, status: int, *, code: str, message: str) -> None:
    """The only, or the last, answer is an envelope, and closes the connection."""
    got, headers, body = _answers(data)[-1]
    response = httpx.Response(got, headers=headers, content=body)
    assert_error(response, status, param=None, code=code, message=message)
    assert headers["connection"] == "close"
    assert headers.items() >= {(name.lower(), value) for name, value in SECURITY_HEADERS.items()}


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"garbage\r\n\r\n", 400, r"illegal request line\)"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "illegal request line"),
        (b"GET /livez\r\n\r\n", 400, "illegal request line"),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "multiple Host"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400, "illegal header line"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 10**6, 431, "the headers have more than 16384 bytes"),
        (b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 10**5, 431, "the headers have more than 16384 bytes"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "bad Content-Length"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "conflicting Content-Length"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501, "Only Transfer-Encoding: chunked"),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400, "both Content-Length and"),
        (CHUNKED + b"zz\r\n", 400, r"illegal chunk header\)"),
        (CHUNKED + b"1\r\nabc\r\n0\r\n\r\n", 400, "no valid HTTP"),
        (CHUNKED + b"f" * 30 + b"\r\n", 400, "illegal chunk header"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n", 400, "illegal request line"),
    ],
    ids=[
        *("garbage", "TLS", "HTTP/0.9", "no host", "two hosts", "no header", "long header", "many headers"),
        *("negative length", "two lengths", "gzip", "length and chunks", "no chunk", "long chunk", "huge chunk"),
        "behind a good one",
    ],
)
def test_what_is_no_http_gets_an_envelope(patient: Edge, data: bytes, status: int, message: str) -> None:
    _assert_refused(patient.talk(data), status, code="malformed_http", message=message)


def test_what_is_refused_is_counted_and_has_its_id_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "service.api.protocol"), serve() as edge:
        [(_, headers, _)] = _answers(edge.talk(b"garbage\r\n\r\n"))
        assert edge.count('route="unknown",status="400"') == 1
        [record] = [record for record in caplog.records if record.name == "service.api.protocol"]
    assert record.getMessage().startswith("refused 400: this is no valid HTTP request")
    assert record.__dict__["request_id"] == headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])


@pytest.mark.parametrize(
    ("data", "drop"),
    [(b"GET /livez HTTP/1.1\r\nHost: ", b"a"), (HEAD + b"Content-Length: 10000\r\n\r\n{", b" ")],
    ids=["headers", "body"],
)
def test_a_request_that_drips_in_is_408_at_its_deadline(edge: Edge, data: bytes, drop: bytes) -> None:
    with edge.connect() as client:
        client.sendall(data)
        _assert_refused(_drip(client, drop), 408, code="receive_timeout", message="did not arrive within 0.2 s")


def _drip(client: socket.socket, drop: bytes) -> bytes:
    """Send a byte ten times in each limit until something comes back; far more often than until the deadline."""
    client.settimeout(LIMIT_S / 10)
    for _ in range(1000):
        client.sendall(drop)
        try:
            return client.recv(1) + read_all(client)
        except TimeoutError:
            continue
    raise AssertionError("the connection stays open")


def test_a_connection_that_asks_nothing_is_closed_without_a_word(edge: Edge) -> None:
    assert edge.talk(b"") == b""


def test_a_body_that_drips_in_for_a_route_that_does_not_want_it_ends_the_connection(edge: Edge) -> None:
    data = edge.talk(b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
    assert [status for status, _, _ in _answers(data)] == [405]


def test_the_time_between_two_requests_has_no_such_deadline(edge: Edge) -> None:
    ask = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with edge.connect() as client:
        client.sendall(ask)
        assert read_answer(client).startswith(b"HTTP/1.1 200")
        client.settimeout(3 * LIMIT_S)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(TIMEOUT_S)
        client.sendall(ask)
        assert read_answer(client).startswith(b"HTTP/1.1 200")


def test_a_request_behind_a_body_that_nobody_read_has_its_own_deadline(edge: Edge) -> None:
    with edge.connect() as client:
        client.sendall(b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        assert read_answer(client).startswith(b"HTTP/1.1 405")
        client.sendall(b"123456789GET /livez HTTP/1.1\r\nHost: a\r\n")
        client.settimeout(LIMIT_S)  # by its end the first request would be too late
        _assert_refused(_drip(client, b"a"), 408, code="receive_timeout", message="did not arrive")


@pytest.mark.parametrize(
    "meanwhile",
    [b"", b"\r\n", b"GET /livez HTTP/1.1\r\nHo", b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"],
    ids=["nothing", "a line end", "half a request", "a request"],
)
def test_an_answer_may_take_longer_than_a_request(edge: Edge, meanwhile: bytes) -> None:
    with edge.connect() as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        data = client.recv(65536)
        client.sendall(meanwhile)
        while b"0\r\n\r\n" not in data:
            part = client.recv(65536)
            assert part, data
            data += part
        assert all(part in data for part in (b"begin ", b"middle ", b"end"))
        if meanwhile.endswith(b"close\r\n\r\n"):
            assert b"HTTP/1.1 200 OK" in data + read_all(client)


def test_a_client_that_does_not_read_is_cut_and_others_are_not(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    edge.has_left.clear()
    with caplog.at_level(logging.INFO, "service.api.protocol"), edge.connect(receive_buffer=4096) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        assert httpx.get(f"{edge.url}/livez").status_code == 200
        assert edge.has_left.wait(TIMEOUT_S)
    assert "a client did not read for 0.2 s; its connection was closed" in caplog.messages


def test_a_client_that_reads_is_not_cut(edge: Edge) -> None:
    edge.has_left.clear()
    with httpx.stream("GET", f"{edge.url}/endless") as stream:
        read = stream.iter_bytes(len(CHUNK))
        # What the kernel holds is far less than is read here.
        assert all(next(read) == CHUNK for _ in range(5000))
        assert not edge.has_left.is_set()
    assert edge.has_left.wait(TIMEOUT_S)


def test_more_connections_than_allowed_are_503_and_twice_as_many_are_cut() -> None:
    ask = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
    with serve(receive_timeout_s=TIMEOUT_S, max_connections=2) as edge:
        clients = [edge.connect() for _ in range(4)]
        assert eventually(lambda: len(edge.server.server_state.connections) == 4)
        assert edge.count('reason="connection_limit"') == 0
        assert edge.talk(b"") == b""
        assert edge.count('reason="connection_limit"') == 1
        _, _, third, fourth = clients
        third.sendall(ask)
        data = read_all(third)
        _assert_refused(data, 503, code="too_many_connections", message="2 connections are open, all that")
        assert _answers(data)[0][1]["retry-after"] == "1"
        fourth.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_answer(fourth).startswith(b"HTTP/1.1 200")
        assert edge.count('reason="connection_limit"') == 2
        for client in clients:
            client.close()
        assert eventually(lambda: not edge.server.server_state.connections)
        assert [status for status, _, _ in _answers(edge.talk(ask))] == [200]
