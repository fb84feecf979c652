"""What answers hold, for the schema that `/openapi.json` shows; the routes write them without these classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.defaults import SamplingDefaults
from service.engine.sequence import SequenceTimings
from service.loading.progress import Phase

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of all of them: nothing is told that is not shown."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong: value, rule and remedy, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Answer):
    """Body of every answer that is no success."""

    error: ErrorDetail


class Usage(Answer):
    """Tokens read, each prompt once, and tokens delivered."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class CompletionLogprobs(Answer):
    """Four lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChoice(Answer):
    """One text."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionDelta(CompletionChoice):
    """What one step brought of one text."""

    finish_reason: FinishReason | None  # type: ignore[assignment]  # null before the last


class Head(Answer):
    """What answers and chunks of OpenAI's routes begin with."""

    id: str
    created: Count
    model: str
    system_fingerprint: str


class Completion(Head):
    """All texts of all prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    """An event of a stream; with `include_usage` the last one has the usage and no choice."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: Usage | None = None


class TokenLogprob(Answer):
    """A token and how likely it was."""

    token: str
    logprob: float | None
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ScoredToken(TokenLogprob):
    """A token of a text, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """Of each token of a message."""

    content: list[ScoredToken]
    refusal: None


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One message."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Head):
    """All messages."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatText(Answer):
    """A piece of a message; the first has the role."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatDelta(Answer):
    """What one step brought of one message."""

    index: Count
    delta: ChatText
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Head):
    """An event of a stream; with `include_usage` the last one has the usage and no choice."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = None


class TokenIdLogprob(TokenLogprob):
    """A token with its id."""

    token_id: Count


class ScoredTokenId(TokenIdLogprob):
    """A token of a text, and the likeliest ones in its place."""

    top_logprobs: list[TokenIdLogprob]


class Generated(Answer):
    """One text, with its ids and the seconds that it took."""

    model: str
    scheme: str
    text: str
    token_ids: list[Count]
    finish_reason: FinishReason
    num_prompt_tokens: Count
    num_generated_tokens: Count
    timings: SequenceTimings
    prompt_logprobs: list[ScoredTokenId] = []
    logprobs: list[ScoredTokenId] = []


class GeneratedTexts(Answer):
    """The texts of several prompts, or several of one."""

    model: str
    scheme: str
    results: list[Generated]


class GeneratedDelta(Answer):
    """What one step brought of one text; the last one says why it ended."""

    index: Count
    text: str
    token_ids: list[Count]
    prompt_logprobs: list[ScoredTokenId] = []
    logprobs: list[ScoredTokenId] = []
    model: str = ""
    scheme: str = ""
    finish_reason: FinishReason | None = None
    timings: SequenceTimings | None = None


class Tokens(Answer):
    """Token ids of a text."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str | None] = []


class DetokenizedText(Answer):
    """Text of token ids."""

    prompt: str


class ModelCard(Answer):
    """A model; what is not known before it is loaded is null."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count | None
    scheme: str
    has_chat_template: bool | None
    sampling_defaults: SamplingDefaults | None


class ModelList(Answer):
    """All models, of which there is one."""

    object: Literal["list"]
    data: list[ModelCard]


class Alive(Answer):
    """The process makes progress."""

    status: Literal["ok"]


class Readiness(Answer):
    """How far the service has come; why it takes no requests, if it does not."""

    phase: Phase
    done_bytes: Count
    total_bytes: Count
    elapsed_s: float
    remaining_s: float | None
    error: ErrorDetail | None = None


class Build(Answer):
    """Versions."""

    version: str
    python: str
    torch: str
