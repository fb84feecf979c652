"""What a benchmark asks of a server over HTTP, and what it makes of the answers.

What is asked before and after the measurement must be answered, or a `BenchError` says what is in the way. A request
that is measured never raises: if it fails, its `Answer` says how.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service import __version__
from service.errors import BenchError, shown
from service.reports.bench_serve_options import KEY_VARIABLE

NUM_TOP: Final = 20
"""How many likeliest tokens a server tells at most."""

_QUESTION_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 64 << 20
_MAX_MESSAGE_CHARACTERS = 300
_REMEDIES = {
    401: f"give the key of this server in --api-key-file or {KEY_VARIABLE}",
    403: "ask its operator for access",
    404: f"name a Pennyweight server of version {__version__}, without a path behind its port",
    408: "measure when it is less busy, or raise its --request-timeout",
    421: "name it by localhost or its address",
    429: "measure when nobody else uses it, and with higher --rate-limit, --max-concurrent-requests or --max-queue",
    503: "wait until its /readyz answers 200",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server says of its model.

    Attributes:
        layers: name and shape of each linear or embedding weight.
        text_ids: token ids of the benchmark's text, without special tokens.
        prefix_ids: special tokens that the tokenizer puts before a text.
    """

    url: str
    model: str
    max_model_len: int
    scheme: str
    recipe: str
    dtype: str
    device: str
    kernel: str
    weight_bytes: dict[str, int]
    original_bytes: int
    saving_ratio: float
    bits_per_parameter: float
    layers: tuple[tuple[str, tuple[int, ...]], ...]
    text_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request that was measured.

    Attributes:
        error: why it does not count, in one word, such as `http_429` or `timeout`; None if it was answered in full.
        seconds: from sending it to its last event.
        first_token_s: from sending it to the event with its first token; None without one.
        inter_token_s: from each token to the next; the tokens of one event share the time since the event before.
    """

    error: str | None
    seconds: float
    first_token_s: float | None = None
    inter_token_s: tuple[float, ...] = ()
    num_tokens: int = 0


class Position(NamedTuple):
    """Log-probabilities where a token of a text stands: of that token, and of the likeliest, by token id."""

    token_id: int
    logprob: float
    top: dict[int, float]


class Server:
    """One server under test."""

    def __init__(self, url: str, client: httpx2.AsyncClient, timeout_s: float) -> None:
        self.url = url
        self._client = client
        self._timeout_s = timeout_s

    async def describe(self, text: str) -> ServedModel:
        """The model, and the tokens of a text.

        Raises:
            BenchError: the server is not there, not ready, refuses, or answers in another form.
        """
        await self._ask("GET", "/readyz")
        with self._reading("/v1/models"):
            (card,) = (await self._ask("GET", "/v1/models"))["data"]
            model, max_model_len = str(card["id"]), int(card["max_model_len"])
        report = await self._ask("GET", "/v1/quantization")
        plain, whole = [await self._tokens(text, special) for special in (False, True)]
        end = whole.index(plain[0]) if plain and plain[0] in whole else 0
        with self._reading("/v1/quantization"):
            return ServedModel(
                url=self.url,
                model=model,
                max_model_len=max_model_len,
                **{name: str(report[name]) for name in ("scheme", "recipe", "dtype", "device", "kernel")},
                weight_bytes={kind: int(number) for kind, number in report["weight_bytes"].items()},
                original_bytes=int(report["original_bytes"]),
                saving_ratio=float(report["saving_ratio"]),
                bits_per_parameter=float(report["bits_per_parameter"]),
                layers=tuple((str(layer["name"]), tuple(map(int, layer["shape"]))) for layer in report["layers"]),
                text_ids=plain,
                prefix_ids=whole[:end],
            )

    async def memory_bytes(self) -> dict[str, int] | str:
        """Gauge `pennyweight_memory_bytes` by kind, or why it is not known: /metrics may have a key of its own."""
        samples = await self._samples()
        if isinstance(samples, str):
            return samples
        found = {s.labels.get("kind", ""): int(s.value) for s in samples if s.name == "pennyweight_memory_bytes"}
        return found or f"{self.url}: /metrics has no pennyweight_memory_bytes; measure a Pennyweight server"

    async def prefix_hit_tokens(self) -> int | None:
        """Prompt tokens that its prefix cache had, since its start; None if it does not tell."""
        samples = await self._samples()
        if isinstance(samples, str):
            return None
        found = [s.value for s in samples if s.name == "pennyweight_prefix_cache_hit_tokens_total"]
        return int(sum(found)) if found else None

    async def score(self, token_ids: Sequence[int]) -> list[Position]:
        """Log-probabilities of each token but the first.

        Raises:
            BenchError: as `describe`.
        """
        body = {"token_ids": list(token_ids), "max_tokens": 0, "prompt_logprobs": NUM_TOP}
        answer = await self._ask("POST", "/generate", body)
        with self._reading("/generate"):
            positions = [
                Position(
                    int(entry["token_id"]),
                    float(entry["logprob"]),
                    {int(top["token_id"]): float(top["logprob"]) for top in entry["top_logprobs"]},
                )
                for entry in answer["prompt_logprobs"][1:]
            ]
            if [position.token_id for position in positions] != list(token_ids[1:]):
                raise ValueError("other tokens than those that were sent")
            if not all(
                logprob <= 0 for position in positions for logprob in (position.logprob, *position.top.values())
            ):
                raise ValueError("log-probabilities that are none")
        return positions

    async def generate(self, token_ids: Sequence[int], max_tokens: int) -> Answer:
        """Have exactly `max_tokens` tokens streamed, greedily, and note when each comes."""
        body = {"token_ids": list(token_ids), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        arrivals: list[tuple[float, int]] = []
        error: str | None
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                error = await self._stream(body | {"stream": True}, arrivals)
        except (TimeoutError, httpx2.TimeoutException):
            error = "timeout"
        except httpx2.HTTPError:
            error = "connection"
        except (KeyError, TypeError, ValueError):
            error = "malformed"
        seconds = time.perf_counter() - started
        num_tokens = sum(count for _, count in arrivals)
        if error is None and num_tokens != max_tokens:
            error = "incomplete"
        if error is not None:
            return Answer(error=error, seconds=seconds)
        return Answer(
            error=None,
            seconds=seconds,
            first_token_s=arrivals[0][0] - started,
            inter_token_s=tuple(_steps(arrivals)),
            num_tokens=num_tokens,
        )

    async def _stream(self, body: Mapping[str, Any], arrivals: list[tuple[float, int]]) -> str | None:
        """Note moment and number of tokens of each event that has some; returns what went wrong."""
        async with self._client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                return f"http_{response.status_code}"
            async for data in _events(response):
                if data == b"[DONE]":
                    return None
                event = json.loads(data)
                if "error" in event:
                    return "stream_error"
                if event["token_ids"]:
                    arrivals.append((time.perf_counter(), len(event["token_ids"])))
        return "incomplete"

    async def _samples(self) -> list[Sample] | str:
        """All of /metrics, or why it is not known."""
        try:
            text = (await self._read("GET", "/metrics")).decode("utf-8", "replace")
            families = list(text_string_to_metric_families(text))
        except (BenchError, ValueError) as error:
            return str(error)
        return [sample for family in families for sample in family.samples]

    async def _tokens(self, text: str, special: bool) -> tuple[int, ...]:
        answer = await self._ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": special})
        with self._reading("/tokenize"):
            return tuple(map(int, answer["tokens"]))

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A JSON object."""
        content = await self._read(method, path, body)
        with self._reading(path):
            answer = json.loads(content)
            if not isinstance(answer, dict):
                raise TypeError("no JSON object")
        return answer

    async def _read(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        limit_s = min(self._timeout_s, _QUESTION_TIMEOUT_S) if body is None else self._timeout_s
        content = bytearray()
        try:
            async with asyncio.timeout(limit_s), self._client.stream(method, path, json=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _MAX_ANSWER_BYTES:
                        raise BenchError(
                            f"{self.url}: {method} {path} answers more than {_MAX_ANSWER_BYTES} bytes; "
                            "name a Pennyweight server"
                        )
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise BenchError(
                f"{self.url}: no answer to {method} {path} within {limit_s:g} s; "
                "see whether it is busy or stuck, or raise --timeout"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise BenchError(f"{self.url}: cannot be reached ({reason}); start the server, or correct --url") from error
        if response.status_code != 200:
            remedy = _REMEDIES.get(response.status_code, "see its log")
            message = _message(bytes(content))
            raise BenchError(f"{self.url}: {method} {path} answers {response.status_code}{message}; {remedy}")
        return bytes(content)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BenchError(
                f"{self.url}: {path} does not answer as Pennyweight {__version__} does ({type(error).__name__}: "
                f"{shown(error, _MAX_MESSAGE_CHARACTERS)}); name a server of this version"
            ) from error


@asynccontextmanager
async def connected(url: str, *, api_key: str | None, timeout_s: float) -> AsyncIterator[Server]:
    """A server, with as many connections as there are requests at a time; no proxy stands between."""
    headers = {"Accept-Encoding": "identity"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60.0)
    is_encrypted = url.startswith("https:")  # else certificates need not be read
    try:
        client = httpx2.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_s, limits=limits, verify=is_encrypted, trust_env=False
        )
    except httpx2.InvalidURL as error:
        raise BenchError(f"{url}: no address ({error}); correct --url") from error
    async with client:
        yield Server(url, client, timeout_s)


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Data of each event of a stream."""
    rest = b""
    async for piece in response.aiter_raw():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ")
        if len(rest) > _MAX_ANSWER_BYTES:
            raise ValueError("an event without end")


def _steps(arrivals: Sequence[tuple[float, int]]) -> Iterator[float]:
    """Seconds between tokens; how the first event's tokens lay apart is not known."""
    for (earlier, _), (later, count) in pairwise(arrivals):
        yield from [(later - earlier) / count] * count


def _message(content: bytes) -> str:
    """What an error says, in the envelope of OpenAI, or nothing."""
    try:
        return f" ({shown(json.loads(content)['error']['message'], _MAX_MESSAGE_CHARACTERS)})"
    except (KeyError, TypeError, ValueError):
        return ""
