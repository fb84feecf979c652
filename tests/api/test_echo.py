"""Prompts that come back in the answer, with and without log-probabilities, against transformers' own forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

from service.api.sampling import check_prompt_logprobs
from service.api.schemas import CompletionRequest, GenerateRequest
from service.errors import InvalidRequest
from tests.api.support import RunningService, assert_error, build_chat_tokenizer, sse_events
from tests.models import END_OF_TEXT, build_model, build_tokenizer

PROMPT = "The sea and the 海 of stones"
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
TOLERANCE = 1e-4
"""Both compute in float32, in different orders; logits are below 20, and 1e-4 is 50 roundings of them."""


def ids_of(text: str) -> list[int]:
    ids: list[int] = build_tokenizer().encode(text)
    return ids


def log_softmax(token_ids: list[int]) -> Tensor:
    """Log-probabilities float32[len(token_ids) - 1, vocab] at each token but the first."""
    with torch.inference_mode():
        logits: Tensor = build_model("faulty")(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(-1)[:-1]


def choice_of(running: RunningService, **fields: Any) -> Any:
    response = running.complete(**fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.fixture
def client(running: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("prompt", [PROMPT, ids_of(PROMPT)], ids=["text", "ids"])
def test_the_prompt_stands_before_the_text_and_is_not_counted_as_generated(
    running: RunningService, prompt: Any
) -> None:
    counted = running.metric("generated_tokens_total")
    plain = running.complete(**GREEDY | {"prompt": prompt}).json()
    echoed = running.complete(**GREEDY | {"prompt": prompt}, echo=True).json()
    assert echoed["choices"][0] == plain["choices"][0] | {"text": PROMPT + plain["choices"][0]["text"]}
    assert echoed["usage"] == plain["usage"]
    assert running.metric("generated_tokens_total") == counted + 12
    assert running.complete(**GREEDY | {"prompt": prompt}, echo=False).json()["choices"] == plain["choices"]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("prompt", [PROMPT, ids_of(PROMPT)], ids=["text", "ids"])
def test_the_official_client_reads_scores_of_the_prompt_that_are_the_models_own(
    client: openai.OpenAI, prompt: Any, max_tokens: int
) -> None:
    completion = client.completions.create(
        model="tiny", **GREEDY | {"prompt": prompt, "max_tokens": max_tokens}, echo=True, logprobs=3
    )
    choice, prompt_ids = completion.choices[0], ids_of(PROMPT)
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert choice.text.startswith(PROMPT)
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(prompt_ids), max_tokens)
    assert len(found.tokens) == len(prompt_ids) + max_tokens
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    for row, token_id, logprob, top in zip(
        log_softmax(prompt_ids), prompt_ids[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=False
    ):
        assert logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        assert logprob in top.values()
        assert sorted(top.values())[-3:] == pytest.approx(row.topk(3).values.tolist()[::-1], abs=TOLERANCE)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        # Bytes that might have begun a character are certain to be none only with the token after them.
        assert token.startswith("bytes:") or choice.text[offset:].lstrip("\ufffd").startswith(token)
    assert "".join(token for token in found.tokens[: len(prompt_ids)] if not token.startswith("bytes:")) == (
        PROMPT.replace("海", "")
    )


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"logprobs": 2, "max_tokens": 0}, {"max_tokens": 0}])
def test_a_stream_tells_the_prompt_first_and_the_same_as_the_whole(
    running: RunningService, fields: dict[str, Any]
) -> None:
    fields = GREEDY | {"prompt": [PROMPT, [70], "A wood"], "echo": True} | fields
    whole = running.complete(**fields).json()["choices"]
    events = sse_events(running.complete(**fields, stream=True).text)
    for index, choice in enumerate(whole):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in fields:
            for key, expected in choice["logprobs"].items():
                assert [value for part in parts if part["logprobs"] for value in part["logprobs"][key]] == expected
        else:
            assert all(part["logprobs"] is None for part in parts)


def test_each_choice_of_each_prompt_begins_with_its_own(running: RunningService) -> None:
    fields = {"prompt": ["The sea", [77, 78, 79]], "n": 2, "max_tokens": 3, "echo": True, "logprobs": 1, "seed": 1}
    answer = running.complete(**fields).json()
    prompts = ["The sea"] * 2 + [build_tokenizer().decode([77, 78, 79])] * 2
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert choice["text"].startswith(prompt)
        assert choice["logprobs"]["token_logprobs"].count(None) == 1
    first, second = (choice["logprobs"]["token_logprobs"] for choice in answer["choices"][:2])
    assert first[:5] == second[:5]
    assert first[5:] != second[5:]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}


def test_stop_strings_are_sought_behind_the_prompt_only(running: RunningService) -> None:
    text = choice_of(running, **GREEDY)["text"]
    stopped = choice_of(running, **GREEDY, stop=["sea", text[2:4]], echo=True, logprobs=1)
    assert stopped["text"] == PROMPT + text[: text.index(text[2:4])]
    assert stopped["finish_reason"] == "stop"
    assert all(offset < len(stopped["text"]) for offset in stopped["logprobs"]["text_offset"])


def test_the_token_that_ends_a_text_has_a_score_beside_those_of_the_prompt_only(running: RunningService) -> None:
    fields = {"prompt": "The sea", "max_tokens": 1, "temperature": 0, "logit_bias": {"0": 100}, "logprobs": 1}
    echoed = choice_of(running, **fields, echo=True)
    assert (echoed["text"], echoed["finish_reason"]) == ("The sea", "stop")
    assert len(echoed["logprobs"]["tokens"]) == len(ids_of("The sea")) + 1
    assert echoed["logprobs"]["tokens"][-1] == END_OF_TEXT
    assert echoed["logprobs"]["text_offset"][-1] == len("The sea")
    expected = log_softmax([*ids_of("The sea"), 0])[-1, 0].item()
    assert echoed["logprobs"]["token_logprobs"][-1] == pytest.approx(expected, abs=TOLERANCE)
    assert choice_of(running, **fields)["logprobs"]["tokens"] == []


def test_special_tokens_are_in_the_text_of_ids_and_have_scores_in_any_case(chat: RunningService) -> None:
    tokenizer = build_chat_tokenizer()
    for prompt, begin in (("The <think> sea", ""), (tokenizer.encode("The <think> sea"), END_OF_TEXT)):
        choice = choice_of(chat, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        found = choice["logprobs"]
        assert choice["text"] == f"{begin}The <think> sea"
        assert found["tokens"][0] == END_OF_TEXT
        assert "".join(found["tokens"][1:]) == "The <think> sea"
        for token, offset in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
            assert choice["text"][offset:].startswith(token)
    written = choice_of(chat, prompt=f"The{END_OF_TEXT} sea", max_tokens=0, echo=True, logprobs=0)
    assert written["text"] == f"The{END_OF_TEXT} sea"
    for token, offset in list(zip(written["logprobs"]["tokens"], written["logprobs"]["text_offset"], strict=True))[1:]:
        assert written["text"][offset:].startswith(token)


def test_the_native_route_tells_scores_of_the_prompt_beside_the_text(running: RunningService) -> None:
    fields = {"token_ids": ids_of(PROMPT), "max_tokens": 4, "temperature": 0}
    plain = running.client.post("/generate", json=fields).json()
    answer = running.client.post("/generate", json=fields | {"prompt_logprobs": 2}).json()
    entries = answer.pop("prompt_logprobs")
    assert answer | {"timings": None} == plain | {"timings": None}
    assert [entry["token_id"] for entry in entries] == fields["token_ids"]
    assert (entries[0]["logprob"], entries[0]["top_logprobs"]) == (None, [])
    for entry, row in zip(entries[1:], log_softmax(ids_of(PROMPT)), strict=True):
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=TOLERANCE)
        assert [one["token_id"] for one in entry["top_logprobs"]] == row.topk(2).indices.tolist()
    events = sse_events(running.client.post("/generate", json=fields | {"prompt_logprobs": 2, "stream": True}).text)
    assert [entry for event in events for entry in event.get("prompt_logprobs", [])] == entries
    assert "".join(event["text"] for event in events) == plain["text"]
    only = running.client.post("/generate", json=fields | {"prompt_logprobs": 2, "max_tokens": 0}).json()
    assert (only["text"], only["token_ids"], only["finish_reason"]) == ("", [], "length")
    assert only["prompt_logprobs"] == entries


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_no_tokens_are_generated_only_if_the_prompt_is_told(running: RunningService, stream: bool) -> None:
    refused = running.complete(**GREEDY | {"max_tokens": 0}, stream=stream)
    message = (
        "max_tokens is 0; then only the prompt can be told, which was not asked for; send at least 1, or echo true"
    )
    assert_error(refused, 400, param="max_tokens", code="invalid_value", message=message)
    refused = running.client.post("/generate", json=GREEDY | {"max_tokens": 0, "stream": stream})
    assert_error(refused, 400, param="max_tokens", code="invalid_value", message="1, or prompt_logprobs as well")


def test_a_request_is_told_so_many_log_probabilities_of_prompts_and_no_more() -> None:
    completion = CompletionRequest(prompt=["a"], echo=True, logprobs=20)
    native = GenerateRequest(prompt="a", prompt_logprobs=20)
    message = " is 20 for 25600 prompt tokens, which makes 537600 log-probabilities; at most 262144"
    for fields, param in ((completion, "logprobs"), (native, "prompt_logprobs")):
        check_prompt_logprobs(fields, 262144 // 21)
        with pytest.raises(InvalidRequest, match=f"^{param}{message}") as caught:
            check_prompt_logprobs(fields, 25600)
        assert caught.value.param == param


def test_a_wrong_token_id_is_refused_before_it_is_decoded(running: RunningService) -> None:
    for token_id in (-1, 300, 2**63 - 1):
        response = running.complete(prompt=[5, token_id], echo=True, max_tokens=0)
        assert_error(response, 400, param="prompt", code="invalid_value", message="outside the vocabulary, 0..299")
