"""What requests may hold: every number has bounds, every string and list a cap, and no field is ignored unsaid."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import (
    BaseModel,
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

from service.api.grammar_schemas import GrammarFields
from service.api.request_model import RequestModel

MAX_PROMPTS = 128
MAX_PROMPT_CHARACTERS = 2**26
MAX_PROMPT_TOKENS = 2**24
"""Beyond every context; the model's own, which is less, is counted once these have been checked."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_BIASES = 300
MAX_BIAS = 100
MAX_NAME_CHARACTERS = 256
_MAX_INT64 = 2**63 - 1
_MAX_ID = 2**64
"""Of what may be an id; the vocabulary, which has fewer, says so in an error that shows the id."""
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

Prompt = str | list[int]
"""Text, or token ids."""


def _is_token_ids(value: object) -> bool:
    # A body may hold millions, and the event loop waits.
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= -_MAX_ID and max(value) <= _MAX_ID)


def _check_prompt(value: object) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("empty_prompt", "is empty; at least one token is needed; add text")
        check_characters(len(value))
        return value
    return _read_token_ids(value, "must be a string or a list of token ids (integers)")


def _read_token_ids(value: object, rule: str) -> list[int]:
    if not isinstance(value, list) or not _is_token_ids(value):
        raise PydanticCustomError("prompt_type", rule)
    if not value:
        raise PydanticCustomError("empty_prompt", "is empty; at least one token is needed; add token ids")
    if len(value) > MAX_PROMPT_TOKENS:
        raise PydanticCustomError("prompt_length", f"must have at most {MAX_PROMPT_TOKENS} token ids")
    return value


def check_characters(number: int) -> None:
    """Refuse a text of more characters than any context has."""
    if number > MAX_PROMPT_CHARACTERS:
        raise PydanticCustomError("prompt_length", f"must have at most {MAX_PROMPT_CHARACTERS} characters")


def _check_prompts(value: object) -> list[Prompt]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt_type", f"must be a list of 1 to {MAX_PROMPTS} prompts, each a string or a list of token ids"
        )
    return [_check_prompt(prompt) for prompt in value]


def _check_prompt_or_prompts(value: object) -> list[Prompt]:
    is_batch = isinstance(value, list) and bool(value) and type(value[0]) is not int
    return _check_prompts(value) if is_batch else [_check_prompt(value)]


def _check_token_ids(value: object) -> list[int]:
    return _read_token_ids(value, "must be a list of token ids (integers)")


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
    return tuple(stops)


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


class Only:
    """Annotates a field that takes null and the values that change nothing."""

    def __init__(self, *neutral: object) -> None:
        self._neutral = neutral

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's way to ask what is to be checked."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Pydantic's way to ask what is allowed."""
        return {"enum": [None, *self._neutral]}

    def _check(self, value: object) -> object:
        is_neutral = any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in self._neutral)
        if value is not None and not is_neutral:
            allowed = " or ".join(["null", *map(json.dumps, self._neutral)])
            raise PydanticCustomError(
                "not_supported",
                "is not supported in this version; leave it out, or send {allowed}",
                {"allowed": allowed},
            )
        return value


Text = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
OnlyNull = Annotated[Any, Only()]
OnlyOne = Annotated[Any, Only(1)]
OnlyFalse = Annotated[Any, Only(False)]
Ignored = Annotated[Any, Field(description="Accepted, without effect.")]
StrictInt = Annotated[int, Strict()]
StrictBool = Annotated[bool, Strict()]
TokenCount = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
TokenCountOrZero = Annotated[
    int, Strict(), Field(ge=0, le=2**31 - 1, description="0 only where the answer tells of the prompt.")
]
TokenId = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Prompts = Annotated[list[Text | PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
Stop = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=f"^({_TOKEN_ID.pattern})$")], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
]
"""From `TokenId` on, for the schema that is shown: the checks above say more when they fail."""

TokenIds = Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=PromptIds)]
FiniteFloat = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Penalty = Annotated[FiniteFloat, Field(ge=-2, le=2)]
NumLogprobs = Annotated[StrictInt, Field(ge=0, le=20)]


class SamplingFields(GrammarFields):
    """Fields that all ways of generation share; null is the same as leaving a field out."""

    model: Name | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_check_stop, json_schema_input_type=Stop | Stops | None)] = ()
    stream: StrictBool | None = None

    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.1, le=10)] | None = None
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], PlainValidator(_check_bias, json_schema_input_type=Biases | None)
    ] = Field(default_factory=tuple)
    min_tokens: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: Annotated[
        tuple[int, ...], PlainValidator(_check_stop_token_ids, json_schema_input_type=StopTokenIds | None)
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

    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    def echoes_prompt(self) -> bool:
        """Whether the text begins with the prompt."""
        return False


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


class StreamOptions(RequestModel):
    """Options of a stream."""

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
        list[Prompt], PlainValidator(_check_prompt_or_prompts, json_schema_input_type=Text | PromptIds | Prompts)
    ]

    max_tokens: TokenCountOrZero | None = None
    best_of: OnlyOne = None
    echo: StrictBool | None = None
    logprobs: NumLogprobs | None = None
    suffix: OnlyNull = None

    def num_logprobs(self) -> int | None:
        """See `SamplingFields.num_logprobs`."""
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """See `SamplingFields.num_prompt_logprobs`."""
        return self.logprobs if self.echo else None

    def echoes_prompt(self) -> bool:
        """See `SamplingFields.echoes_prompt`."""
        return bool(self.echo)


class GenerateRequest(LogprobFields, SamplingFields):
    """`POST /generate`: exactly one of `prompt`, `prompts` and `token_ids`."""

    prompt: Text | None = None
    prompts: Annotated[list[Prompt], PlainValidator(_check_prompts, json_schema_input_type=Prompts)] | None = None
    token_ids: TokenIds | None = None

    max_tokens: TokenCountOrZero | None = None
    prompt_logprobs: NumLogprobs | None = None

    def num_prompt_logprobs(self) -> int | None:
        """See `SamplingFields.num_prompt_logprobs`."""
        return self.prompt_logprobs
