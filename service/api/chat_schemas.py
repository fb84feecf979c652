"""What requests with a chat may hold, and requests that only translate between text and token ids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.api.request_model import RequestModel
from service.api.schemas import (
    MAX_PROMPT_CHARACTERS,
    LogprobFields,
    Name,
    Only,
    OnlyNull,
    OpenAIFields,
    StrictBool,
    Text,
    TokenCount,
    TokenIds,
    check_characters,
)

MAX_MESSAGES = 2048
MAX_PARTS = 256

OnlyEmptyList = Annotated[Any, Only([])]


ContentText = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class TextPart(BaseModel):
    """A part of a content, for the schema that is shown."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: ContentText


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


def _check_content(value: object) -> str:
    """Text, or text parts, which newlines join."""
    if isinstance(value, str):
        check_characters(len(value))
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS or not all(map(_is_text_part, value)):
        raise PydanticCustomError(
            "content",
            f'must be a string or a list of 1 to {MAX_PARTS} parts {{"type": "text", "text": "..."}} and no others: '
            "this version reads text only",
        )
    text = "\n".join(part["text"] for part in value)
    check_characters(len(text))
    return text


def _is_text_part(part: object) -> bool:
    if not isinstance(part, dict) or part.keys() != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


class Message(RequestModel):
    """One turn of a chat. What servers send with an assistant's message may come back, as far as it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_check_content, json_schema_input_type=ContentText | TextParts)]
    name: Name | None = None

    refusal: OnlyNull = None
    audio: OnlyNull = None
    function_call: OnlyNull = None
    tool_calls: OnlyEmptyList = None
    annotations: OnlyEmptyList = None

    def variables(self) -> dict[str, str]:
        """What a chat template sees."""
        return self.model_dump(include={"role", "content", "name"}, exclude_none=True)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(LogprobFields, OpenAIFields):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: TokenCount | None = None

    modalities: Annotated[Any, Only(["text"])] = None
    tools: OnlyEmptyList = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    functions: OnlyEmptyList = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    audio: OnlyNull = None
    moderation: OnlyNull = None
    prediction: OnlyNull = None
    prompt_cache_options: OnlyNull = None
    prompt_cache_retention: OnlyNull = None
    web_search_options: OnlyNull = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_limits_agree(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError(
                "two_limits", "differs from max_tokens, which is its older name; send one of them"
            )
        return value

    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits new tokens, and what it says."""
        if self.max_completion_tokens is None:
            return super().token_limit()
        return "max_completion_tokens", self.max_completion_tokens


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: exactly one of `prompt` and `messages`."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: TokenIds
