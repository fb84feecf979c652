"""`/tokenize` and `/detokenize` against the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.support import END_OF_TURN, THINK, TURN, RunningService, build_chat_tokenizer
from tests.models import CONTEXT, END_OF_TEXT

MESSAGES = [{"role": "user", "content": "The sea \U0001f600"}]
TEXTS = ["The sea", " \n\n  the  captain\t", "\U0001f600 é \x00", f"{TURN}user\nThe sea{END_OF_TURN}", THINK]


def post(chat: RunningService, route: str, **fields: Any) -> Any:
    response = chat.client.post(route, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_of_a_prompt_are_those_that_a_completion_reads(chat: RunningService, text: str) -> None:
    answer = post(chat, "/tokenize", prompt=text)
    assert answer == {"count": len(answer["tokens"]), "max_model_len": CONTEXT, "tokens": answer["tokens"]}
    assert answer["tokens"] == build_chat_tokenizer().encode(text)
    completion = chat.complete(prompt=text, max_tokens=1).json()
    assert completion["usage"]["prompt_tokens"] == answer["count"]


def test_special_tokens_can_be_left_out(chat: RunningService) -> None:
    with_them = post(chat, "/tokenize", prompt="The sea", add_special_tokens=True)["tokens"]
    without = post(chat, "/tokenize", prompt="The sea", add_special_tokens=False)["tokens"]
    assert with_them == [0, *without]
    assert post(chat, "/tokenize", prompt="The sea")["tokens"] == with_them


def test_ids_of_messages_are_those_that_a_chat_reads(chat: RunningService) -> None:
    answer = post(chat, "/tokenize", messages=MESSAGES)
    oracle = build_chat_tokenizer()
    assert answer["tokens"] == oracle.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert answer == post(chat, "/tokenize", messages=MESSAGES, add_special_tokens=False)
    reply = post(chat, "/v1/chat/completions", messages=MESSAGES, max_tokens=1)
    assert reply["usage"]["prompt_tokens"] == answer["count"]


def test_tokens_are_spelled_if_asked_for(chat: RunningService) -> None:
    answer = post(chat, "/tokenize", prompt=f"the sea{TURN}", return_token_strs=True)
    assert answer["token_strs"] == build_chat_tokenizer().convert_ids_to_tokens(answer["tokens"])
    assert answer["token_strs"][0] == END_OF_TEXT
    assert answer["token_strs"][-1] == TURN


def test_more_tokens_than_the_context_are_counted(chat: RunningService) -> None:
    assert post(chat, "/tokenize", prompt="a b " * 200)["count"] > CONTEXT


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_detokenizing_gives_the_text_back_with_its_special_tokens(chat: RunningService, text: str) -> None:
    tokens = post(chat, "/tokenize", prompt=text)["tokens"]
    assert post(chat, "/detokenize", tokens=tokens) == {"prompt": END_OF_TEXT + text}
    assert post(chat, "/detokenize", tokens=tokens[1:]) == {"prompt": text}


def test_an_id_that_the_tokenizer_does_not_have_is_nothing(chat: RunningService) -> None:
    # The model has one row more than the tokenizer has tokens, as padded models do.
    last = post(chat, "/v1/completions", prompt=[303], max_tokens=1)
    assert last["usage"]["prompt_tokens"] == 1
    assert post(chat, "/detokenize", tokens=[303]) == {"prompt": ""}
