"""`/v1/chat/completions`: whole, streamed, defaults, stop strings, ends, templates that fail, and official clients."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.api.conftest import SETTINGS
from tests.api.support import (
    RunningService,
    assert_error,
    build_chat_tokenizer,
    eventually,
    run_service,
    sse_events,
    write_chat_checkpoint,
)
from tests.models import CONTEXT, VOCAB_SIZE

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the sea?"}]
GREEDY: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
PROMPT_IDS = build_chat_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
END_OF_TURN_ID = VOCAB_SIZE + 1


def post(chat: RunningService, **fields: Any) -> httpx.Response:
    return chat.client.post("/v1/chat/completions", json=fields)


def said(chat: RunningService, **fields: Any) -> str:
    response = post(chat, **fields)
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


@pytest.fixture
def openai_client(chat: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_the_completion_of_what_the_template_writes(chat: RunningService) -> None:
    answer = post(chat, **GREEDY).json()
    completion = chat.complete(prompt=PROMPT_IDS, max_tokens=24, temperature=0).json()
    assert answer["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] == completion["choices"][0]["finish_reason"]
    assert answer["usage"] == completion["usage"]
    assert answer["usage"]["prompt_tokens"] == len(PROMPT_IDS)


def test_a_whole_answer_has_the_form_of_openai(chat: RunningService) -> None:
    answer = post(chat, **GREEDY).json()
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("chat.completion", "talker")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(chat: RunningService) -> None:
    response = post(chat, **GREEDY, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *texts, last = sse_events(response.text)
    assert {event["object"] for event in (first, *texts, last)} == {"chat.completion.chunk"}
    assert len({event["id"] for event in (first, *texts, last)}) == 1
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(event["choices"][0]["delta"]["content"] for event in texts) == said(chat, **GREEDY)
    assert all(event["choices"][0]["finish_reason"] is None and "usage" not in event for event in texts)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]


def test_the_usage_is_the_last_event_if_it_is_asked_for(chat: RunningService) -> None:
    whole = post(chat, **GREEDY).json()
    *chunks, usage = sse_events(post(chat, **GREEDY, stream=True, stream_options={"include_usage": True}).text)
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)


def test_the_official_client_reads_both(openai_client: openai.OpenAI) -> None:
    whole = openai_client.chat.completions.create(model="talker", **GREEDY)
    with openai_client.chat.completions.create(model="talker", **GREEDY, stream=True) as stream:
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert whole.choices[0].message.role == "assistant"
    assert "".join(parts) == whole.choices[0].message.content


def test_the_official_clients_helper_puts_a_stream_together(openai_client: openai.OpenAI, chat: RunningService) -> None:
    text = said(chat, **GREEDY)
    # It takes an answer that was cut by its limit for an error.
    with openai_client.chat.completions.stream(model="talker", **GREEDY, stop=text[10:14]) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == text[: text.index(text[10:14])]
    assert answer.choices[0].finish_reason == "stop"


def test_the_official_asynchronous_client_reads_both(chat: RunningService) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="talker", **GREEDY)
            stream = await client.chat.completions.create(model="talker", **GREEDY, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_the_official_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        openai_client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="the roles must"):
        openai_client.chat.completions.create(model="talker", messages=[{"role": "user", "content": "raise"}])


def test_an_answer_can_be_sent_back_as_it_came(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="talker", **GREEDY).choices[0].message
    again: Any = [*MESSAGES, answer.model_dump(), {"role": "user", "content": "And then?"}]
    more = openai_client.chat.completions.create(model="talker", messages=again, max_tokens=4)
    assert more.usage is not None
    assert more.usage.prompt_tokens > len(PROMPT_IDS) + 20


def test_text_parts_are_lines(chat: RunningService) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the sea?"}]
    in_parts = post(chat, messages=[{"role": "user", "content": parts}], max_tokens=8).json()
    in_lines = post(chat, messages=[{"role": "user", "content": "Where is\nthe sea?"}], max_tokens=8).json()
    assert in_parts["usage"] == in_lines["usage"]
    assert in_parts["choices"] == in_lines["choices"]


def test_without_a_limit_it_goes_on_to_the_end_of_the_context(chat: RunningService) -> None:
    answer = post(chat, messages=MESSAGES, temperature=1.5, top_k=0, seed=5).json()
    is_cut = answer["choices"][0]["finish_reason"] == "length"
    assert (answer["usage"]["total_tokens"] == CONTEXT) == is_cut
    assert answer["usage"]["completion_tokens"] > 16


def test_both_names_of_the_limit_are_the_limit(chat: RunningService) -> None:
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert post(chat, messages=MESSAGES, **fields).json()["usage"]["completion_tokens"] == 3


def test_what_the_generation_config_states_is_the_default_on_every_route(chat: RunningService) -> None:
    greedy, prompt = said(chat, **GREEDY), {"prompt": PROMPT_IDS, "max_tokens": 24}
    # top_k is 1, so that the temperature of 0.7 changes nothing.
    assert said(chat, messages=MESSAGES, max_tokens=24, seed=1) == greedy
    assert chat.complete(**prompt, seed=1).json()["choices"][0]["text"] == greedy
    generated = chat.client.post("/generate", json={"token_ids": PROMPT_IDS, "max_tokens": 24, "seed": 1})
    assert generated.json()["text"] == greedy
    defaults = chat.client.get("/v1/models/talker").json()["sampling_defaults"]
    assert defaults == {"temperature": 0.7, "top_p": 1.0, "top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}


def test_values_of_a_request_go_before_defaults(chat: RunningService) -> None:
    free = {"messages": MESSAGES, "max_tokens": 24, "top_k": 0, "temperature": 2, "seed": 1}
    assert said(chat, **free) != said(chat, **GREEDY)


def test_every_token_that_the_generation_config_lists_ends_an_answer(chat: RunningService, tmp_path: Path) -> None:
    unbounded = chat.client.post("/generate", json={"token_ids": PROMPT_IDS, "max_tokens": 24, "temperature": 0}).json()
    ids = unbounded["token_ids"]
    last = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    write_chat_checkpoint(tmp_path / "ends", eos_token_id=[0, END_OF_TURN_ID, ids[last]])
    with run_service(SETTINGS | {"model": str(tmp_path / "ends"), "served_model_name": "org/ends"}) as service:
        answer = post(service, **GREEDY, model="org/ends").json()
    assert answer["model"] == "org/ends"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == build_chat_tokenizer().decode(ids[:last])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_no_part_of_a_stop_string_is_seen_wherever_tokens_end(chat: RunningService, stream: bool) -> None:
    text = said(chat, **GREEDY)
    for start in range(1, len(text) - 6):
        stop = text[start : start + 6]
        response = post(chat, **GREEDY, stop=[stop, "never to be seen"], stream=stream)
        if stream:
            choices = [event["choices"][0] for event in sse_events(response.text)]
            got = "".join(choice["delta"].get("content", "") for choice in choices)
            reason = choices[-1]["finish_reason"]
        else:
            got, reason = response.json()["choices"][0]["message"]["content"], "stop"
            assert response.json()["choices"][0]["finish_reason"] == reason
        assert (got, reason) == (text[: text.index(stop)], "stop")


def test_a_client_that_leaves_ends_its_work(chat: RunningService) -> None:
    before = chat.metric("requests_finished_total", reason="abort")
    fields = {"messages": MESSAGES, "temperature": 0, "stream": True}
    with chat.client.stream("POST", "/v1/chat/completions", json=fields) as response:
        assert next(response.iter_lines()).startswith("data: ")
    assert eventually(lambda: chat.metric("requests_finished_total", reason="abort") == before + 1)
    assert eventually(lambda: chat.metric("kv_blocks", state="used") == 0)


def test_a_model_without_a_template_takes_prompts_only(tmp_path: Path) -> None:
    write_chat_checkpoint(tmp_path / "mute", template=None)
    with run_service(SETTINGS | {"model": str(tmp_path / "mute")}) as service:
        for route in ("/v1/chat/completions", "/tokenize"):
            refused = service.client.post(route, json={"messages": MESSAGES})
            message = "no chat template, so it takes no messages; send a prompt to /v1/completions"
            assert_error(refused, 400, param="messages", code="no_chat_template", message=message)
        assert service.client.get("/v1/models/mute").json()["has_chat_template"] is False
        assert service.complete(prompt="The sea", max_tokens=2).status_code == 200


def test_a_template_that_loops_does_not_hold_up_other_requests(chat: RunningService) -> None:
    said(chat, **GREEDY)  # the worker has started
    with ThreadPoolExecutor() as pool:
        loops = [pool.submit(post, chat, messages=[{"role": "user", "content": "loop"}]) for _ in range(3)]
        others = [said(chat, **GREEDY), chat.complete(prompt="The sea", max_tokens=2).status_code]
        assert not any(loop.done() for loop in loops)
        assert others == [said(chat, **GREEDY), 200]
        for loop in loops:
            message = "more than 2 s or 256 MiB for these messages; change them, or send a prompt to /v1/completions"
            assert_error(loop.result(), 400, param="messages", code="template_limit", message=message)
    assert said(chat, **GREEDY) == others[0]


def test_a_worker_that_is_killed_is_replaced(chat: RunningService) -> None:
    text = said(chat, **GREEDY)
    for worker in _workers():
        worker.send_signal(signal.SIGKILL)
        worker.wait(60)
    assert said(chat, **GREEDY) == text
    assert len(_workers()) == 1


def _workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any(part.endswith("template_worker.py") for part in child.cmdline())]


def test_the_worker_starts_with_the_first_chat_and_ends_with_the_service(tmp_path: Path) -> None:
    write_chat_checkpoint(tmp_path / "model")
    before = set(_workers())
    with run_service(SETTINGS | {"model": str(tmp_path / "model")}) as service:
        service.complete(prompt="a", max_tokens=1)
        assert set(_workers()) == before
        said(service, **GREEDY)
        (worker,) = set(_workers()) - before
    assert not worker.is_running()


def test_the_demo_model_chats_in_prose() -> None:
    with run_service({"device": "cpu", "threads": 1, "kv_memory": 2**24}) as service:
        fields = {"messages": [{"role": "user", "content": "The captain looked at the sea and"}], "temperature": 0}
        text = said(service, **fields, max_tokens=20)
        whole = service.complete(prompt="The captain looked at the sea and\n", max_tokens=20, temperature=0).json()
    assert text == whole["choices"][0]["text"]
    assert len(text.split()) >= 8
