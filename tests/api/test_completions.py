"""`/v1/completions`: whole, streamed, several prompts, stop strings, seeds, and failures in between."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.api.support import RunningService, assert_error, eventually, sse_events
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID, CONTEXT, NAN_TOKEN_ID, RAISE_TOKEN_ID

GREEDY: dict[str, Any] = {"prompt": "The sea", "max_tokens": 12, "temperature": 0}
BLOCK, NAN, RAISE = ([7, fault, 6] for fault in (BLOCK_TOKEN_ID, NAN_TOKEN_ID, RAISE_TOKEN_ID))


@pytest.fixture
def openai_client(running: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_reads_a_whole_completion(openai_client: openai.OpenAI) -> None:
    completion = openai_client.completions.create(model="tiny", **GREEDY)
    choice = completion.choices[0]
    assert completion.object == "text_completion"
    assert choice.finish_reason == "length"
    assert choice.text
    usage = completion.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 12, 17)


def test_the_official_client_reads_a_stream_that_says_the_same(openai_client: openai.OpenAI) -> None:
    whole = openai_client.completions.create(model="tiny", **GREEDY)
    with openai_client.completions.create(
        model="tiny", **GREEDY, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    *texts, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in texts)
    assert (usage.choices, usage.usage) == ([], whole.usage)


def test_the_official_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        openai_client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature: 3 must be less than"):
        openai_client.completions.create(model="tiny", prompt="a", temperature=3)


def test_a_stream_without_options_has_no_usage(running: RunningService) -> None:
    response = running.complete(**GREEDY, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in event for event in sse_events(response.text))


def test_max_tokens_is_16_by_default_and_less_at_the_end_of_the_context(running: RunningService) -> None:
    assert running.complete(prompt="The sea", temperature=0).json()["usage"]["completion_tokens"] == 16
    near_end = running.complete(prompt=[7] * (CONTEXT - 3), temperature=0).json()
    assert near_end["usage"]["completion_tokens"] <= 3
    exact = running.complete(prompt=[7] * (CONTEXT - 3), max_tokens=3, temperature=0)
    assert exact.status_code == 200


@pytest.mark.parametrize(
    "prompts",
    [["The sea", "A wood"], [[77, 78], [79, 80, 81]], ["The sea", [77, 78]]],
    ids=["texts", "ids", "both"],
)
def test_each_prompt_is_a_choice_that_says_what_it_says_alone(running: RunningService, prompts: list[Any]) -> None:
    alone = [running.complete(prompt=prompt, max_tokens=6, temperature=0).json() for prompt in prompts]
    together = running.complete(prompt=prompts, max_tokens=6, temperature=0).json()
    assert [choice["index"] for choice in together["choices"]] == [0, 1]
    assert [choice["text"] for choice in together["choices"]] == [one["choices"][0]["text"] for one in alone]
    assert together["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)


def test_several_prompts_are_streamed_side_by_side(running: RunningService) -> None:
    fields = {"prompt": ["The sea", "A wood"], "max_tokens": 6, "temperature": 0}
    whole = running.complete(**fields).json()["choices"]
    events = sse_events(running.complete(**fields, stream=True).text)
    for index, choice in enumerate(whole):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_ends_the_text_before_it(running: RunningService, stream: bool) -> None:
    text = running.complete(**GREEDY).json()["choices"][0]["text"]
    stop = text[4:7]
    response = running.complete(**GREEDY, stop=[stop], stream=stream)
    if stream:
        choices = [event["choices"][0] for event in sse_events(response.text)]
        got, reason = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        got, reason = choice["text"], choice["finish_reason"]
    assert got == text[: text.index(stop)]
    assert reason == "stop"


def test_a_stop_string_ends_the_work_as_well(running: RunningService) -> None:
    before = running.metric("requests_finished_total", reason="stop")
    text = running.complete(**GREEDY).json()["choices"][0]["text"]
    running.complete(prompt="The sea", max_tokens=200, temperature=0, stop=text[:2])
    assert running.metric("requests_finished_total", reason="stop") == before + 1


def test_a_seed_fixes_the_text_and_another_seed_changes_it(running: RunningService) -> None:
    def sample(seed: int) -> str:
        text: str = running.complete(prompt="The sea", max_tokens=20, seed=seed).json()["choices"][0]["text"]
        return text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        (RAISE, "engine_error", "token 2 was met"),
        (NAN, "engine_nonfinite", "NaN or infinite logits"),
    ],
    ids=["raise", "nan"],
)
@pytest.mark.usefixtures("still_good")
def test_a_failure_before_the_first_token_is_an_http_status(
    running: RunningService, prompt: list[int], code: str, message: str, stream: bool
) -> None:
    response = running.complete(prompt=prompt, max_tokens=4, temperature=0, stream=stream)
    assert_error(response, 500, param=None, code=code, message=message)
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.usefixtures("still_good")
def test_a_full_queue_is_429_with_the_time_to_wait(running: RunningService, gate: Gate) -> None:
    rejected = running.metric("requests_rejected_total", reason="queue_full")
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, prompt=BLOCK, max_tokens=1)
        assert gate.reached.wait(60)
        # The engine is inside a step, so that all of these wait: 4 are as many as --max-queue allows.
        waiting = pool.submit(running.complete, prompt=["a"] * 4, max_tokens=1)
        assert eventually(lambda: running.metric("requests_waiting") == 4)
        response = running.complete(prompt="a", max_tokens=1)
        assert_error(response, 429, param=None, code="queue_full", message="4 texts wait, --max-queue allows 4")
        assert int(response.headers["retry-after"]) >= 1
        gate.opened.set()
        assert blocked.result().status_code == waiting.result().status_code == 200
    assert running.metric("requests_rejected_total", reason="queue_full") == rejected + 1


@pytest.mark.usefixtures("still_good")
def test_a_full_queue_is_told_before_the_body_is_read(running: RunningService, gate: Gate) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\n"
    with ThreadPoolExecutor() as pool, socket.create_connection(("127.0.0.1", running.port), 60) as client:
        blocked = pool.submit(running.complete, prompt=BLOCK, max_tokens=1)
        assert gate.reached.wait(60)
        waiting = pool.submit(running.complete, prompt=["a"] * 4, max_tokens=1)
        assert eventually(lambda: running.metric("requests_waiting") == 4)
        client.sendall(head)
        assert client.recv(65536).startswith(b"HTTP/1.1 429 ")
        client.sendall(b"no json" + head)  # the connection goes on behind a body that nobody wanted
        assert client.recv(65536).startswith(b"HTTP/1.1 429 ")
        assert running.client.post("/tokenize", json={"prompt": "a"}).status_code == 200
        gate.opened.set()
        assert blocked.result().status_code == waiting.result().status_code == 200
        client.sendall(b"no json" + head.replace(b"Host", b"Content-Type: application/json\r\nHost") + b"no json")
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.usefixtures("still_good")
def test_prompts_that_find_no_room_in_the_queue_leave_none_of_them_behind(running: RunningService, gate: Gate) -> None:
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(running.complete, prompt=BLOCK, max_tokens=1)
        assert gate.reached.wait(60)
        waiting = pool.submit(running.complete, prompt=["a"] * 2, max_tokens=1)
        assert eventually(lambda: running.metric("requests_waiting") == 2)
        assert running.complete(prompt=["a"] * 3, max_tokens=1).status_code == 429
        assert running.metric("requests_waiting") == 2
        gate.opened.set()
        assert blocked.result().status_code == waiting.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.usefixtures("still_good")
def test_a_client_that_leaves_ends_its_work(running: RunningService, gate: Gate, stream: bool) -> None:
    before = running.metric("requests_finished_total", reason="abort")
    with httpx.Client(base_url=running.url) as client, ThreadPoolExecutor() as pool:
        fields = {"prompt": BLOCK, "max_tokens": 200, "temperature": 0, "stream": stream}
        request = pool.submit(client.post, "/v1/completions", json=fields, timeout=httpx.Timeout(60, read=0.2))
        assert gate.reached.wait(60)
        with pytest.raises(httpx.ReadTimeout):  # httpx closes the connection with it
            request.result()
    gate.opened.set()
    assert eventually(lambda: running.metric("requests_finished_total", reason="abort") == before + 1)
    assert eventually(lambda: running.metric("kv_blocks", state="used") == 0)


@pytest.mark.usefixtures("still_good")
def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_work(running: RunningService) -> None:
    before = running.metric("requests_finished_total", reason="abort")
    fields = {"prompt": ["The sea"] * 4, "max_tokens": 240, "temperature": 0, "stream": True}
    with running.client.stream("POST", "/v1/completions", json=fields) as response:
        assert next(response.iter_lines()).startswith("data: ")
    assert eventually(lambda: running.metric("requests_finished_total", reason="abort") == before + 4)
    assert eventually(lambda: running.metric("kv_blocks", state="used") == 0)


def test_tokens_delivered_and_computed_are_counted(running: RunningService) -> None:
    names = ("prompt_tokens_total", "generated_tokens_total", "engine_tokens_total")
    before = [running.metric(name) for name in names]
    running.complete(**GREEDY)
    # The engine computes 5 prompt tokens and 11 of the 12 new ones: the last is only sampled.
    assert [running.metric(name) - old for name, old in zip(names, before, strict=True)] == [5, 12, 16]
