"""Bodies: of many parts, which are refused before they are parsed, and those that end too soon."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.bodies import MAX_JSON_PARTS
from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, eventually, run_service
from tests.models import write_checkpoint

HEADERS = {"Content-Type": "application/json"}
HEAD = b'{"prompt":"a","max_tokens":1,"metadata":'
NUM_AROUND = 4
"""Parts of a request with `HEAD`: itself and its members."""


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that takes bodies of a megabyte."""
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("roomy") / "tiny")
    with run_service(SETTINGS | {"model": str(folder), "max_body_bytes": 2**20}) as service:
        yield service


def _lists(number: int) -> bytes:
    return b"[" + b",".join([b"[]"] * (number - 1)) + b"]"


def _members(number: int) -> bytes:
    return json.dumps(dict.fromkeys(map(str, range(number - 1)), 0)).encode()


@pytest.mark.parametrize("parts", [_lists, _members], ids=["lists", "members"])
def test_a_body_may_have_so_many_parts_and_no_more(roomy: RunningService, parts: Any) -> None:
    most = MAX_JSON_PARTS - NUM_AROUND
    for number, status in ((most, 200), (most + 1, 400)):
        body = HEAD + parts(number) + b"}"
        response = roomy.client.post("/v1/completions", content=body, headers=HEADERS)
        assert response.status_code == status, response.text
    message = f"the body has {MAX_JSON_PARTS + 1} lists, objects and members; at most {MAX_JSON_PARTS} are read"
    assert_error(response, 400, param=None, code="too_many_parts", message=message)


@pytest.mark.parametrize("text", ["[" * 90_000, '":{' * 90_000, "\\" * 90_000 + "[" * 90_000, '\\"[' * 90_000])
def test_a_text_may_have_as_many_brackets_as_it_likes(roomy: RunningService, text: str) -> None:
    body = HEAD + json.dumps(text).encode() + b"}"
    assert roomy.client.post("/v1/completions", content=body, headers=HEADERS).status_code == 200


@pytest.mark.parametrize("text", [b'"' + b"[" * 70_000, b'"\\' + b"[" * 70_000, b'\\"' * 70_000 + b"[" * 70_000])
def test_a_text_without_an_end_is_no_json(roomy: RunningService, text: bytes) -> None:
    response = roomy.client.post("/v1/completions", content=HEAD + text, headers=HEADERS)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "too_many_parts")


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_defect(
    roomy: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    url = roomy.client.base_url
    with caplog.at_level(logging.INFO):
        with socket.create_connection((url.host, url.port)) as connection:
            head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt":'.encode())
        assert eventually(lambda: any(" 499 " in message for message in caplog.messages))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
