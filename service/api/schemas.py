"""What requests may hold: every number has bounds, every string and list a cap, and no field is ignored unsaid."""

from __future__ import annotations

import json
import re
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
MAX_STOP_TOKEN_IDS = 256
MAX_BIASES = 300
MAX_BIAS = 100
MAX_NAME_CHARACTERS = 256
_MAX_INT64 = 2**63 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

Prompt = str | list[int]
"""Text, or token ids."""


def _is_sound(text: str) -> bool:
    """Whether a string is Unicode text: JSON can spell halves of surrogate pairs, which are none."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def check_text(text: str) -> str:
    """Refuse what is no Unicode text."""
    if not _is_sound(text):
        raise PydanticCustomError("invalid_text", "holds a lone surrogate, which is no character; remove it")
    return text


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _check_prompt(value: object) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("empty_prompt", "is empty; at least one token is needed; add text")
        return check_text(value)
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
    return tuple(check_text(stop) for stop in stops)


def _check_stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKEN_IDS or not _is_token_ids(value):
        raise PydanticCustomError("token_ids", f"must be a list of at most {MAX_STOP_TOKEN_IDS} token ids (integers)")
    return tuple(value)


def _check_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES or not all(_is_bias(*item) for item in value.items()):
        raise PydanticCustomError(
            "logit_bias",
            f"must be a map of at most {MAX_BIASES} token ids (as strings) to numbers from -{MAX_BIAS} to {MAX_BIAS}",
        )
    return tuple((int(token_id), float(bias)) for token_id, bias in value.items())


def _is_bias(token_id: object, bias: object) -> bool:
    if not isinstance(token_id, str) or not _TOKEN_ID.fullmatch(token_id):
        return False
    return isinstance(bias, int | float) and not isinstance(bias, bool) and -MAX_BIAS <= bias <= MAX_BIAS


def only(*neutral: object) -> Callable[[object], object]:
    """Make a check that takes null and the values that change nothing."""

    def check(value: object) -> object:
        is_neutral = any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)
        if value is not None and not is_neutral:
            allowed = " or ".join(["null", *map(json.dumps, neutral)])
            raise PydanticCustomError(
                "not_supported",
                "is not supported in this version; leave it out, or send {allowed}",
                {"allowed": allowed},
            )
        return value

    return check


Text = Annotated[str, Strict(), Field(min_length=1), AfterValidator(check_text)]
AnyText = Annotated[str, Strict(), AfterValidator(check_text)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_NAME_CHARACTERS), AfterValidator(check_text)]
OnlyNull = Annotated[Any, AfterValidator(only())]
OnlyOne = Annotated[Any, AfterValidator(only(1))]
OnlyFalse = Annotated[Any, AfterValidator(only(False))]
Ignored = Annotated[Any, Field(description="Accepted, without effect.")]
StrictInt = Annotated[int, Strict()]
StrictBool = Annotated[bool, Strict()]
TokenCount = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
TokenIds = Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=list[int])]
FiniteFloat = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Penalty = Annotated[FiniteFloat, Field(ge=-2, le=2)]
NumLogprobs = Annotated[StrictInt, Field(ge=0, le=20)]


class SamplingFields(BaseModel):
    """Fields that all ways of generation share; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: Name | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_check_stop, json_schema_input_type=str | list[str] | None)] = ()
    stream: StrictBool | None = None

    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.1, le=10)] | None = None
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], PlainValidator(_check_bias, json_schema_input_type=dict[str, float] | None)
    ] = Field(default_factory=tuple)
    min_tokens: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: Annotated[
        tuple[int, ...], PlainValidator(_check_stop_token_ids, json_schema_input_type=list[int] | None)
    ] = ()

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    parallel_tool_calls: Ignored = None

    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits new tokens, and what it says."""
        return "max_tokens", self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told beside each token's own log-probability; None for neither."""
        return None


class LogprobFields(BaseModel):
    """How OpenAI's chats ask for log-probabilities."""

    logprobs: StrictBool | None = None
    top_logprobs: NumLogprobs | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError(
                "no_logprobs", "is allowed with logprobs only; leave it out, or send logprobs true"
            )
        return value

    def num_logprobs(self) -> int | None:
        """See `SamplingFields.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    include_usage: StrictBool | None = None
    include_obfuscation: OnlyFalse = None


class OpenAIFields(SamplingFields):
    """Fields that both of OpenAI's ways of generation share."""

    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError(
                "not_streamed", "is allowed with a stream only; leave it out, or send stream true"
            )
        return value


class CompletionRequest(OpenAIFields):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_check_prompt_or_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]

    best_of: OnlyOne = None
    echo: OnlyFalse = None
    logprobs: NumLogprobs | None = None
    suffix: OnlyNull = None

    def num_logprobs(self) -> int | None:
        """See `SamplingFields.num_logprobs`."""
        return self.logprobs


class GenerateRequest(LogprobFields, SamplingFields):
    """`POST /generate`: exactly one of `prompt`, `prompts` and `token_ids`."""

    prompt: Text | None = None
    prompts: (
        Annotated[list[Prompt], PlainValidator(_check_prompts, json_schema_input_type=list[str | list[int]])] | None
    ) = None
    token_ids: TokenIds | None = None


class ErrorDetail(BaseModel):
    """What went wrong: value, rule and remedy, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail
