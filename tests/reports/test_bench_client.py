"""What a benchmark makes of servers that are not there, are slow, refuse, or say something else."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.errors import BenchError
from service.reports.bench_client import Answer, Position, Server, connected
from tests.reports.scripted import HUNDRED_WORDS, LOGPROB, Handler, Reply, refusal, scripted

SHORT_S = 0.3


def ask(url: str, question: Callable[[Server], Any], *, timeout_s: float = 20.0, api_key: str | None = None) -> Any:
    async def run() -> Any:
        async with connected(url, api_key=api_key, timeout_s=timeout_s) as server:
            return await question(server)

    return asyncio.run(run())


def describe(server: Server) -> Any:
    return server.describe(HUNDRED_WORDS)


def generate(server: Server) -> Any:
    return server.generate([1, 2, 3], 4)


@contextmanager
def silent() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """A port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_a_server_says_what_it_serves() -> None:
    with scripted(scheme="w8a16", bits=8) as server:
        model = ask(server.url, describe)
    assert (model.model, model.scheme, model.max_model_len) == ("tiny", "w8a16", 128)
    assert (model.weight_bytes["total"], model.original_bytes, model.saving_ratio) == (1000, 2000, 0.5)
    assert (model.prefix_ids, model.text_ids) == ((0,), tuple(range(1, 101)))
    assert model.layers == (("layer", (10, 100)),)


def test_every_request_brings_the_key() -> None:
    with scripted() as server:
        ask(server.url, describe, api_key="secret-of-the-bench")
        ask(server.url, generate, api_key="secret-of-the-bench")
        assert set(server.keys) == {"Bearer secret-of-the-bench"}
        ask(server.url, generate)
        assert server.keys[-1] is None


def test_a_server_that_is_down_is_told_with_its_url() -> None:
    with closed() as url, pytest.raises(BenchError, match=rf"^{url}: cannot be reached \(.+\); start the server, or"):
        ask(url, describe)


def test_a_server_that_never_answers_is_given_up() -> None:
    message = rf"no answer to GET /readyz within {SHORT_S} s; see whether it is busy or stuck, or raise --timeout"
    with silent() as url, pytest.raises(BenchError, match=message):
        ask(url, describe, timeout_s=SHORT_S)


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        (
            "/readyz",
            refusal(503, "loading"),
            r"GET /readyz answers 503 \(loading\); wait until its /readyz answers 200",
        ),
        (
            "/v1/models",
            refusal(401, "no key"),
            r"answers 401 \(no key\); give the key of this server in --api-key-file",
        ),
        ("/tokenize", refusal(429, "too many"), r"POST /tokenize answers 429 \(too many\); measure when nobody else"),
        ("/v1/quantization", (404, b"<html>"), r"/v1/quantization answers 404; name a Pennyweight server"),
        ("/readyz", (302, b""), r"GET /readyz answers 302; see its log"),
        ("/v1/models", (200, b"<html>"), r"/v1/models does not answer as Pennyweight .* does \(JSONDecodeError"),
        (
            "/v1/models",
            (200, b"[]"),
            r"/v1/models does not answer as Pennyweight .* does \(TypeError: no JSON object\)",
        ),
        ("/v1/models", (200, b'{"data": []}'), r"/v1/models does not answer as Pennyweight .* name a server of this"),
        ("/v1/quantization", (200, b"{}"), r"/v1/quantization does not answer as Pennyweight .*KeyError"),
        ("/tokenize", (200, b'{"tokens": ["a"]}'), r"/tokenize does not answer as Pennyweight .*ValueError"),
        ("/readyz", refusal(500, "\x1b[2J" + "x" * 5000), r"answers 500 \('\\x1b\[2Jx+\.\.\.\); see its log"),
    ],
)
def test_what_is_in_the_way_is_told_with_a_remedy(path: str, reply: Reply, message: str) -> None:
    with scripted({path: reply}) as server, pytest.raises(BenchError, match=message) as refused:
        ask(server.url, describe)
    assert str(refused.value).startswith(server.url)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


def test_tokens_and_moments_of_a_stream_are_noted() -> None:
    with scripted() as server:
        answer: Answer = ask(server.url, generate)
        assert server.bodies == [
            {"token_ids": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
        ]
    assert (answer.error, answer.num_tokens, len(answer.inter_token_s)) == (None, 4, 3)
    assert answer.first_token_s is not None
    assert 0 < answer.first_token_s <= answer.first_token_s + sum(answer.inter_token_s) <= answer.seconds


def test_tokens_of_one_event_share_its_time() -> None:
    held = threading.Event()

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        for ids in ([1], [2, 3, 4]):
            handler.wfile.write(f"data: {json.dumps({'token_ids': ids})}\n\n".encode())
            held.wait(0.1)
        handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True

    with scripted({"/generate": reply}) as server:
        answer: Answer = ask(server.url, generate)
    assert answer.num_tokens == 4
    assert len(set(answer.inter_token_s)) == 1
    assert 3 * answer.inter_token_s[0] >= 0.09


def _broken(handler: Handler, body: dict[str, Any]) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'data: {"token_ids": [1]}\n\n')
    handler.close_connection = True


TOKEN = {"token_ids": [5]}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (refusal(429, "full"), "http_429"),
        (refusal(503, "draining"), "http_503"),
        (lambda handler, _: handler.stream(TOKEN, {"error": {"code": "timeout"}}, "[DONE]"), "stream_error"),
        (lambda handler, _: handler.stream(TOKEN, TOKEN), "incomplete"),
        (lambda handler, _: handler.stream(TOKEN, "[DONE]"), "incomplete"),
        (lambda handler, _: handler.stream(*[TOKEN] * 5, "[DONE]"), "incomplete"),
        (lambda handler, _: handler.stream("no json", "[DONE]"), "malformed"),
        (lambda handler, _: handler.stream([1], "[DONE]"), "malformed"),
        (lambda handler, _: handler.stream({"token_ids": 5}, "[DONE]"), "malformed"),
        (_broken, "connection"),
    ],
    ids=["429", "503", "error event", "no end", "too short", "too long", "no json", "a list", "no ids", "cut off"],
)
def test_a_request_that_fails_is_an_answer_with_a_word_and_no_figures(reply: Reply, error: str) -> None:
    with scripted({"/generate": reply}) as server:
        answer = ask(server.url, generate)
    assert answer == Answer(error=error, seconds=answer.seconds)
    assert answer.seconds > 0


def test_a_stream_that_stops_is_a_timeout() -> None:
    released = threading.Event()

    def reply(handler: Handler, _: dict[str, Any]) -> None:
        handler.stream(TOKEN)
        released.wait(10)

    with scripted({"/generate": reply}) as server:
        answer = ask(server.url, generate, timeout_s=SHORT_S)
        released.set()
    assert answer.error == "timeout"
    assert answer.seconds >= SHORT_S


def test_a_server_that_is_down_fails_requests_and_raises_nothing() -> None:
    with closed() as url:
        assert ask(url, generate).error == "connection"


def test_memory_is_that_of_the_metrics() -> None:
    with scripted() as server:
        assert ask(server.url, Server.memory_bytes) == {"rss": 5_000_000}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401, "metrics need a key"), r"/metrics answers 401 \(metrics need a key\)"),
        ((200, b"other_series 1\n"), "/metrics has no pennyweight_memory_bytes"),
        ((200, b"}{ no text format \xff"), r"."),
    ],
    ids=["refused", "another exporter", "no metrics"],
)
def test_memory_that_is_not_told_is_not_made_up(reply: Reply, message: str) -> None:
    with scripted({"/metrics": reply}) as server:
        told = ask(server.url, Server.memory_bytes)
    assert isinstance(told, str)
    assert re.search(message, told)


def test_scores_are_those_of_all_tokens_but_the_first() -> None:
    with scripted() as server:
        scores = ask(server.url, lambda own: own.score([4, 5, 6]))
    assert scores == [Position(token_id, LOGPROB, {token_id: LOGPROB}) for token_id in (5, 6)]


@pytest.mark.parametrize("change", [{"token_id": 9}, {"logprob": 0.5}, {"logprob": None}, {"top_logprobs": 7}])
def test_scores_that_are_none_are_refused(change: dict[str, Any]) -> None:
    entry = {"token_id": 5, "logprob": -1.0, "top_logprobs": []}
    content = json.dumps({"prompt_logprobs": [entry, entry | change]}).encode()
    with (
        scripted({"/generate": (200, content)}) as server,
        pytest.raises(BenchError, match="/generate does not answer"),
    ):
        ask(server.url, lambda own: own.score([4, 5]))


@pytest.mark.parametrize("url", ["http://[::1", "http://a\x00b"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(BenchError, match="correct --url"):
        ask(url, describe)
