"""Servers for a benchmark that answer by script: what a Pennyweight server says, or whatever else is asked for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HUNDRED_WORDS = " ".join(f"word{number}" for number in range(100))
LOGPROB = -1.0

Reply = tuple[int, bytes] | Callable[["Handler", dict[str, Any]], None]
"""Status and body, or what writes the answer itself."""


class ScriptedServer(ThreadingHTTPServer):
    """One server; a word of a text is a token.

    Attributes:
        replies: by path, instead of the usual ones.
        spans: begin of each stream that was asked for, and the moment before its last event, in seconds.
        bodies: what these requests asked for.
        keys: `Authorization` of each request.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, replies: Mapping[str, Reply], *, model: str, scheme: str, bits: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.replies = dict(replies)
        self.spans: list[tuple[float, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.model, self.scheme, self.bits = model, scheme, bits

    def usual(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of a server with one layer of 1000 weights in 16 bit, and of a text's first 20 tokens."""
        if path == "/readyz":
            return {"phase": "ready"}
        if path == "/v1/models":
            return {"data": [{"id": self.model, "max_model_len": 128, "scheme": self.scheme}]}
        if path == "/tokenize":
            tokens = list(range(1, len(body["prompt"].split()) + 1))
            return {"tokens": [0, *tokens] if body["add_special_tokens"] else tokens}
        if path == "/v1/quantization":
            total = 125 * self.bits
            return {
                **{name: name for name in ("recipe", "dtype", "device", "kernel")},
                "scheme": self.scheme,
                "weight_bytes": {"codes": total, "scales": 0, "unquantized": 0, "total": total},
                "original_bytes": 2000,
                "saving_ratio": 1 - total / 2000,
                "bits_per_parameter": float(self.bits),
                "layers": [{"name": "layer", "shape": [10, 100]}],
            }
        scores = [{"token_id": token, "logprob": LOGPROB, "top_logprobs": []} for token in body["token_ids"]]
        for score in scores:
            score["top_logprobs"] = [{"token_id": score["token_id"], "logprob": LOGPROB}]
        return {"prompt_logprobs": [{"token_id": 0, "logprob": None, "top_logprobs": []}, *scores[1:]]}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: ScriptedServer
    protocol_version = "HTTP/1.1"
    began_s: float | None = None

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def send(self, status: int, content: bytes) -> None:
        self._note_end()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, *events: object) -> None:
        """Server-sent events, after which the connection is closed."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number, event in enumerate(events, start=1):
            if number == len(events):
                self._note_end()  # what comes later, the client may not wait for
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {data}\n\n".encode())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Keep stderr for the tests."""

    def _note_end(self) -> None:
        if self.began_s is not None:
            self.server.spans.append((self.began_s, time.perf_counter()))
        self.began_s = None

    def _answer(self, body: dict[str, Any]) -> None:
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.get(self.path)
        if self.path == "/generate" and body.get("stream"):
            self.began_s = time.perf_counter()
            self.server.bodies.append(body)
            if reply is None:
                self.stream(*({"index": 0, "token_ids": [5]} for _ in range(body["max_tokens"])), "[DONE]")
            elif callable(reply):
                reply(self, body)
            else:
                self.send(*reply)
        elif self.path == "/metrics" and reply is None:
            self.send(200, b'pennyweight_memory_bytes{kind="rss"} 5e6\npennyweight_prefix_cache_hit_tokens_total 0\n')
        elif callable(reply) and self.path != "/generate":
            reply(self, body)
        elif isinstance(reply, tuple):
            self.send(*reply)
        else:
            self.send(200, json.dumps(self.server.usual(self.path, body)).encode())


@contextmanager
def scripted(
    replies: Mapping[str, Reply] | None = None, *, model: str = "tiny", scheme: str = "none", bits: int = 16
) -> Iterator[ScriptedServer]:
    """A server on a port of its own."""
    server = ScriptedServer(replies or {}, model=model, scheme=scheme, bits=bits)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refusal(status: int, message: str) -> tuple[int, bytes]:
    """An error in OpenAI's envelope."""
    return status, json.dumps({"error": {"message": message, "type": "", "param": None, "code": None}}).encode()
