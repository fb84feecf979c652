"""Bad chats, and bad requests to translate: status, code, param and message, and a good chat after each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from tests.api.conftest import MAX_BODY_BYTES
from tests.api.support import CHAT_VOCAB_SIZE, RunningService, assert_error
from tests.api.test_bad_input import BAD_FIELDS, INVALID, MISSING, NO_JSON, TOO_LONG, UNKNOWN, UNSUPPORTED
from tests.models import CONTEXT

CHAT_ROUTE = "/v1/chat/completions"
GOOD: list[Any] = [{"role": "user", "content": "The sea"}]
PARTS = 'a string or a list of 1 to 256 parts {"type": "text", "text": "..."} and no others'
OF_COMPLETIONS = ('"prompt"', '"top_k": 301', '"max_tokens": 0', '"max_tokens": -1')
SHARED = [field for field in BAD_FIELDS if not field.startswith(OF_COMPLETIONS)]


def content(value: Any) -> list[Any]:
    return [{"role": "user", "content": value}]


BAD_MESSAGES: list[tuple[Any, str, str | None, str]] = [
    (5, INVALID, "messages", "must be a valid list"),
    ([], INVALID, "messages", "must have at least 1 item"),
    ([*GOOD * 2049], INVALID, "messages", "must have at most 2048 items"),
    ({"role": "user", "content": "a"}, INVALID, "messages", "must be a valid list"),
    (["a"], INVALID, "messages.0", "must be"),
    ([[]], INVALID, "messages.0", "must be"),
    ([{"role": "user"}], MISSING, "messages.0.content", "is missing"),
    ([{"content": "a"}], MISSING, "messages.0.role", "is missing"),
    (
        [*GOOD, {"role": "tool", "content": "a"}],
        INVALID,
        "messages.1.role",
        "'system', 'developer', 'user' or 'assistant'",
    ),
    ([{"role": "User", "content": "a"}], INVALID, "messages.0.role", "'system', 'developer', 'user'"),
    ([{"role": 5, "content": "a"}], INVALID, "messages.0.role", "'system', 'developer', 'user'"),
    (content(None), INVALID, "messages.0.content", PARTS),
    (content(5), INVALID, "messages.0.content", PARTS),
    (content([]), INVALID, "messages.0.content", PARTS),
    (content({"type": "text", "text": "a"}), INVALID, "messages.0.content", PARTS),
    (content(["a"]), INVALID, "messages.0.content", PARTS),
    (content([{"type": "text"}]), INVALID, "messages.0.content", PARTS),
    (content([{"type": "text", "text": None}]), INVALID, "messages.0.content", PARTS),
    (content([{"type": ["text"], "text": "a"}]), INVALID, "messages.0.content", PARTS),
    (content([{"type": "text", "text": "a", "cache": 1}]), INVALID, "messages.0.content", PARTS),
    (content([{"type": "text", "text": "a"}] * 257), INVALID, "messages.0.content", PARTS),
    (
        content([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        INVALID,
        "messages.0.content",
        PARTS,
    ),
    (
        content([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
        INVALID,
        "messages.0.content",
        PARTS,
    ),
    (content([{"type": "refusal", "refusal": "no"}]), INVALID, "messages.0.content", PARTS),
    (content("\ud800"), NO_JSON, None, "no character"),
    (content([{"type": "text", "text": "\udfff"}]), NO_JSON, None, "no character"),
    ([{"role": "user", "content": "a", "name": ""}], INVALID, "messages.0.name", "at least 1 character"),
    ([{"role": "user", "content": "a", "name": "a" * 257}], INVALID, "messages.0.name", "at most 256 characters"),
    ([{"role": "user", "content": "a", "weight": 1}], UNKNOWN, "messages.0.weight", "unknown field"),
    (
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        UNSUPPORTED,
        "messages.0.tool_calls",
        r"null or \[\]",
    ),
    ([{"role": "assistant", "content": "a", "refusal": "no"}], UNSUPPORTED, "messages.0.refusal", "not supported"),
    (content("raise"), "template_error", "messages", r"these messages: the roles must \[1malternate; change them"),
    (content("wrong"), "template_error", "messages", "TypeError: can only concatenate str"),
    (content("grow"), "template_limit", "messages", "more than 2 s or 256 MiB"),
    (content("loop"), "template_limit", "messages", "more than 2 s or 256 MiB"),
    (content("stretch"), TOO_LONG, "messages", "the chat has more than"),
    (content("a" * 20_000), TOO_LONG, "messages", "the chat has 20000 characters; the context holds at most"),
    (content("a\U000f0000"), "template_error", "messages", r"U\+F0000"),
]
BAD_CHAT_FIELDS: dict[str, tuple[str, str, str]] = {
    '"max_tokens": 0': (INVALID, "max_tokens", "must be greater than or equal to 1"),
    '"max_completion_tokens": 0': (INVALID, "max_completion_tokens", "must be greater than or equal to 1"),
    '"max_completion_tokens": 2147483648': (INVALID, "max_completion_tokens", "must be less than or equal"),
    '"max_completion_tokens": "5"': (INVALID, "max_completion_tokens", "must be a valid integer"),
    '"max_tokens": 4, "max_completion_tokens": 5': (INVALID, "max_completion_tokens", "differs from max_tokens"),
    f'"max_completion_tokens": {CONTEXT}': (TOO_LONG, "max_completion_tokens", "lower max_completion_tokens"),
    f'"max_tokens": {CONTEXT}': (TOO_LONG, "max_tokens", "lower max_tokens"),
    f'"top_k": {CHAT_VOCAB_SIZE + 1}': (INVALID, "top_k", "305; the vocabulary has 304 tokens"),
    '"stream_options": {"include_usage": true}': (INVALID, "stream_options", "with a stream only"),
    '"stream": true, "stream_options": {"include_obfuscation": true}': (
        *(UNSUPPORTED, "stream_options.include_obfuscation"),
        "not supported",
    ),
    '"logprobs": 5': (INVALID, "logprobs", "must be a valid boolean"),
    '"top_logprobs": 5': (
        INVALID,
        "top_logprobs",
        "is allowed with logprobs only; leave it out, or send logprobs true",
    ),
    '"logprobs": false, "top_logprobs": 5': (INVALID, "top_logprobs", "is allowed with logprobs only"),
    '"logprobs": true, "top_logprobs": 21': (INVALID, "top_logprobs", "must be less than or equal to 20"),
    '"tools": [{"type": "function", "function": {"name": "f"}}]': (UNSUPPORTED, "tools", r"null or \[\]"),
    '"tools": {}': (UNSUPPORTED, "tools", "not supported"),
    '"tool_choice": "required"': (UNSUPPORTED, "tool_choice", 'null or "none" or "auto"'),
    '"tool_choice": {"type": "function", "function": {"name": "f"}}': (UNSUPPORTED, "tool_choice", "not supported"),
    '"functions": [{"name": "f"}]': (UNSUPPORTED, "functions", "not supported"),
    '"function_call": {"name": "f"}': (UNSUPPORTED, "function_call", "not supported"),
    '"response_format": {"type": "json_schema", "json_schema": {}}': (
        MISSING,
        "response_format.json_schema.name",
        "is missing",
    ),
    '"modalities": ["text", "audio"]': (UNSUPPORTED, "modalities", r'null or \["text"\]'),
    '"audio": {"voice": "a", "format": "wav"}': (UNSUPPORTED, "audio", "not supported"),
    '"prediction": {"type": "content", "content": "a"}': (UNSUPPORTED, "prediction", "not supported"),
    '"reasoning_effort": "high"': (UNSUPPORTED, "reasoning_effort", "not supported"),
    '"verbosity": "low"': (UNSUPPORTED, "verbosity", "not supported"),
    '"web_search_options": {}': (UNSUPPORTED, "web_search_options", "not supported"),
    '"moderation": {"model": "a"}': (UNSUPPORTED, "moderation", "not supported"),
    '"prompt": "a"': (UNKNOWN, "prompt", "unknown field"),
    '"best_of": 1': (UNKNOWN, "best_of", "unknown field"),
    '"chat_template": "{{ 5 }}"': (UNKNOWN, "chat_template", "unknown field"),
    '"chat_template_kwargs": {"tokenize": true}': (UNKNOWN, "chat_template_kwargs", "unknown field"),
    '"add_generation_prompt": false': (UNKNOWN, "add_generation_prompt", "unknown field"),
    '"continue_final_message": true': (UNKNOWN, "continue_final_message", "unknown field"),
    '"documents": []': (UNKNOWN, "documents", "unknown field"),
}


@pytest.fixture(scope="module")
def good_answer(chat: RunningService) -> Any:
    return _answer(chat)


@pytest.fixture(autouse=True)
def still_good(chat: RunningService, good_answer: Any) -> Iterator[None]:
    """After the test a good chat gets the answer that it got before."""
    yield
    assert _answer(chat) == good_answer


def _answer(chat: RunningService) -> Any:
    response = chat.client.post(CHAT_ROUTE, json={"messages": GOOD, "max_tokens": 4, "temperature": 0})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def _post(chat: RunningService, route: str, body: str) -> Any:
    return chat.client.post(route, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("route", [CHAT_ROUTE, "/tokenize"])
@pytest.mark.parametrize(
    ("messages", "code", "param", "message"), BAD_MESSAGES, ids=[json.dumps(row[0])[:48] for row in BAD_MESSAGES]
)
def test_bad_messages_are_400_that_names_what_is_wrong(
    chat: RunningService, messages: Any, code: str, param: str, message: str, route: str
) -> None:
    response = _post(chat, route, json.dumps({"messages": messages}))
    assert_error(response, 400, param=param, code=code, message=message)
    assert "passwd" not in response.text


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [("{}", MISSING, "messages: is missing; send it"), ('{"messages": null}', INVALID, "must be a valid list")],
    ids=["missing", "null"],
)
def test_a_chat_without_messages_is_400(chat: RunningService, body: str, code: str, message: str) -> None:
    assert_error(_post(chat, CHAT_ROUTE, body), 400, param="messages", code=code, message=message)


@pytest.mark.parametrize("field", [*SHARED, *BAD_CHAT_FIELDS], ids=lambda field: field[:40])
def test_a_bad_field_is_400_that_names_it(chat: RunningService, field: str) -> None:
    code, param, message = (BAD_FIELDS | BAD_CHAT_FIELDS)[field]
    response = _post(chat, CHAT_ROUTE, f'{{"messages": {json.dumps(GOOD)}, {field}}}')
    assert_error(response, 400, param=param, code=code, message=message)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_chat_that_fills_the_context_is_400_with_the_numbers(chat: RunningService, stream: bool) -> None:
    messages = content("a b " * 200)
    response = chat.client.post(CHAT_ROUTE, json={"messages": messages, "stream": stream})
    message = "prompt tokens and 1 new ones make .*; the context is 256 tokens; shorten the prompt"
    assert_error(response, 400, param="messages", code=TOO_LONG, message=message)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "a"},
        {"prompt_cache_key": "a", "parallel_tool_calls": False, "n": 1, "logit_bias": {}, "presence_penalty": 0},
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "auto", "modalities": ["text"]},
        {"response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "verbosity": "medium"},
        {"n": 4, "logprobs": True, "top_logprobs": 20},
        {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"tools": None, "tool_choice": None, "response_format": None, "stop": None, "max_completion_tokens": None},
        {"messages": content("")},
        {"messages": content("\U0001f600 \x00 \ufffd <|end|>")},
        {"messages": [{"role": "system", "content": "a", "name": "b"}, *GOOD]},
        {"messages": [*GOOD, {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}]},
        {"messages": [*GOOD, {"role": "assistant", "content": "a", "annotations": [], "tool_calls": []}]},
    ],
    ids=[
        "ignored",
        "neutral",
        "no tools",
        "text",
        "logprobs",
        "stream",
        "null",
        "empty",
        "any character",
        "name",
        "answer",
        "lists",
    ],
)
def test_what_is_allowed_is_taken(chat: RunningService, fields: dict[str, Any]) -> None:
    response = chat.client.post(CHAT_ROUTE, json={"messages": GOOD, "max_tokens": 1} | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ({}, MISSING, "prompt", "neither of prompt and messages given; send exactly one"),
        ({"prompt": "a", "messages": GOOD}, INVALID, "prompt", "both of prompt and messages given"),
        ({"prompt": ""}, INVALID, "prompt", "at least 1 character"),
        ({"prompt": 5}, INVALID, "prompt", "must be a valid string"),
        ({"prompt": ["a"]}, INVALID, "prompt", "must be a valid string"),
        ({"prompt": "\ud800"}, NO_JSON, None, "no character"),
        ({"prompt": "a" * 20_000}, TOO_LONG, "prompt", "20000 characters; 256 tokens, the context, hold at most"),
        ({"prompt": "a", "add_special_tokens": "yes"}, INVALID, "add_special_tokens", "must be a valid boolean"),
        ({"messages": GOOD, "add_special_tokens": True}, INVALID, "add_special_tokens", "the chat template writes"),
        ({"prompt": "a", "return_token_strs": 1}, INVALID, "return_token_strs", "must be a valid boolean"),
        ({"prompt": "a", "max_tokens": 1}, UNKNOWN, "max_tokens", "unknown field"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_cannot_be_tokenized_is_400(
    chat: RunningService, body: dict[str, Any], code: str, param: str, message: str
) -> None:
    assert_error(_post(chat, "/tokenize", json.dumps(body)), 400, param=param, code=code, message=message)


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ({}, MISSING, "tokens", "is missing"),
        ({"tokens": []}, INVALID, "tokens", "is empty"),
        ({"tokens": "a"}, INVALID, "tokens", "a list of token ids"),
        ({"tokens": ["5"]}, INVALID, "tokens", "a list of token ids"),
        ({"tokens": [True]}, INVALID, "tokens", "a list of token ids"),
        ({"tokens": [5.0]}, INVALID, "tokens", "a list of token ids"),
        ({"tokens": [[5]]}, INVALID, "tokens", "a list of token ids"),
        ({"tokens": [5, -1]}, INVALID, "tokens", "-1 is outside the vocabulary, 0..303; remove it"),
        ({"tokens": [CHAT_VOCAB_SIZE]}, INVALID, "tokens", "304 is outside the vocabulary"),
        ({"tokens": [2**64]}, INVALID, "tokens", "18446744073709551616 is outside the vocabulary"),
        ({"tokens": [5] * (CONTEXT + 1)}, TOO_LONG, "tokens", "257 tokens; the context is 256 tokens; send fewer"),
        ({"tokens": [5], "skip_special_tokens": True}, UNKNOWN, "skip_special_tokens", "unknown field"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_cannot_be_detokenized_is_400(
    chat: RunningService, body: dict[str, Any], code: str, param: str, message: str
) -> None:
    assert_error(_post(chat, "/detokenize", json.dumps(body)), 400, param=param, code=code, message=message)


@pytest.mark.parametrize(
    ("route", "body"),
    [(CHAT_ROUTE, {"messages": GOOD}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})],
    ids=["chat", "tokenize", "detokenize"],
)
def test_every_new_route_keeps_the_common_rules(chat: RunningService, route: str, body: dict[str, Any]) -> None:
    unknown = chat.client.post(route, json=body | {"model": "gpt-9"})
    assert_error(unknown, 404, param="model", code="model_not_found", message="'gpt-9' is not served here")
    assert_error(chat.client.get(route), 405, param=None, code="method_not_allowed", message="use POST")
    assert_error(_post(chat, route, "{"), 400, param=None, code="invalid_json", message="not valid JSON")
    assert_error(_post(chat, route, "[]"), 400, param=None, code=INVALID, message="the body: must be")
    plain = chat.client.post(route, content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert_error(plain, 400, param=None, code="invalid_content_type", message="Content-Type: application/json")
    large = json.dumps(body | {"model": "a" * MAX_BODY_BYTES})
    assert_error(_post(chat, route, large), 413, param=None, code="body_too_large", message="more than 100000 bytes")
    assert chat.client.post(route, json=body | {"model": "talker"}).status_code == 200


@pytest.mark.parametrize("schema", [ChatRequest, TokenizeRequest, DetokenizeRequest], ids=["chat", "text", "ids"])
def test_every_number_of_a_request_has_both_bounds(schema: type[BaseModel]) -> None:
    for name, field in schema.model_json_schema()["properties"].items():
        for option in field.get("anyOf", [field]):
            if option.get("type") in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & set(option), name
                assert {"maximum", "exclusiveMaximum"} & set(option), name
