"""Bad requests: status, code, param and message of each, and a good request after it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from service.api.schemas import CompletionRequest, GenerateRequest
from tests.api.conftest import MAX_BODY_BYTES
from tests.api.support import RunningService, assert_error
from tests.models import CONTEXT, VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("still_good")

INVALID, UNKNOWN, MISSING = "invalid_value", "unknown_field", "missing_field"
UNSUPPORTED, TOO_LONG, NO_JSON = "not_supported", "context_length_exceeded", "invalid_json"

BAD_FIELDS: dict[str, tuple[str, str | None, str]] = {
    # JSON of the field: (code, param, message)
    '"prompt": 5': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": null': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": {"text": "a"}': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": [1, "a"]': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": [true]': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": [1.5]': (INVALID, "prompt", "a string or a list of token ids"),
    '"prompt": ""': (INVALID, "prompt", "is empty"),
    '"prompt": []': (INVALID, "prompt", "is empty"),
    '"prompt": [""]': (INVALID, "prompt", "is empty"),
    '"prompt": [[]]': (INVALID, "prompt", "is empty"),
    '"prompt": [[[1]]]': (INVALID, "prompt", "a string or a list of token ids"),
    f'"prompt": {json.dumps(["a"] * 129)}': (INVALID, "prompt", "a list of 1 to 128 prompts"),
    '"prompt": "\\ud800"': (NO_JSON, None, "no character"),
    '"prompt": "\\udc00\\ud800"': (NO_JSON, None, "no character"),
    '"max_tokens": 0': (INVALID, "max_tokens", "max_tokens is 0; then only the prompt can be told"),
    '"max_tokens": -1': (INVALID, "max_tokens", "must be greater than or equal to 0"),
    '"max_tokens": 2147483648': (INVALID, "max_tokens", "must be less than or equal to 2147483647"),
    '"max_tokens": "16"': (INVALID, "max_tokens", "must be a valid integer"),
    '"max_tokens": 1.0': (INVALID, "max_tokens", "must be a valid integer"),
    '"max_tokens": true': (INVALID, "max_tokens", "must be a valid integer"),
    '"max_tokens": [16]': (INVALID, "max_tokens", "must be a valid integer"),
    f'"max_tokens": {"9" * 4000}': (INVALID, "max_tokens", "must be"),
    '"temperature": NaN': (INVALID, "temperature", "must be a finite number"),
    '"temperature": Infinity': (INVALID, "temperature", "must be a finite number"),
    '"temperature": -Infinity': (INVALID, "temperature", "must be a finite number"),
    '"temperature": 1e999': (INVALID, "temperature", "must be a finite number"),
    '"temperature": -0.1': (INVALID, "temperature", "must be greater than or equal to 0"),
    '"temperature": 2.1': (INVALID, "temperature", "must be less than or equal to 2"),
    '"temperature": "1"': (INVALID, "temperature", "must be a valid number"),
    '"top_p": 0': (INVALID, "top_p", "must be greater than 0"),
    '"top_p": 1.01': (INVALID, "top_p", "must be less than or equal to 1"),
    '"top_p": NaN': (INVALID, "top_p", "must be a finite number"),
    '"top_k": -1': (INVALID, "top_k", "must be greater than or equal to 0"),
    f'"top_k": {VOCAB_SIZE + 1}': (INVALID, "top_k", "301; the vocabulary has 300 tokens"),
    '"seed": 9223372036854775808': (INVALID, "seed", "must be less than or equal to 9223372036854775807"),
    '"seed": -9223372036854775809': (INVALID, "seed", "must be greater than or equal to -9223372036854775808"),
    '"stop": ""': (INVALID, "stop", "1 to 256 characters"),
    '"stop": [5]': (INVALID, "stop", "at most 16"),
    f'"stop": {json.dumps(["a"] * 17)}': (INVALID, "stop", "at most 16"),
    f'"stop": "{"a" * 257}"': (INVALID, "stop", "1 to 256 characters"),
    '"stop": "\\udfff"': (NO_JSON, None, "no character"),
    '"stream": "yes"': (INVALID, "stream", "must be a valid boolean"),
    '"stream": 1': (INVALID, "stream", "must be a valid boolean"),
    '"model": 5': (INVALID, "model", "must be a valid string"),
    '"model": ""': (INVALID, "model", "must have at least 1 character"),
    '"model": "\\ud800"': (NO_JSON, None, "no character"),
    '"n": 0': (INVALID, "n", "must be greater than or equal to 1"),
    '"n": 17': (INVALID, "n", "must be less than or equal to 16"),
    '"n": true': (INVALID, "n", "must be a valid integer"),
    '"min_p": -0.1': (INVALID, "min_p", "must be greater than or equal to 0"),
    '"min_p": 1.1': (INVALID, "min_p", "must be less than or equal to 1"),
    '"presence_penalty": 2.1': (INVALID, "presence_penalty", "must be less than or equal to 2"),
    '"presence_penalty": "1"': (INVALID, "presence_penalty", "must be a valid number"),
    '"frequency_penalty": -2.1': (INVALID, "frequency_penalty", "must be greater than or equal to -2"),
    '"frequency_penalty": NaN': (INVALID, "frequency_penalty", "must be a finite number"),
    '"repetition_penalty": 0': (INVALID, "repetition_penalty", "must be greater than or equal to 0.1"),
    '"repetition_penalty": 10.1': (INVALID, "repetition_penalty", "must be less than or equal to 10"),
    '"logit_bias": {"5": 100.1}': (INVALID, "logit_bias", "to numbers from -100 to 100"),
    '"logit_bias": {"5": NaN}': (INVALID, "logit_bias", "to numbers from -100 to 100"),
    '"logit_bias": {"5": true}': (INVALID, "logit_bias", "to numbers from -100 to 100"),
    '"logit_bias": {"5": "1"}': (INVALID, "logit_bias", "to numbers from -100 to 100"),
    '"logit_bias": {"the": 1}': (INVALID, "logit_bias", "a map of at most 300 token ids"),
    '"logit_bias": {"05": 1}': (INVALID, "logit_bias", "a map of at most 300 token ids"),
    '"logit_bias": {"-1": 1}': (INVALID, "logit_bias", "a map of at most 300 token ids"),
    '"logit_bias": [5]': (INVALID, "logit_bias", "a map of at most 300 token ids"),
    f'"logit_bias": {json.dumps({str(i): 1 for i in range(301)})}': (INVALID, "logit_bias", "at most 300"),
    '"logit_bias": {"5": 1, "304": 1}': (INVALID, "logit_bias", "logit_bias has token id 304; the vocabulary is 0.."),
    '"min_tokens": -1': (INVALID, "min_tokens", "must be greater than or equal to 0"),
    '"min_tokens": 1.5': (INVALID, "min_tokens", "must be a valid integer"),
    '"min_tokens": 5, "max_tokens": 4': (
        *(INVALID, "min_tokens"),
        "min_tokens is 5; the request ends after 4 new tokens; lower min_tokens or raise max_tokens",
    ),
    '"ignore_eos": 1': (INVALID, "ignore_eos", "must be a valid boolean"),
    '"stop_token_ids": 5': (INVALID, "stop_token_ids", "a list of at most 256 token ids"),
    '"stop_token_ids": ["5"]': (INVALID, "stop_token_ids", "a list of at most 256 token ids"),
    f'"stop_token_ids": {json.dumps([5] * 257)}': (INVALID, "stop_token_ids", "a list of at most 256 token ids"),
    '"stop_token_ids": [-1]': (INVALID, "stop_token_ids", "stop_token_ids has token id -1; the vocabulary is 0.."),
    '"temprature": 1': (UNKNOWN, "temprature", "temprature: unknown field"),
    '"\\ud800": 1': (NO_JSON, None, "no character"),
}
BAD_COMPLETION_FIELDS: dict[str, tuple[str, str | None, str]] = {
    '"best_of": 2': (UNSUPPORTED, "best_of", "not supported"),
    '"echo": 1': (INVALID, "echo", "must be"),
    '"logprobs": 21': (INVALID, "logprobs", "must be less than or equal to 20"),
    '"logprobs": -1': (INVALID, "logprobs", "must be greater than or equal to 0"),
    '"logprobs": true': (INVALID, "logprobs", "must be a valid integer"),
    '"top_logprobs": 1': (UNKNOWN, "top_logprobs", "unknown field"),
    f'"n": 2, "prompt": {json.dumps(["a"] * 128 + ["b"])}': (INVALID, "prompt", "a list of 1 to 128 prompts"),
    f'"n": 3, "prompt": {json.dumps(["a"] * 86)}': (
        *(INVALID, "n"),
        "n is 3 and there are 86 prompts, which makes 258 texts; at most 256 are allowed",
    ),
    '"suffix": "a"': (UNSUPPORTED, "suffix", "not supported"),
    '"stream_options": {"include_usage": true}': (INVALID, "stream_options", "with a stream only"),
    '"stream": true, "stream_options": {"usage": true}': (UNKNOWN, "stream_options.usage", "unknown field"),
    '"token_ids": [1]': (UNKNOWN, "token_ids", "unknown field"),
}


def _body(field: str) -> str:
    """A request with one bad field; the prompt is good unless it is the bad one."""
    return f"{{{field}}}" if '"prompt"' in field else f'{{"prompt": "The sea", {field}}}'


def _post(running: RunningService, route: str, body: str | bytes, **headers: str) -> Any:
    return running.client.post(route, content=body, headers={"Content-Type": "application/json"} | headers)


@pytest.mark.parametrize("field", BAD_FIELDS | BAD_COMPLETION_FIELDS, ids=lambda field: field[:40])
def test_a_bad_field_is_400_that_names_it(running: RunningService, field: str) -> None:
    code, param, message = (BAD_FIELDS | BAD_COMPLETION_FIELDS)[field]
    response = _post(running, "/v1/completions", _body(field))
    assert_error(response, 400, param=param, code=code, message=message)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field", [field for field in BAD_FIELDS if not field.startswith('"prompt"')], ids=lambda field: field[:40]
)
def test_the_native_route_refuses_the_same_fields(running: RunningService, field: str) -> None:
    code, param, message = BAD_FIELDS[field]
    assert_error(_post(running, "/generate", _body(field)), 400, param=param, code=code, message=message)


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ("{}", MISSING, "prompt", "no prompt given; send exactly one of prompt, prompts and token_ids"),
        ('{"prompt": "a", "token_ids": [5]}', INVALID, "token_ids", "prompt and token_ids given"),
        ('{"prompt": ["a"]}', INVALID, "prompt", "must be a valid string"),
        ('{"prompt": ""}', INVALID, "prompt", "must have at least 1 character"),
        ('{"prompts": "a"}', INVALID, "prompts", "a list of 1 to 128 prompts"),
        ('{"prompts": []}', INVALID, "prompts", "a list of 1 to 128 prompts"),
        ('{"token_ids": "a"}', INVALID, "token_ids", "a list of token ids"),
        ('{"token_ids": []}', INVALID, "token_ids", "is empty"),
        (f'{{"token_ids": [{VOCAB_SIZE}]}}', INVALID, "token_ids", "300 is outside the vocabulary, 0..299"),
        ('{"prompt": "a", "logprobs": 1}', INVALID, "logprobs", "must be a valid boolean"),
        ('{"prompt": "a", "top_logprobs": 1}', INVALID, "top_logprobs", "is allowed with logprobs only"),
        ('{"prompts": ["a", [-1]]}', INVALID, "prompts", "-1 is outside the vocabulary"),
        (json.dumps({"token_ids": [5] * CONTEXT}), TOO_LONG, "token_ids", "256 prompt tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_native_routes_own_fields_are_checked(
    running: RunningService, body: str, code: str | None, param: str, message: str
) -> None:
    assert_error(_post(running, "/generate", body), 400, param=param, code=code, message=message)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("", MISSING, "the body: is missing"),
        ("{", NO_JSON, "not valid JSON"),
        ('{"prompt": "a"} x', NO_JSON, "not valid JSON"),
        (b'{"prompt": "\xff"}', NO_JSON, "not valid JSON"),
        ('{"prompt": ' + "[" * 50_000, NO_JSON, "not valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", NO_JSON, "not valid JSON"),
        ("[]", INVALID, "the body: must be"),
        ('"prompt"', INVALID, "the body: must be"),
        ("5", INVALID, "the body: must be"),
    ],
    ids=["empty", "cut", "trailing", "no UTF-8", "deep", "long number", "list", "string", "number"],
)
def test_a_body_that_is_no_json_object_is_400(
    running: RunningService, body: str | bytes, code: str, message: str
) -> None:
    assert_error(_post(running, "/v1/completions", body), 400, param=None, code=code, message=message)


@pytest.mark.parametrize(
    ("content_type", "message"),
    [
        ("text/plain", "Content-Type 'text/plain'"),
        ("application/x-www-form-urlencoded", "x-www-form"),
        (None, "no Content-Type"),
    ],
    ids=["text", "form", "none"],
)
def test_another_content_type_is_400_that_says_which_is_right(
    running: RunningService, content_type: str | None, message: str
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = running.client.post("/v1/completions", content='{"prompt": "a"}', headers=headers)
    assert_error(response, 400, param=None, code="invalid_content_type", message=message)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": [5] * 250, "max_tokens": 7}, "max_tokens", "250 prompt tokens and 7 new ones make 257; .* 256"),
        ({"prompt": [5] * CONTEXT}, "prompt", "256 prompt tokens and 1 new ones make 257; .* 256"),
        ({"prompt": "a " * 400}, "prompt", "prompt tokens and 1 new ones make .* 256"),
        ({"prompt": "a" * 20_000}, "prompt", "20000 characters; 256 tokens, the context, hold at most"),
    ],
    ids=["with max_tokens", "ids", "text", "characters"],
)
def test_more_than_the_context_is_400_with_the_numbers(
    running: RunningService, fields: dict[str, Any], param: str, message: str
) -> None:
    assert_error(running.complete(**fields), 400, param=param, code=TOO_LONG, message=message)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**31, 2**64])
def test_a_token_id_outside_the_vocabulary_is_400(running: RunningService, token_id: int) -> None:
    response = running.complete(prompt=[5, token_id])
    assert_error(response, 400, param="prompt", code=INVALID, message=f"{token_id} is outside the vocabulary, 0..299")


@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
def test_an_unknown_model_is_404(running: RunningService, route: str) -> None:
    response = running.client.post(route, json={"model": "gpt-9", "prompt": "a"})
    assert_error(response, 404, param="model", code="model_not_found", message="'gpt-9' is not served here; .* 'tiny'")


@pytest.mark.parametrize(
    ("method", "route"),
    [("GET", "/v1/chat"), ("POST", "/v1/embeddings"), ("GET", "/generate/"), ("GET", "/%ff%00")],
)
def test_an_unknown_route_is_404(running: RunningService, method: str, route: str) -> None:
    response = running.client.request(method, route)
    assert_error(response, 404, param=None, code="unknown_route", message="no such route; GET /openapi.json")


@pytest.mark.parametrize(
    ("method", "route", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/generate", "POST"),
        ("POST", "/metrics", "GET"),
        ("BREW", "/livez", "GET"),
    ],
)
def test_another_method_is_405_that_names_the_right_one(
    running: RunningService, method: str, route: str, allowed: str
) -> None:
    response = running.client.request(method, route)
    assert_error(response, 405, param=None, code="method_not_allowed", message=f"use {allowed}")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("sized", [True, False], ids=["stated length", "chunked"])
@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
def test_an_oversized_body_is_413(running: RunningService, route: str, sized: bool) -> None:
    body = json.dumps({"prompt": "a" * MAX_BODY_BYTES}).encode()
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    response = _post(running, route, body if sized else pieces)  # type: ignore[arg-type]
    assert_error(response, 413, param=None, code="body_too_large", message="more than 100000 bytes")


def test_a_body_of_exactly_the_limit_is_read(running: RunningService) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert _post(running, "/v1/completions", body.ljust(MAX_BODY_BYTES)).status_code == 200
    assert _post(running, "/v1/completions", body.ljust(MAX_BODY_BYTES + 1)).status_code == 413


def test_an_error_does_not_repeat_what_was_sent(running: RunningService) -> None:
    secret = "correct horse " * 50
    response = running.complete(
        prompt={"text": secret}, temperature=secret, **{f"field{i}": secret for i in range(100)}
    )
    message = "temperature: a text of 700 characters must be a valid number"
    assert_error(response, 400, param="temperature", code=INVALID, message=message)
    assert "horse" not in response.text
    assert len(response.content) < 2000


def test_headers_beyond_the_limit_are_refused_and_the_connection_is_closed(running: RunningService) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 1_000_000 + b"\r\n\r\n")
        answer = peer.recv(65536)
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("schema", [CompletionRequest, GenerateRequest], ids=["completions", "generate"])
def test_every_number_of_a_request_has_both_bounds(schema: type[CompletionRequest] | type[GenerateRequest]) -> None:
    for name, field in schema.model_json_schema()["properties"].items():
        for option in field.get("anyOf", [field]):
            if option.get("type") in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & set(option), name
                assert {"maximum", "exclusiveMaximum"} & set(option), name


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "a"},
        {"prompt_cache_key": "a", "parallel_tool_calls": False},
        {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "min_p": 0, "repetition_penalty": 1.0, "logit_bias": None},
        {"n": None, "min_tokens": None, "ignore_eos": None, "stop_token_ids": None, "logprobs": 0},
        {"n": 4, "min_p": 1, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.1},
        {"n": 4, "min_p": 0.5, "presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 10},
        {"logit_bias": {str(i): -100 for i in range(1, VOCAB_SIZE)}, "logprobs": 20},
        {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": list(range(256))},
        {"temperature": None, "top_p": None, "top_k": None, "seed": None, "stop": None, "max_tokens": None},
        {"temperature": 0, "top_p": 1, "top_k": VOCAB_SIZE, "seed": -(2**63), "stop": [], "model": "tiny"},
        {"temperature": 2, "top_p": 1e-9, "top_k": 0, "seed": 2**63 - 1, "stop": ["a" * 256] * 16},
        {"prompt": "\U0001f600 \x00 \ufffd"},
    ],
    ids=[
        "ignored",
        "ignored too",
        "neutral",
        "neutral too",
        "null too",
        "low",
        "high",
        "biased",
        "ends",
        "null",
        "lowest",
        "highest",
        "any character",
    ],
)
def test_what_is_allowed_is_taken(running: RunningService, fields: dict[str, Any]) -> None:
    response = running.complete(**{"prompt": "The sea", "max_tokens": 1} | fields)
    assert response.status_code == 200, response.text
