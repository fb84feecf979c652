"""LangChain's chat and text models against a real service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from openai import BadRequestError, DefaultAsyncHttpxClient
from pydantic import BaseModel, SecretStr

from tests.api.support import RunningService
from tests.clients.conftest import KEY, MODEL

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
CHAT = [SystemMessage("Be brief."), HumanMessage("Where is the sea?")]


class Weather(BaseModel):
    """What a chat is to say of the weather."""

    is_wet: bool


@pytest.fixture(scope="module")
def chat(served: RunningService) -> Iterator[ChatOpenAI]:
    chat = ChatOpenAI(base_url=f"{served.url}/v1", api_key=SecretStr(KEY), model=MODEL, **GREEDY)
    yield chat
    chat.root_client.close()  # LangChain gives all its models the same one


@pytest.fixture(scope="module")
def text(served: RunningService) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key=SecretStr(KEY), model=MODEL, **GREEDY)


def test_a_chat_is_answered_with_its_metadata(chat: ChatOpenAI) -> None:
    answer = chat.invoke(CHAT)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 12
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == MODEL


def test_an_answer_goes_on_in_the_next_turn(chat: ChatOpenAI) -> None:
    answer = chat.invoke(CHAT)
    assert chat.invoke([*CHAT, answer, HumanMessage([{"type": "text", "text": "And the wood?"}])]).content


def test_streams_say_the_same_and_have_the_usage(chat: ChatOpenAI) -> None:
    whole = chat.invoke(CHAT)
    chunks = list(chat.stream(CHAT, stream_usage=True))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.content == whole.content
    assert joined.usage_metadata == whole.usage_metadata


def test_batches_are_answered_in_order(chat: ChatOpenAI) -> None:
    questions: list[Any] = ["The sea", "A wood", "The hill"]
    assert [answer.content for answer in chat.batch(questions)] == [chat.invoke(each).content for each in questions]


def test_the_asynchronous_ways_say_the_same(chat: ChatOpenAI, text: OpenAI, served: RunningService) -> None:
    async def run() -> tuple[Any, str, str]:
        async with DefaultAsyncHttpxClient() as http:
            own: dict[str, Any] = {
                "base_url": f"{served.url}/v1",
                "api_key": KEY,
                "model": MODEL,
                "http_async_client": http,
            }
            chatting, writing = ChatOpenAI(**own, **GREEDY), OpenAI(**own, **GREEDY)
            answer = await chatting.ainvoke(CHAT)
            streamed = "".join([str(chunk.content) async for chunk in chatting.astream(CHAT)])
            return answer.content, streamed, await writing.ainvoke("The sea")

    content, streamed, continued = asyncio.run(run())
    assert content == streamed == chat.invoke(CHAT).content
    assert continued == text.invoke("The sea")


def test_stop_strings_end_an_answer(chat: ChatOpenAI) -> None:
    content = str(chat.invoke(CHAT).content)
    assert str(chat.invoke(CHAT, stop=[content[3:5]]).content) == content[: content.index(content[3:5])]


def test_logprobs_come_along(chat: ChatOpenAI) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(CHAT)
    assert isinstance(answer, AIMessage)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_structured_output_is_parsed(chat: ChatOpenAI) -> None:
    patient = chat.model_copy(update={"max_tokens": 60})
    assert isinstance(patient.with_structured_output(Weather, method="json_schema").invoke(CHAT), Weather)


def test_an_object_of_any_form_begins_as_one(chat: ChatOpenAI) -> None:
    assert str(chat.bind(response_format={"type": "json_object"}).invoke(CHAT).content).startswith("{")


def test_a_text_is_continued_whole_streamed_and_in_batches(text: OpenAI) -> None:
    whole = text.invoke("The sea")
    assert whole
    assert "".join(text.stream("The sea")) == whole
    assert text.batch(["The sea", "A wood"]) == [whole, text.invoke("A wood")]


def test_tools_are_refused_with_the_reason(chat: ChatOpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"tools: .* is not supported in this version"):
        chat.bind_tools([Weather]).invoke(CHAT)
