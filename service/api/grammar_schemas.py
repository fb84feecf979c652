"""How requests say what their text must follow: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from service.api.request_model import RequestModel

MAX_SCHEMA_BYTES = 2**16
"""Of a schema as JSON."""
MAX_SCHEMA_DEPTH = 64
"""Objects and lists within each other; the compiler reads 128."""
MAX_EXPRESSION_BYTES = 2**12
"""Of a regular expression, and of each string in a schema, which may be one. The time that a mask takes may grow with
the square of it: to 20 ms at 8 KiB, to 1 s at 80 KiB."""
MAX_GRAMMAR_BYTES = 2**14
"""Of a grammar in Lark syntax: some hundred rules."""

_ANY_OBJECT = '{"type": "object"}'


class Constraint(NamedTuple):
    """What a text must follow.

    Attributes:
        text: a JSON schema as JSON, an expression or a grammar.
        param: the request's field that has it, for errors.
    """

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    param: str


def _check_schema(value: object) -> str:
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON schema, which is an object")
    level: list[Any] = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            break
    else:
        raise PydanticCustomError(
            "schema", f"has objects or lists more than {MAX_SCHEMA_DEPTH} deep within each other; make it flatter"
        )
    text = json.dumps(value)
    if len(text) > MAX_SCHEMA_BYTES:
        raise PydanticCustomError(
            "schema", f"has {len(text)} bytes as JSON; at most {MAX_SCHEMA_BYTES} are allowed; shorten it"
        )
    return text


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    """Objects and lists in a node, whose strings are short enough."""
    values = [*node, *node.values()] if isinstance(node, dict) else node
    if any(isinstance(value, str) and len(value.encode()) > MAX_EXPRESSION_BYTES for value in values):
        raise PydanticCustomError("schema", f"has a string of more than {MAX_EXPRESSION_BYTES} bytes; shorten it")
    return [value for value in values if isinstance(value, dict | list)]


@dataclass(frozen=True, slots=True)
class _AtMost:
    """Annotates a text that is not empty and has so many bytes at most."""

    num_bytes: int

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": self.num_bytes}

    def _check(self, text: str) -> str:
        num_bytes = len(text.encode())
        if num_bytes > self.num_bytes:
            raise PydanticCustomError("too_long", f"has {num_bytes} bytes; at most {self.num_bytes} are allowed")
        return text


class JsonSchema(RequestModel):
    """A JSON schema with a name, as OpenAI has it; texts always follow it, `strict` or not."""

    name: Annotated[str, Strict(), Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: Annotated[str, Strict(), Field(max_length=MAX_EXPRESSION_BYTES)] | None = None
    text: Annotated[str, PlainValidator(_check_schema, json_schema_input_type=dict[str, Any])] = Field(
        alias="schema", json_schema_extra={"x-max-bytes": MAX_SCHEMA_BYTES, "x-max-depth": MAX_SCHEMA_DEPTH}
    )
    strict: Annotated[bool, Strict()] | None = None


class ResponseFormat(RequestModel):
    """What kind of text is wanted: any, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _check_type(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        needs_one = info.data.get("type") == "json_schema"
        if "type" in info.data and needs_one != (value is not None):
            rule = (
                "is missing; type json_schema needs it" if needs_one else "goes with type json_schema only; remove it"
            )
            raise PydanticCustomError("json_schema", rule)
        return value

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that texts must follow; None for any text."""
        if self.type == "json_object":
            return _ANY_OBJECT
        return None if self.json_schema is None else self.json_schema.text


class GrammarFields(RequestModel):
    """Fields of all ways of generation, at most one of which says what the text must follow."""

    response_format: ResponseFormat | None = None
    regex: Annotated[str, Strict(), Field(min_length=1), _AtMost(MAX_EXPRESSION_BYTES)] | None = None
    grammar: Annotated[str, Strict(), Field(min_length=1), _AtMost(MAX_GRAMMAR_BYTES)] | None = None

    @field_validator("regex", "grammar")
    @classmethod
    def _check_alone(cls, value: str | None, info: ValidationInfo) -> str | None:
        response_format = info.data.get("response_format")
        has_schema = response_format is not None and response_format.schema_text is not None
        if value is not None and (has_schema or info.data.get("regex") is not None):
            raise PydanticCustomError(
                "two_constraints", "comes with another field that says what the text must follow; send one of them"
            )
        return value

    def constraint(self) -> Constraint | None:
        """What the text must follow; None for any text."""
        schema = None if self.response_format is None else self.response_format.schema_text
        if schema is not None:
            return Constraint("json_schema", schema, "response_format")
        if self.regex is not None:
            return Constraint("regex", self.regex, "regex")
        return None if self.grammar is None else Constraint("grammar", self.grammar, "grammar")
