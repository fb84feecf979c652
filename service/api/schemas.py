"""What requests may hold: every number has bounds, every string and list a cap, and no field is ignored unsaid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_NAME_CHARACTERS = 256
_MAX_INT64 = 2**63 - 1

Prompt = str | list[int]
"""Text, or token ids."""


def _is_sound(text: str) -> bool:
    """Whether a string is Unicode text: JSON can spell halves of surrogate pairs, which are none."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_text(text: str) -> str:
    if not _is_sound(text):
        raise PydanticCustomError("invalid_text", "holds a lone surrogate, which is no character; remove it")
    return text


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _check_prompt(value: object) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("empty_prompt", "is empty; at least one token is needed; add text")
        return _check_text(value)
    if isinstance(value, list) and _is_token_ids(value):
        if not value:
            raise PydanticCustomError("empty_prompt", "is empty; at least one token is needed; add token ids")
        return value
    raise PydanticCustomError("prompt_type", "must be a string or a list of token ids (integers)")


def _check_prompts(value: object) -> list[Prompt]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt_type", f"must be a list of 1 to {MAX_PROMPTS} prompts, each a string or a list of token ids"
        )
    return [_check_prompt(prompt) for prompt in value]


def _check_prompt_or_prompts(value: object) -> list[Prompt]:
    is_batch = isinstance(value, list) and bool(value) and not _is_token_ids(value)
    return _check_prompts(value) if is_batch else [_check_prompt(value)]


def _check_token_ids(value: object) -> list[int]:
    if not _is_token_ids(value):
        raise PydanticCustomError("prompt_type", "must be a list of token ids (integers)")
    prompt = _check_prompt(value)
    assert isinstance(prompt, list)
    return prompt


def _check_stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops)
    ):
        raise PydanticCustomError(
            "stop", f"must be a string or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_CHARACTERS} characters"
        )
    return tuple(_check_text(stop) for stop in stops)


def _only(neutral: object) -> Callable[[object], object]:
    """Take null and the value that changes nothing."""

    def check(value: object) -> object:
        is_neutral = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        if value is not None and not is_neutral:
            allowed = "null" if neutral is None else f"null or {str(neutral).lower()}"
            raise PydanticCustomError(
                "not_supported", f"is not supported in this version; leave it out, or send {allowed}"
            )
        return value

    return check


Text = Annotated[str, Strict(), Field(min_length=1), AfterValidator(_check_text)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_NAME_CHARACTERS), AfterValidator(_check_text)]
OnlyNull = Annotated[Any, AfterValidator(_only(None))]
OnlyZero = Annotated[Any, AfterValidator(_only(0))]
OnlyOne = Annotated[Any, AfterValidator(_only(1))]
OnlyFalse = Annotated[Any, AfterValidator(_only(False))]
OnlyEmptyMap = Annotated[Any, AfterValidator(_only({}))]
Ignored = Annotated[Any, Field(description="Accepted, without effect.")]
StrictInt = Annotated[int, Strict()]
StrictBool = Annotated[bool, Strict()]
FiniteFloat = Annotated[float, Strict(), Field(allow_inf_nan=False)]


class SamplingFields(BaseModel):
    """Fields that all ways of generation share; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: Name | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_check_stop, json_schema_input_type=str | list[str] | None)] = ()
    stream: StrictBool | None = None

    n: OnlyOne = None
    min_p: OnlyZero = None
    presence_penalty: OnlyZero = None
    frequency_penalty: OnlyZero = None
    repetition_penalty: OnlyOne = None
    logit_bias: OnlyEmptyMap = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    include_usage: StrictBool | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_check_prompt_or_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    stream_options: StreamOptions | None = None

    best_of: OnlyOne = None
    echo: OnlyFalse = None
    logprobs: OnlyNull = None
    suffix: OnlyNull = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    parallel_tool_calls: Ignored = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError(
                "not_streamed", "is allowed with a stream only; leave it out, or send stream true"
            )
        return value


class GenerateRequest(SamplingFields):
    """`POST /generate`: exactly one of `prompt`, `prompts` and `token_ids`."""

    prompt: Text | None = None
    prompts: (
        Annotated[list[Prompt], PlainValidator(_check_prompts, json_schema_input_type=list[str | list[int]])] | None
    ) = None
    token_ids: Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=list[int])] | None = None


class ErrorDetail(BaseModel):
    """What went wrong: value, rule and remedy, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail
