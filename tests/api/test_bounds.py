"""The bounds of the contract: on both sides of each, on every route that has the field."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, ValidationError

from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from service.api.errors import validation_error
from service.api.schemas import CompletionRequest, GenerateRequest

Schema = type[BaseModel]
ALL: dict[Schema, dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    GenerateRequest: {"prompt": "a"},
    ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
}
INT32, INT64 = 2**31 - 1, 2**63 - 1


class Bounds(NamedTuple):
    """Values of a field that are just inside and just outside.

    Attributes:
        others: fields without which it is refused.
    """

    inside: list[Any]
    outside: list[Any]
    others: Mapping[str, Any] = MappingProxyType({})


FIELDS = {
    "temperature": Bounds([0, 0.0, 5e-324, 2, 2.0], [-5e-324, -1, 2.0000000000000004, 3, float("nan"), float("inf")]),
    "top_p": Bounds([5e-324, 1, 1.0], [0, 0.0, -0.1, 1.0000000000000002, 2, float("nan")]),
    "top_k": Bounds([0, INT32], [-1, INT32 + 1]),
    "min_p": Bounds([0, 1], [-5e-324, 1.0000000000000002, float("nan")]),
    "presence_penalty": Bounds([-2, 0, 2], [-2.0000000000000004, 2.0000000000000004, float("-inf")]),
    "frequency_penalty": Bounds([-2, 0, 2], [-2.0000000000000004, 2.0000000000000004, float("inf")]),
    "repetition_penalty": Bounds([0.1, 1, 10], [0.09999999999999999, 0, -1, 10.000000000000002, float("nan")]),
    "n": Bounds([1, 16], [0, -1, 17]),
    "seed": Bounds([-INT64 - 1, 0, INT64], [-INT64 - 2, INT64 + 1]),
    "min_tokens": Bounds([0, INT32], [-1, INT32 + 1]),
    "stop": Bounds(
        [[], "a", "a" * 256, ["a"] * 16, ["a" * 256] * 16],
        ["", "a" * 257, ["a"] * 17, [""], ["a" * 257], ["a", ""]],
    ),
    "stop_token_ids": Bounds([[], [0] * 256], [[0] * 257]),
    "logit_bias": Bounds(
        [{}, {"0": -100, "1": 100}, {str(i): 1 for i in range(300)}],
        [{"0": -100.00000000000001}, {"0": 100.00000000000001}, {str(i): 1 for i in range(301)}, {"0": float("nan")}],
    ),
    "model": Bounds(["a", "a" * 256], ["", "a" * 257]),
}
OWN: dict[Schema, dict[str, Bounds]] = {
    CompletionRequest: {
        "prompt": Bounds(["a", [0], ["a"] * 128, [[0]] * 128], ["", [], [[]], ["a"] * 129, [[0]] * 129]),
        "max_tokens": Bounds([0, INT32], [-1, INT32 + 1]),
        "logprobs": Bounds([0, 20], [-1, 21]),
    },
    GenerateRequest: {
        "max_tokens": Bounds([0, INT32], [-1, INT32 + 1]),
        "prompt_logprobs": Bounds([0, 20], [-1, 21]),
        "prompts": Bounds([["a"], ["a"] * 128], [[], ["a"] * 129], {"prompt": None}),
        "top_logprobs": Bounds([0, 20], [-1, 21], {"logprobs": True}),
    },
    ChatRequest: {
        "max_tokens": Bounds([1, INT32], [0, -1, INT32 + 1]),
        "max_completion_tokens": Bounds([1, INT32], [0, INT32 + 1]),
        "top_logprobs": Bounds([0, 20], [-1, 21], {"logprobs": True}),
        "messages": Bounds(
            [[{"role": "user", "content": "a"}] * number for number in (1, 2048)],
            [[{"role": "user", "content": "a"}] * number for number in (0, 2049)],
        ),
    },
}
CASES = [(schema, field, bounds) for schema in ALL for field, bounds in (FIELDS | OWN[schema]).items()]


def _validate(schema: Schema, field: str, value: Any, bounds: Bounds) -> None:
    schema.model_validate({**ALL[schema], **bounds.others, field: value})


@pytest.mark.parametrize(("schema", "field", "bounds"), CASES, ids=lambda v: getattr(v, "__name__", str(v)[:20]))
def test_a_field_is_taken_up_to_its_bounds_and_not_beyond(schema: Schema, field: str, bounds: Bounds) -> None:
    for value in bounds.inside:
        _validate(schema, field, value, bounds)
    for value in bounds.outside:
        with pytest.raises(ValidationError) as caught:
            _validate(schema, field, value, bounds)
        error = validation_error(caught.value.errors())
        assert (error.status, (error.param or "").partition(".")[0]) == (400, field), value


def _numbers_and_lists(schema: Schema) -> set[str]:
    """Fields of a schema that hold a number, a list or a map."""
    found = set()
    for name, field in schema.model_json_schema()["properties"].items():
        for option in field.get("anyOf", [field]):
            if option.get("type") in ("number", "integer", "array", "object"):
                found.add(name)
    return found


@pytest.mark.parametrize("schema", ALL, ids=lambda schema: schema.__name__)
def test_no_number_and_no_list_is_missing_here(schema: Schema) -> None:
    exempt = {"token_ids"}  # as long as the context
    assert _numbers_and_lists(schema) - exempt <= (FIELDS | OWN[schema]).keys()


@pytest.mark.parametrize("schema", [TokenizeRequest, DetokenizeRequest], ids=lambda schema: schema.__name__)
def test_what_only_translates_has_no_numbers(schema: Schema) -> None:
    assert _numbers_and_lists(schema) <= {"messages", "tokens"}
