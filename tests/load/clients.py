"""Clients of a load test: each sends its requests one after another and reads, or goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.load.traffic import Manner, Request, Text

NUM_CLIENTS = 64
TIMEOUT_S = 120.0
DATA = "data: "


@dataclass(slots=True)
class Reply:
    """What a client has read.

    Attributes:
        status: None if the client went away before it came.
        error: code of the error that the answer is, or that ends the stream.
        texts: as far as they were read; by index.
        is_complete: whether all of the answer was read.
    """

    status: int | None = None
    error: str | None = None
    texts: dict[int, Text] = field(default_factory=dict)
    is_complete: bool = False

    def add(self, index: int, part: Text) -> None:
        """Put what an event brings to what its choice has."""
        text = self.texts.get(index, Text("", None, None, None))
        assert text.end is None, "a choice goes on after its end"
        self.texts[index] = Text(
            text.text + part.text,
            _joined(text.token_ids, part.token_ids),
            _joined(text.logprobs, part.logprobs),
            part.end,
        )


async def send_all(url: str, requests: list[Request]) -> list[Reply]:
    """Replies to all requests, in their order, sent by `NUM_CLIENTS` clients."""
    numbered = iter(enumerate(requests))
    replies: dict[int, Reply] = {}

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            for number, request in numbered:
                replies[number] = await send(client, request)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            group.create_task(work())
    return [replies[number] for number in range(len(requests))]


async def send(client: httpx.AsyncClient, request: Request) -> Reply:
    """Send a request and read as far as its client does."""
    reply = Reply()
    if request.manner is Manner.ABORT:
        with suppress(TimeoutError):
            async with asyncio.timeout(request.patience_s):
                await _read(client, request, reply)
    else:
        await _read(client, request, reply)
    return reply


async def _read(client: httpx.AsyncClient, request: Request, reply: Reply) -> None:
    async with client.stream("POST", request.route, json=request.body()) as response:
        reply.status = response.status_code
        if response.status_code == 200 and request.is_streamed:
            await _read_events(response, request, reply)
            return
        answer = json.loads(await response.aread())
    reply.is_complete = True
    if reply.status != 200:
        reply.error = answer["error"]["code"]
        return
    for index, part in _parts(answer, is_native=request.is_native):
        reply.add(index, part)


async def _read_events(response: httpx.Response, request: Request, reply: Reply) -> None:
    num_events = 0
    async for line in response.aiter_lines():
        if not line:
            continue
        assert line.startswith(DATA)
        data = line.removeprefix(DATA)
        if reply.is_complete:
            raise AssertionError(f"{data} follows [DONE]")
        if data == "[DONE]":
            reply.is_complete = True
            continue
        event = json.loads(data)
        assert reply.error is None, "something follows an error"
        if "error" in event:
            reply.error = event["error"]["code"]
            continue
        for index, part in _parts(event, is_native=request.is_native):
            reply.add(index, part)
        num_events += 1
        if request.manner is Manner.CLOSE and num_events == request.num_events:
            return


def _parts(answer: dict[str, Any], *, is_native: bool) -> Iterator[tuple[int, Text]]:
    """Choices of an answer or an event, with their index."""
    if is_native:
        choices = answer.get("results", [answer])
        for number, choice in enumerate(choices):
            scores = choice.get("logprobs")
            logprobs = None if scores is None else [score["logprob"] for score in scores]
            yield (
                choice.get("index", number),
                Text(choice["text"], choice["token_ids"], logprobs, choice.get("finish_reason")),
            )
        return
    for choice in answer["choices"]:
        scores = choice.get("logprobs")
        logprobs = None if scores is None else scores["token_logprobs"]
        yield choice["index"], Text(choice["text"], None, logprobs, choice["finish_reason"])


def _joined(first: list[Any] | None, second: list[Any] | None) -> list[Any] | None:
    return second if first is None else first + (second or [])
