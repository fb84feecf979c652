"""Objects with more fields than a client is told of."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from service.api.request_model import MAX_FIELDS
from service.api.schemas import CompletionRequest, GenerateRequest

REQUESTS = (CompletionRequest, ChatRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest)


def _unknown(number: int) -> dict[str, int]:
    return {f"unknown{index}": index for index in range(number)}


def _errors(model: type[BaseModel], fields: dict[str, Any]) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    return list(caught.value.errors())


@pytest.mark.parametrize("model", REQUESTS)
def test_each_unknown_field_is_told_unless_there_are_too_many(model: type[BaseModel]) -> None:
    told = {error["loc"] for error in _errors(model, _unknown(MAX_FIELDS)) if error["type"] == "extra_forbidden"}
    assert told == {(name,) for name in _unknown(MAX_FIELDS)}
    (error,) = _errors(model, _unknown(MAX_FIELDS + 1))
    assert error["type"] == "too_many_fields"
    assert f"has {MAX_FIELDS + 1} fields; at most {MAX_FIELDS}" in error["msg"]


@pytest.mark.parametrize("model", REQUESTS)
def test_no_request_has_so_many_fields(model: type[BaseModel]) -> None:
    assert len(model.model_fields) < MAX_FIELDS


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [_unknown(1000)] * 1000},
        {"messages": [1] * 1000},
        {"messages": [{"role": "user", "content": "a"}], "stream": True, "stream_options": _unknown(1000)},
        {"messages": [{"role": "user", "content": "a"}], "response_format": _unknown(1000)},
    ],
    ids=["messages of many fields", "messages that are none", "stream options", "response format"],
)
def test_a_large_mistake_is_one_error(fields: dict[str, Any]) -> None:
    assert len(_errors(ChatRequest, fields)) == 1
