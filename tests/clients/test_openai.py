"""The official client against a real service: what it sends, what it reads, when it tries again."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.resources.chat import Completions as Chats
from openai.resources.completions import Completions
from pydantic import BaseModel

from service.api.chat_schemas import ChatRequest
from service.api.schemas import CompletionRequest
from service.loading.progress import Phase
from tests.api.support import RunningService, eventually
from tests.clients.conftest import KEY, MODEL
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID, RAISE_TOKEN_ID

MESSAGES: list[Any] = [{"role": "user", "content": "The sea"}]
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
BLOCK = [7, BLOCK_TOKEN_ID, 6]
FAILING: dict[str, Any] = GREEDY | {"logit_bias": {str(RAISE_TOKEN_ID): 100}, "stream": True}
"""The first token is sampled, and the step that reads it raises."""
OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "idempotency_key"}
"""Parameters of the client itself."""

SHARED: dict[str, list[Any]] = {
    "model": [MODEL],
    "max_tokens": [1, 8, None],
    "temperature": [0, 1.5, None],
    "top_p": [0.5, None],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{"5": -100}, {}, None],
    "n": [1, 3, None],
    "seed": [0, -(2**63), None],
    "stop": ["a", ["a", "b"], None],
    "stream": [False, None],
    "stream_options": [None],
    "user": ["somebody"],
}
TAKEN: dict[str, dict[str, list[Any]]] = {
    "completions": SHARED
    | {
        "prompt": ["The sea", ["The sea", "A wood"], [7, 6], [[7, 6], [9]]],
        "best_of": [1, None],
        "echo": [False, True],
        "logprobs": [0, 5, None],
        "suffix": [None],
    },
    "chats": SHARED
    | {
        "messages": [MESSAGES, [{"role": "developer", "content": [{"type": "text", "text": "Hello"}]}, *MESSAGES]],
        "audio": [None],
        "function_call": ["none"],
        "functions": [[]],
        "logprobs": [True, False, None],
        "max_completion_tokens": [8, None],
        "metadata": [{"a": "b"}],
        "modalities": [["text"], None],
        "moderation": [None],
        "parallel_tool_calls": [True],
        "prediction": [None],
        "prompt_cache_key": ["a"],
        "prompt_cache_options": [None],
        "prompt_cache_retention": [None],
        "reasoning_effort": ["none", None],
        "response_format": [{"type": "text"}],
        "safety_identifier": ["a"],
        "service_tier": ["auto"],
        "store": [False],
        "tool_choice": ["none"],
        "tools": [[]],
        "top_logprobs": [None],
        "verbosity": ["medium", None],
        "web_search_options": [None],
    },
}


@pytest.fixture
def client(served: RunningService) -> Iterator[openai.OpenAI]:
    """As a user makes it: with retries, two by default."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        yield client


def _parameters(resource: type[Completions] | type[Chats]) -> set[str]:
    return set(inspect.signature(resource.create).parameters) - OWN


@pytest.mark.parametrize(
    ("resource", "schema", "taken"),
    [(Completions, CompletionRequest, TAKEN["completions"]), (Chats, ChatRequest, TAKEN["chats"])],
    ids=["completions", "chats"],
)
def test_every_parameter_that_the_client_has_is_a_field(
    resource: type[Completions] | type[Chats],
    schema: type[CompletionRequest] | type[ChatRequest],
    taken: dict[str, Any],
) -> None:
    assert _parameters(resource) <= schema.model_fields.keys()
    assert _parameters(resource) == taken.keys()


@pytest.mark.parametrize("parameter", sorted(TAKEN["completions"]))
def test_every_parameter_of_completions_is_taken(client: openai.OpenAI, parameter: str) -> None:
    for value in TAKEN["completions"][parameter]:
        fields: dict[str, Any] = {"model": MODEL, "prompt": "The sea", "max_tokens": 2} | {parameter: value}
        assert client.completions.create(**fields).choices


@pytest.mark.parametrize("parameter", sorted(TAKEN["chats"]))
def test_every_parameter_of_chats_is_taken(client: openai.OpenAI, parameter: str) -> None:
    for value in TAKEN["chats"][parameter]:
        fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES} | {parameter: value}
        if parameter not in ("max_tokens", "max_completion_tokens"):
            fields["max_tokens"] = 2
        assert client.chat.completions.create(**fields).choices


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "pennyweight")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_wrong_key_is_the_clients_own_error(served: RunningService) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong")
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_errors_have_their_parts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    error = caught.value
    assert (error.param, error.code, error.type) == ("temperature", "invalid_value", "invalid_request_error")
    assert error.request_id
    assert isinstance(error.body, dict)
    assert "must be less than or equal to 2" in error.body["message"]


def test_the_raw_response_has_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, **GREEDY, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    answer = raw.parse()
    assert answer._request_id == "mine-1"
    assert answer.system_fingerprint
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_logprobs_are_objects_on_both_routes(client: openai.OpenAI) -> None:
    completion = client.completions.create(prompt="The sea", **GREEDY, logprobs=2).choices[0].logprobs
    assert completion is not None
    assert completion.tokens is not None
    assert completion.token_logprobs is not None
    assert len(completion.tokens) == len(completion.token_logprobs) == 8
    chat = client.chat.completions.create(messages=MESSAGES, **GREEDY, logprobs=True, top_logprobs=3).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert 0 <= math.exp(token.logprob) <= 1
        assert token.bytes is not None


def test_the_asynchronous_client_reads_both_routes_whole_and_streamed(served: RunningService) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            completion, chat = await asyncio.gather(
                client.completions.create(prompt="The sea", **GREEDY),
                client.chat.completions.create(messages=MESSAGES, **GREEDY),
            )
            text, usage = "", None
            options: Any = {"include_usage": True}
            stream = await client.completions.create(prompt="The sea", **GREEDY, stream=True, stream_options=options)
            async for chunk in stream:
                text += chunk.choices[0].text if chunk.choices else ""
                usage = chunk.usage or usage
            assert (text, usage) == (completion.choices[0].text, completion.usage)
            said, usage = "", None
            chats = await client.chat.completions.create(
                messages=MESSAGES, **GREEDY, stream=True, stream_options=options
            )
            async for event in chats:
                said += (event.choices[0].delta.content or "") if event.choices else ""
                usage = event.usage or usage
            assert (said, usage) == (chat.choices[0].message.content, chat.usage)

    asyncio.run(run())


@pytest.mark.parametrize("route", ["completions", "chats"])
def test_a_failure_inside_a_stream_is_raised(client: openai.OpenAI, route: str) -> None:
    stream: Any = (
        client.completions.create(prompt="The sea", **FAILING)
        if route == "completions"
        else client.chat.completions.create(messages=MESSAGES, **FAILING)
    )
    assert next(stream).choices
    with pytest.raises(openai.APIError, match="token 2 was met") as caught:
        list(stream)
    assert caught.value.code == "engine_error"


def test_a_failure_inside_a_stream_is_raised_in_the_asynchronous_client(served: RunningService) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            async for _ in await client.chat.completions.create(messages=MESSAGES, **FAILING):
                pass

    with pytest.raises(openai.APIError, match="token 2 was met"):
        asyncio.run(run())


def test_a_failure_that_a_retry_cannot_cure_is_tried_once(client: openai.OpenAI, served: RunningService) -> None:
    failed = served.metric("requests_total", route="/v1/completions", status="500")
    with pytest.raises(openai.InternalServerError, match="token 2 was met"):
        client.completions.create(model=MODEL, prompt=[RAISE_TOKEN_ID])
    assert served.metric("requests_total", route="/v1/completions", status="500") == failed + 1


def test_a_request_that_took_too_long_is_tried_once(client: openai.OpenAI, served: RunningService, gate: Gate) -> None:
    failed = served.metric("requests_total", route="/v1/completions", status="408")
    with pytest.raises(openai.APIStatusError, match="took longer than") as caught:
        client.completions.create(model=MODEL, prompt=BLOCK)
    assert caught.value.status_code == 408
    assert caught.value.response.headers["x-should-retry"] == "false"
    gate.opened.set()
    assert served.metric("requests_total", route="/v1/completions", status="408") == failed + 1


def test_a_full_queue_is_tried_again_after_the_time_that_was_named(
    client: openai.OpenAI, served: RunningService, gate: Gate
) -> None:
    rejected = served.metric("requests_rejected_total", reason="queue_full")
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(served.complete, prompt=BLOCK, max_tokens=1)
        assert gate.reached.wait(60)
        waiting = pool.submit(served.complete, prompt=["a"] * 4, max_tokens=1)
        assert eventually(lambda: served.metric("requests_waiting") == 4)
        patient = pool.submit(client.completions.create, model=MODEL, prompt="a", max_tokens=1)
        assert eventually(lambda: served.metric("requests_rejected_total", reason="queue_full") > rejected)
        gate.opened.set()
        assert patient.result().choices
        assert blocked.result().status_code == waiting.result().status_code == 200


def test_a_service_that_is_not_ready_is_asked_again(client: openai.OpenAI, served: RunningService) -> None:
    progress = served.service.state.progress
    progress.enter(Phase.WARMUP)
    try:
        rejected = served.metric("requests_rejected_total", reason="loading")
        with ThreadPoolExecutor() as pool:
            patient = pool.submit(client.completions.create, model=MODEL, prompt="a", max_tokens=1)
            assert eventually(lambda: served.metric("requests_rejected_total", reason="loading") > rejected)
            assert [model.id for model in client.models.list()] == [MODEL]
            progress.enter(Phase.READY)
            assert patient.result().choices
    finally:
        progress.enter(Phase.READY)


def test_a_client_without_patience_leaves_and_its_work_ends(served: RunningService, gate: Gate) -> None:
    aborted = served.metric("requests_finished_total", reason="abort")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
    with client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model=MODEL, prompt=BLOCK, timeout=0.5)
    gate.opened.set()
    assert eventually(lambda: served.metric("requests_finished_total", reason="abort") == aborted + 1)
    assert served.metric("kv_blocks", state="used") == 0


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        is_wet: bool

    answer = client.chat.completions.parse(messages=MESSAGES, model=MODEL, response_format=Weather, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Weather)
