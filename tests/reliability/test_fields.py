"""Every field that there is: it has bounds, they hold, and no mixture of fields does harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import ValidationError

from tests.api.support import RunningService, sse_events
from tests.reliability.conftest import CONTEXT
from tests.reliability.fields import ROUTES, Place, all_places, numbers_of, places

pytestmark = pytest.mark.reliability

PLACES = all_places()
NUMBERS = [place for place in PLACES if place.schema.get("type") in ("integer", "number")]
CAPS = {"string": ("maxLength", "enum", "const"), "array": ("maxItems",), "object": ("maxProperties", "x-max-bytes")}
MOST_BUILT = 2**13
"""Longest text and list that are made in order to go beyond a cap."""
GENERATING = ["/v1/completions", "/v1/chat/completions", "/generate"]
NUM_EXAMPLES, NUM_NIGHTLY_EXAMPLES = 100, 7000
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


def test_all_kinds_of_places_are_found() -> None:
    found = {str(place) for place in PLACES}
    assert found >= {
        "/v1/completions prompt.0.0 integer",
        "/v1/chat/completions messages.0.content.0.text string",
        "/v1/chat/completions response_format.json_schema.name string",
        "/v1/chat/completions stream_options.include_usage boolean",
        "/generate logit_bias.5 number",
        "/detokenize tokens.0 integer",
    }
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("place", NUMBERS, ids=str)
def test_every_number_has_both_bounds(place: Place) -> None:
    assert place.schema.keys() & {"minimum", "exclusiveMinimum"}
    assert place.schema.keys() & {"maximum", "exclusiveMaximum"}


@pytest.mark.parametrize("place", [place for place in PLACES if place.schema.get("type") in CAPS], ids=str)
def test_every_text_list_and_map_has_a_cap(place: Place) -> None:
    schema = place.schema
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    assert is_closed or schema.keys() & set(CAPS[schema["type"]])


def _fits(place: Place, body: dict[str, Any]) -> bool:
    try:
        ROUTES[place.route][0].model_validate_json(json.dumps(body))
    except ValidationError:
        return False
    return True


def _allows(schema: Any, value: float) -> bool:
    return bool(
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", value - 1)
    )


@pytest.mark.parametrize("place", NUMBERS, ids=str)
def test_a_number_is_taken_within_its_bounds_and_not_beyond(place: Place) -> None:
    for number in numbers_of(place):
        others = {"logprobs": True} if place.path == ("top_logprobs",) else {}
        body = place.body(number) | others
        body.pop("max_tokens", None) if place.path != ("max_tokens",) else None
        if place.path == ("token_ids", 0):
            del body["prompt"]
        # Ids of tokens are compared with the vocabulary, which says more than a bound.
        is_token = place.path[0] in ("prompt", "prompts", "token_ids", "tokens", "stop_token_ids")
        assert _fits(place, body) == _allows(place.schema, number) or is_token, number


@pytest.mark.parametrize("place", [place for place in PLACES if place.schema.get("type") in CAPS], ids=str)
def test_nothing_longer_than_its_cap_is_taken(place: Place) -> None:
    schema = place.schema
    cap = next((schema[name] for name in ("maxLength", "maxItems", "maxProperties") if name in schema), MOST_BUILT)
    if cap >= MOST_BUILT:
        return  # longer than is good to build; the cap is in the table of the schema
    item = {"array": [None], "string": "a", "object": None}[schema["type"]]
    value: Any = {str(i): 0 for i in range(cap + 1)} if item is None else item * (cap + 1)
    if schema["type"] == "array":
        value = [_smallest(schema["items"], place.route)] * (cap + 1)
    with pytest.raises(ValidationError):
        ROUTES[place.route][0].model_validate_json(json.dumps(place.body(value)))


def _smallest(items: Any, route: str) -> Any:
    if "$ref" in items:
        return {"role": "user", "content": "a"} if items["$ref"].endswith("Message") else {"type": "text", "text": "a"}
    option = items.get("anyOf", [items])[0]
    return "a" if option["type"] == "string" else option.get("minimum", 0)


TEXTS = st.text(max_size=8) | st.sampled_from(["", "a", "\x00", "\ud83d\ude00", "<|end|>", "{{ 7 * 7 }}", " " * 300])
ODD: SearchStrategy[Any] = st.sampled_from(
    [None, True, [], {}, "", -1, 0.5, float("nan"), float("inf"), 5e-324, 2**64, [[]], {"a": None}]
)


def values(schema: Any, definitions: Any, *, depth: int = 0) -> SearchStrategy[Any]:
    """Values that fit a schema; now and then one that does not."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of(*(values(option, definitions, depth=depth) for option in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "integer":
            low, high = schema["minimum"], schema["maximum"]
            return st.sampled_from([low, high]) | st.integers(low, min(high, max(low, 0) + 40))
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
            is_open = "exclusiveMinimum" in schema
            return st.just(high) | st.floats(low, high, exclude_min=is_open)
        case "boolean":
            return st.booleans()
        case "string":
            return TEXTS
        case "null":
            return st.none()
        case "array":
            most = min(3, schema.get("maxItems", 3))
            return st.lists(values(schema["items"], definitions, depth=depth + 1), max_size=most)
        case "object":
            return _maps(schema, definitions, depth=depth)
    return st.none() | st.booleans() | TEXTS


def _maps(schema: Any, definitions: Any, *, depth: int) -> SearchStrategy[Any]:
    if "patternProperties" in schema:
        (item,) = schema["patternProperties"].values()
        return st.dictionaries(st.integers(0, 299).map(str), values(item, definitions, depth=depth + 1), max_size=3)
    if "properties" not in schema:
        return st.sampled_from([{}, {"type": "integer"}, {"type": "string", "maxLength": 3}, {"type": 5}, {"enum": []}])
    fields = {name: values(field, definitions, depth=depth + 1) for name, field in schema["properties"].items()}
    needed = {name: fields.pop(name) for name in schema.get("required", ())}
    return st.fixed_dictionaries(needed, optional=fields)


@st.composite
def bodies(draw: st.DrawFn, route: str) -> dict[str, Any]:
    """A good request with up to six fields that fit, and in one of three requests one that does not."""
    model, base = ROUTES[route]
    schema = model.model_json_schema()
    fields = schema["properties"]
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True))
    body = base | {name: draw(values(fields[name], schema.get("$defs", {}))) for name in names}
    if draw(st.integers(0, 2)) == 0:
        body[draw(st.sampled_from([*sorted(fields), "unknown"]))] = draw(ODD)
    return body


def check(service: RunningService, route: str, body: dict[str, Any]) -> None:
    """Send a request; it is refused, or its answer obeys it."""
    content = json.dumps(body).encode()
    response = service.client.post(route, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return
    if body.get("stream"):
        assert sse_events(response.text)
        return
    answer = response.json()
    choices = answer.get("choices", answer.get("results", [answer]))
    prompts = _num_prompts(route, body)
    assert len(choices) == prompts * (body.get("n") or 1)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    limit = CONTEXT if limit is None else limit
    num_tokens = answer["usage"]["completion_tokens"] if "usage" in answer else _num_generated(choices)
    assert num_tokens <= limit * len(choices)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    for choice in choices:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert choice["finish_reason"] in ("stop", "length")
        if not body.get("min_tokens") and not body.get("echo"):
            assert not any(stop in text for stop in stops)


def _num_prompts(route: str, body: dict[str, Any]) -> int:
    prompts = body.get("prompts") if route == "/generate" else body.get("prompt")
    is_batch = route != "/v1/chat/completions" and isinstance(prompts, list) and not isinstance(prompts[0], int)
    return len(prompts or []) if is_batch else 1


def _num_generated(choices: list[Any]) -> int:
    return sum(choice["num_generated_tokens"] for choice in choices)


@pytest.fixture
def still_good(keyed: RunningService) -> Any:
    canary = keyed.canary()
    yield
    assert keyed.canary() == canary


@pytest.mark.parametrize(
    "num_examples",
    [NUM_EXAMPLES, pytest.param(NUM_NIGHTLY_EXAMPLES, marks=pytest.mark.nightly)],
    ids=["sample", "many"],
)
@pytest.mark.parametrize("route", GENERATING)
@pytest.mark.usefixtures("still_good")
def test_every_mixture_of_fields_is_obeyed_or_refused(keyed: RunningService, route: str, num_examples: int) -> None:
    @seed(6)
    @settings(max_examples=num_examples, database=None, deadline=None, suppress_health_check=QUIET)
    @given(body=bodies(route))
    def run(body: dict[str, Any]) -> None:
        check(keyed, route, body)

    run()


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_has_places(route: str) -> None:
    assert any(places(route))
