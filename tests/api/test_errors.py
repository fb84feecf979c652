"""The envelope on every error, what it tells of a value, and what it keeps to itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from service.api.errors import error_headers, error_response
from service.errors import (
    EngineFailure,
    MethodNotAllowed,
    QueueFull,
    RequestError,
    RequestTimedOut,
    ServiceFailed,
    Unavailable,
)
from tests.api.support import RunningService, assert_error
from tests.models import RAISE_TOKEN_ID

VALUES = {
    # JSON of the field: (param, message)
    '"presence_penalty": 2.5': ("presence_penalty", "presence_penalty: 2.5 must be less than or equal to 2"),
    '"temperature": NaN': ("temperature", "temperature: NaN must be a finite number"),
    '"temperature": "hot"': ("temperature", 'temperature: "hot" must be a valid number'),
    '"max_tokens": null, "n": true': ("n", "n: true must be a valid integer"),
    '"best_of": 2': ("best_of", "best_of: 2 is not supported in this version; leave it out, or send null or 1"),
    '"model": ""': ("model", 'model: "" must have at least 1 character'),
    '"stop": [5, 6]': ("stop", "stop: a list of 2 must be a string or a list"),
    '"logit_bias": {"a": 1}': ("logit_bias", "logit_bias: an object of 1 must be a map"),
    f'"max_tokens": {"9" * 4000}': ("max_tokens", rf"max_tokens: {'9' * 100}\.\.\. must be"),
    '"top_k": "\\u001b[2J\\u00e9"': ("top_k", re.escape(r'top_k: "\u001b[2J\u00e9" must be a valid integer')),
    f'"seed": "{"s" * 101}"': ("seed", "seed: a text of 101 characters must be a valid integer"),
    '"stop": "' + "s" * 300 + '"': ("stop", "stop: a text of 300 characters must be"),
    '"prompt": 5': ("prompt", "prompt: 5 must be a string or a list of token ids"),
}


def _post(running: RunningService, body: str | bytes, route: str = "/v1/completions") -> Any:
    return running.client.post(route, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("field", VALUES, ids=lambda field: field[:40])
def test_an_error_has_value_and_rule(running: RunningService, field: str) -> None:
    param, message = VALUES[field]
    body = f"{{{field}}}" if '"prompt"' in field else f'{{"prompt": "a", {field}}}'
    code = "not_supported" if "best_of" in field else "invalid_value"
    assert_error(_post(running, body), 400, param=param, code=code, message=f"^{message}")


@pytest.mark.parametrize("field", ["prompt", "stop", "suffix"])
def test_a_text_for_the_model_is_not_repeated(running: RunningService, field: str) -> None:
    text = "my secret" * (40 if field == "stop" else 1)
    value: Any = {"prompt": {"text": text}, "stop": text, "suffix": text}[field]
    response = running.complete(**{"prompt": "a"} | {field: value})
    assert response.status_code == 400
    assert "secret" not in response.text


def test_an_error_stays_short_whatever_was_sent(running: RunningService) -> None:
    fields = {f"{'f' * 500}{i}": "v" * 500 for i in range(50)}
    response = running.complete(prompt="a", temperature="t" * 30_000, **fields)
    assert response.status_code == 400
    assert len(response.content) < 2500


NESTED = 200  # lists and objects that the parser takes inside each other


@pytest.mark.parametrize("bracket", ["[]", "{}"])
@pytest.mark.parametrize(("depth", "status"), [(NESTED - 1, 200), (NESTED + 1, 400), (16_000, 400)])
def test_json_may_be_nested_so_deep_and_no_deeper(
    running: RunningService, bracket: str, depth: int, status: int
) -> None:
    opening, closing = ("[", "]") if bracket == "[]" else ('{"a":', "}")
    value = opening * depth + "1" + closing * depth
    response = _post(running, f'{{"prompt": "a", "max_tokens": 1, "metadata": {value}}}')
    assert response.status_code == status, response.text
    if status == 400:
        message = "recursion limit exceeded at line 1"
        assert_error(response, 400, param=None, code="invalid_json", message=message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "\xff\xfe"}', "not valid JSON: invalid unicode code point at line 1"),
        ('{"prompt": "a"}'.encode("utf-16"), "not valid JSON"),
        ('{"prompt": "a"}'.encode("utf-32"), "not valid JSON"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not valid JSON"),
        (b"\x00" * 100, "not valid JSON"),
        (b'{"prompt": "a\x00"}', "control character"),
        (b'{"prompt": "\\ud83d"}', r"hex escape .half of a surrogate pair is no character. at line 1 column 19"),
        (b"{'prompt': 'a'}", "not valid JSON"),
        (b'{"prompt": "a",}', "trailing comma"),
        (b'{"prompt": 01}', "not valid JSON"),
    ],
    ids=[
        *("no UTF-8", "UTF-16", "UTF-32", "byte order mark", "zeros", "raw control", "surrogate", "Python", "comma"),
        "octal",
    ],
)
def test_what_is_no_json_is_400_that_says_where(running: RunningService, body: bytes, message: str) -> None:
    assert_error(_post(running, body), 400, param=None, code="invalid_json", message=message)


def test_of_a_key_twice_the_last_counts(running: RunningService) -> None:
    response = _post(running, '{"prompt": "a", "max_tokens": 2, "max_tokens": 1, "ignore_eos": true}')
    assert response.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (RequestTimedOut("m"), {"x-should-retry": "false"}),
        (EngineFailure("m"), {"x-should-retry": "false"}),
        (ServiceFailed("m"), {"x-should-retry": "false"}),
        (RequestError("m"), {"x-should-retry": "false"}),
        (Unavailable("m"), {"Retry-After": "1"}),
        (QueueFull("m"), {"Retry-After": "1"}),
        (MethodNotAllowed("m"), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RequestError) else "",
)
def test_clients_are_told_whether_to_try_again(error: RequestError, headers: dict[str, str]) -> None:
    assert error_headers(error) == headers
    assert error_response(error).status_code == error.status


def _walk(running: RunningService) -> list[Any]:
    """One answer of every kind of error that a request can bring about."""
    return [
        running.client.get("/nothing"),
        running.client.get("/%00%1b[2J/../etc/passwd"),
        running.client.get("/v1/models/..%2f..%2fetc%2fpasswd"),
        running.client.get("/v1/completions"),
        running.client.request("BREW", "/livez"),
        running.client.get("/v1/models", headers={"Host": "evil.example"}),
        _post(running, "{"),
        _post(running, '{"prompt": 5}'),
        running.complete(prompt="a", model="../../etc/passwd"),
        running.complete(prompt="a", model="/home/user/.ssh"),
        running.complete(prompt=[5, RAISE_TOKEN_ID], max_tokens=1),
        running.complete(prompt=[5] * 300),
        _post(running, b"{" * 200_000),
    ]


def test_no_error_tells_of_the_inside(running: RunningService) -> None:
    for response in _walk(running):
        assert response.status_code >= 400
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert all(value is None or isinstance(value, str) for value in error.values())
        assert error["code"]
        assert not re.search(r"0x[0-9a-f]{6}|Traceback|site-packages|\.py\b|line \d+, in", response.text), response.text
        assert response.text.isascii()
        assert len(response.content) < 1500
        json.loads(response.content)


def test_a_method_that_is_not_allowed_is_told_which_are(running: RunningService) -> None:
    for path, allowed in (("/v1/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET")):
        response = running.client.request("PATCH", path)
        assert_error(response, 405, param=None, code="method_not_allowed", message=f"use {allowed}")
        assert response.headers["allow"] == allowed
