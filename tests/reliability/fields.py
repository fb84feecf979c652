"""Every place in a request that holds a value, found in the schemas, so that a new field is tested too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from pydantic import BaseModel

from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from service.api.schemas import CompletionRequest, GenerateRequest

MESSAGES = [{"role": "user", "content": "The sea"}]
ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "The sea", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": MESSAGES, "max_tokens": 2}),
    "/generate": (GenerateRequest, {"prompt": "The sea", "max_tokens": 2}),
    "/tokenize": (TokenizeRequest, {"prompt": "The sea"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
"""Path to its schema and the smallest good request."""

_FILLED: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    "stream_options": {"include_usage": True},
    "messages": MESSAGES,
}
"""What stands around a place that is inside another."""

Path = tuple[str | int, ...]


class Place(NamedTuple):
    """Where one kind of value may stand.

    Attributes:
        schema: what the value must be, of one type; {} if it may be anything.
    """

    route: str
    path: Path
    schema: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.route} {'.'.join(map(str, self.path))} {self.schema.get('type', 'any')}"

    def body(self, value: Any) -> dict[str, Any]:
        """A request that has `value` here and is good elsewhere."""
        body = deepcopy(ROUTES[self.route][1])
        if self.path[0] == "stream_options":
            body["stream"] = True
        _put(body, self.path, value)
        return body


def places(route: str) -> Iterator[Place]:
    """All places of a route's requests; lists and maps as a whole, and their items."""
    schema = ROUTES[route][0].model_json_schema()
    for name, field in schema["properties"].items():
        yield from _walk(route, (name,), field, schema.get("$defs", {}))


def all_places() -> list[Place]:
    """Those of all routes."""
    return [place for route in ROUTES for place in places(route)]


def _walk(route: str, path: Path, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Place]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for option in schema.get("anyOf", []):
        yield from _walk(route, path, option, definitions)
    if "anyOf" in schema or schema.get("type") == "null":
        return
    yield Place(route, path, schema)
    for name, field in schema.get("properties", {}).items():
        yield from _walk(route, (*path, name), field, definitions)
    for item in schema.get("patternProperties", {}).values():
        yield from _walk(route, (*path, "5"), item, definitions)
    if "items" in schema:
        yield from _walk(route, (*path, 0), schema["items"], definitions)


def _put(container: Any, path: Path, value: Any) -> None:
    first, *rest = path
    if not rest:
        if isinstance(container, list):
            container[:] = [value]
        else:
            container[first] = value
        return
    inside = _inside(container, first, following=rest[0])
    if isinstance(container, list):
        container[:] = [inside]
    else:
        container[first] = inside
    _put(inside, tuple(rest), value)


def _inside(container: Any, name: str | int, *, following: str | int) -> Any:
    """The list or map at `name`: the one that is there, one of `_FILLED`, or an empty one."""
    wanted = list if isinstance(following, int) else dict
    there = container[0] if isinstance(container, list) and container else None
    if isinstance(container, dict):
        there = container.get(name, deepcopy(_FILLED.get(str(name))))
    return there if isinstance(there, wanted) else wanted()


def numbers_of(place: Place) -> Sequence[int | float]:
    """Values around the bounds of a number, and far beyond."""
    schema = place.schema
    bounds = [schema[name] for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if name in schema]
    near = [bound + step for bound in bounds for step in (-1, 0, 1)]
    return [*near, -1, 0, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**4000]
