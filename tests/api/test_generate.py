"""`/generate`: text, ids, reason, timings and scheme, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.support import RunningService, assert_error, sse_events
from tests.models import CONTEXT, NAN_TOKEN_ID, build_tokenizer

GREEDY: dict[str, Any] = {"prompt": "The sea", "max_tokens": 8, "temperature": 0}


def _generate(running: RunningService, **fields: Any) -> Any:
    response = running.client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_answer_has_text_ids_reason_timings_and_scheme(running: RunningService) -> None:
    answer = _generate(running, **GREEDY)
    assert answer["text"] == build_tokenizer().decode(answer["token_ids"])
    assert len(answer["token_ids"]) == answer["num_generated_tokens"] == 8
    assert (answer["finish_reason"], answer["scheme"], answer["model"]) == ("length", "none", "tiny")
    timings = answer["timings"]
    assert 0 <= timings["queue_s"] <= timings["first_token_s"] <= timings["total_s"]


def test_text_and_its_token_ids_are_the_same_prompt(running: RunningService) -> None:
    by_text = _generate(running, **GREEDY)
    ids = build_tokenizer().encode("The sea")
    by_ids = _generate(running, token_ids=ids, max_tokens=8, temperature=0)
    assert by_ids["token_ids"] == by_text["token_ids"]
    assert by_ids["num_prompt_tokens"] == by_text["num_prompt_tokens"] == len(ids)


def test_several_prompts_give_results_in_their_order(running: RunningService) -> None:
    alone = [_generate(running, prompt=prompt, max_tokens=5, temperature=0)["text"] for prompt in ("The sea", "A wood")]
    answer = _generate(running, prompts=["The sea", "A wood"], max_tokens=5, temperature=0)
    assert answer["scheme"] == "none"
    assert [result["text"] for result in answer["results"]] == alone


def test_one_prompt_in_a_list_is_a_result_in_a_list(running: RunningService) -> None:
    assert len(_generate(running, prompts=["The sea"], max_tokens=1)["results"]) == 1


def test_a_stream_says_the_same_as_the_whole(running: RunningService) -> None:
    whole = _generate(running, **GREEDY)
    events = sse_events(running.client.post("/generate", json=GREEDY | {"stream": True}).text)
    assert "".join(event["text"] for event in events) == whole["text"]
    assert [token_id for event in events for token_id in event["token_ids"]] == whole["token_ids"]
    last = events[-1]
    assert (last["finish_reason"], last["scheme"]) == ("length", "none")
    assert set(last["timings"]) == {"queue_s", "first_token_s", "total_s"}


def test_without_max_tokens_it_goes_on_to_the_end_of_the_context(running: RunningService) -> None:
    answer = _generate(running, prompt="The sea", temperature=0)
    num_tokens = answer["num_prompt_tokens"] + answer["num_generated_tokens"]
    assert num_tokens == CONTEXT if answer["finish_reason"] == "length" else num_tokens < CONTEXT


@pytest.mark.usefixtures("still_good")
def test_a_stream_that_fails_midway_ends_with_an_error_event(running: RunningService) -> None:
    fields = {"prompt": "The sea", "max_tokens": 5, "logit_bias": {str(NAN_TOKEN_ID): 100}}
    answer = running.client.post("/generate", json=fields)
    assert_error(answer, 500, param=None, code="engine_nonfinite", message="NaN or infinite logits")
    response = running.client.post("/generate", json=fields | {"stream": True})
    assert response.status_code == 200
    *texts, error = sse_events(response.text)
    assert error == answer.json()
    assert texts[-1]["token_ids"] == [NAN_TOKEN_ID]
