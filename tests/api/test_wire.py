"""What is written of a response: the bytes that h11 would write."""

from __future__ import annotations

from typing import Any

import h11
import pytest

from service.api.protocol import LeanConnection

MAX_HEADER_BYTES = 16384
HEADERS = [(b"content-type", b"text/plain")]
SIZED = h11.Response(status_code=200, headers=[*HEADERS, (b"content-length", b"3")])
STREAMED = h11.Response(status_code=200, headers=HEADERS)
CONTINUE = h11.InformationalResponse(status_code=100, headers=[])
END = h11.EndOfMessage()
PARTS = [h11.Data(data=data) for data in (b"a", b"", b"b" * 1000)]


@pytest.mark.parametrize(
    ("request_line", "events"),
    [
        (b"GET / HTTP/1.1", [SIZED, h11.Data(data=b"abc"), END]),
        (b"GET / HTTP/1.1", [STREAMED, *PARTS, END]),
        (b"GET / HTTP/1.1", [CONTINUE, STREAMED, *PARTS, END]),
        (b"GET / HTTP/1.0", [STREAMED, *PARTS, END]),
        (b"HEAD / HTTP/1.1", [STREAMED, h11.Data(data=b""), END]),
        (b"GET / HTTP/1.1", [h11.Response(status_code=204, headers=[]), h11.Data(data=b""), END]),
    ],
    ids=["sized", "chunks", "continue", "HTTP/1.0", "HEAD", "no content"],
)
def test_a_response_is_written_as_h11_writes_it_but_less_often(request_line: bytes, events: list[Any]) -> None:
    def write(connection: h11.Connection) -> list[bytes]:
        connection.receive_data(request_line + b"\r\nHost: a\r\n\r\n")
        while connection.next_event() is not h11.NEED_DATA and connection.their_state is not h11.DONE:
            pass
        return [connection.send(event) or b"" for event in events]

    own, plain = LeanConnection(MAX_HEADER_BYTES), h11.Connection(h11.SERVER)
    written, expected = write(own), write(plain)
    assert b"".join(written) == b"".join(expected)
    assert sum(map(bool, written)) < sum(map(bool, expected)) or len(b"".join(expected).split(b"\r\n\r\n", 1)[1]) == 0
    assert (own.our_state, own.their_state) == (plain.our_state, plain.their_state)


def test_a_part_that_is_out_of_order_is_refused_as_h11_refuses_it() -> None:
    with pytest.raises(h11.LocalProtocolError):
        LeanConnection(MAX_HEADER_BYTES).send(PARTS[0])
