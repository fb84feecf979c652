"""Reads many streams at once and does nothing else: the load generator of `bench_processes`, cheap and always the same.

    python -m tests.benchmarks.streams PORT NUM_STREAMS MAX_TOKENS

Prints seconds from the first request to the end of the last answer.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

NUM_PROMPT_TOKENS = 32
TIMEOUT_S = 300.0
CHUNK_BYTES = 1 << 16
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
"""End of a stream, with those of its last chunk and of the chunks."""


def request(number: int, max_tokens: int) -> bytes:
    """A greedy stream with a prompt of its own, which ends after `max_tokens` tokens."""
    body = {
        "prompt": [5 + (7 * number + position) % 250 for position in range(NUM_PROMPT_TOKENS)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    content = json.dumps(body).encode("ascii")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + content


def read_streams(port: int, num_streams: int, max_tokens: int) -> float:
    """Seconds that so many streams take which begin together."""
    tails = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(num_streams):
            opened = socket.create_connection(("127.0.0.1", port))
            selector.register(opened, selectors.EVENT_READ)
            tails[opened] = b""
        began = time.monotonic()
        for number, opened in enumerate(tails):
            opened.sendall(request(number, max_tokens))
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"no stream went on for {TIMEOUT_S} s")
            for key, _ in ready:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if chunk := connection.recv(CHUNK_BYTES):
                    tails[connection] = (tails[connection] + chunk)[-len(END) :]
                    continue
                selector.unregister(connection)
                connection.close()
                if tails[connection] != END:
                    raise RuntimeError(f"a stream ended with {tails[connection]!r}")
    return time.monotonic() - began


if __name__ == "__main__":
    print(read_streams(*map(int, sys.argv[1:])))
