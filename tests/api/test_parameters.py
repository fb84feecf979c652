"""What each sampling parameter does to the text, on every route."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.support import RunningService, sse_events
from tests.api.test_chat import MESSAGES
from tests.models import END_OF_TEXT, build_tokenizer

GREEDY: dict[str, Any] = {"prompt": "The sea", "max_tokens": 20, "temperature": 0}
ENDING: dict[str, Any] = GREEDY | {"logit_bias": {"0": 100}}
"""The likeliest token is always the one that ends a text."""


@pytest.fixture
def client(running: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate(running: RunningService, **fields: Any) -> Any:
    response = running.client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_n_texts_of_each_prompt_are_those_of_seeds_that_count_up(
    client: openai.OpenAI, running: RunningService
) -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "seed": 40}
    answer = client.completions.create(model="tiny", prompt=["The sea", "A wood"], n=2, **fields)
    alone = [
        running.complete(prompt=prompt, max_tokens=8, seed=40 + number).json()["choices"][0]["text"]
        for prompt in ("The sea", "A wood")
        for number in range(2)
    ]
    assert [choice.index for choice in answer.choices] == list(range(4))
    assert [choice.text for choice in answer.choices] == alone
    assert len(set(alone)) == 4
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(build_tokenizer().encode(prompt)) for prompt in ("The sea", "A wood"))
    assert answer.usage.completion_tokens == 32


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, None], ids=str)
def test_n_goes_with_every_seed(running: RunningService, seed: int | None) -> None:
    results = generate(running, prompt="The sea", max_tokens=8, n=3, seed=seed)["results"]
    assert len({result["text"] for result in results}) == 3


def test_n_chats_are_streamed_side_by_side(chat: RunningService) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 6, "n": 2, "seed": 5, "temperature": 1.5, "top_k": 0}
    whole = chat.client.post("/v1/chat/completions", json=fields).json()["choices"]
    response = chat.client.post("/v1/chat/completions", json=fields | {"stream": True})
    choices = [event["choices"][0] for event in sse_events(response.text)]
    assert whole[0]["message"] != whole[1]["message"]
    for index, choice in enumerate(whole):
        parts = [part for part in choices if part["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_an_end_of_text_ends_it_unless_it_is_ignored(running: RunningService) -> None:
    ended = generate(running, **ENDING)
    assert (ended["text"], ended["finish_reason"], ended["token_ids"]) == ("", "stop", [])
    ignored = generate(running, **ENDING, ignore_eos=True)
    assert (ignored["finish_reason"], ignored["token_ids"]) == ("length", [0] * 20)


def test_min_tokens_holds_the_end_off(running: RunningService) -> None:
    free = generate(running, **GREEDY, min_tokens=20)["token_ids"]
    held = generate(running, **ENDING, min_tokens=7)
    assert held["finish_reason"] == "stop"
    assert held["token_ids"] == free[:7]
    assert END_OF_TEXT not in held["text"]


def test_min_tokens_holds_stop_strings_off_as_well(running: RunningService) -> None:
    free = generate(running, **GREEDY)
    stop = free["text"][:2]
    assert generate(running, **GREEDY, stop=stop)["text"] == ""
    held = generate(running, **GREEDY, stop=stop, min_tokens=20)
    assert (held["text"], held["finish_reason"]) == (free["text"], "length")
    later = generate(running, **GREEDY, stop=free["text"][-2:], min_tokens=1)
    assert free["text"].startswith(later["text"])
    assert (len(later["text"]) > 0, later["finish_reason"]) == (True, "stop")


def test_a_stop_token_ends_the_text_before_it(running: RunningService) -> None:
    free = generate(running, **GREEDY)["token_ids"]
    last = next(i for i in range(2, len(free)) if free[i] not in free[:i])
    stopped = generate(running, **GREEDY, stop_token_ids=[free[last]])
    assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", free[:last])
    later = generate(running, **GREEDY, stop_token_ids=[free[last]], min_tokens=last + 1)
    assert free[last] not in later["token_ids"][: last + 1]


def test_a_bias_forbids_and_forces_tokens(running: RunningService, client: openai.OpenAI) -> None:
    free = generate(running, **GREEDY)["token_ids"]
    forbidden = generate(running, **GREEDY, logit_bias={str(free[0]): -100})["token_ids"]
    assert free[0] not in forbidden
    forced = client.completions.create(model="tiny", **GREEDY, logit_bias={"77": 100})
    assert forced.choices[0].text == build_tokenizer().decode([77]) * 20


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 10}, {"frequency_penalty": 2}, {"presence_penalty": 2}],
    ids=["repetition", "frequency", "presence"],
)
def test_penalties_make_repetition_rarer_and_rewards_more_frequent(
    running: RunningService, penalty: dict[str, float]
) -> None:
    fields = {"prompt": "The sea", "max_tokens": 100, "temperature": 1, "seed": 1, "min_tokens": 100}
    reward = {name: 0.1 if value == 10 else -value for name, value in penalty.items()}

    def num_repeated(**extra: float) -> int:
        counts = Counter(generate(running, **fields, **extra)["token_ids"])
        return 100 - len(counts)

    assert num_repeated(**penalty) < num_repeated() < num_repeated(**reward)


def test_min_p_1_leaves_the_likeliest_token_only(running: RunningService) -> None:
    greedy = generate(running, **GREEDY)["token_ids"]
    assert generate(running, **GREEDY | {"temperature": 2}, min_p=1, seed=1)["token_ids"] == greedy
    assert generate(running, **GREEDY | {"temperature": 2}, seed=1)["token_ids"] != greedy
