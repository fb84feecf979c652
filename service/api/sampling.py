"""From the fields of a request to the parameters of its sequences, checked against the model that serves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from service.api.schemas import SamplingFields
from service.api.state import ServedModel
from service.engine.sequence import SamplingParams
from service.errors import InvalidRequest, PromptTooLong

MAX_PROMPT_LOGPROBS = 2**18
"""That one request is told: two for each of 1024 tokens of 128 prompts. They take 10 to 30 MB of JSON."""


def sampling_params(
    fields: SamplingFields,
    served: ServedModel,
    num_prompt_tokens: int,
    *,
    param: str,
    default_max_tokens: int | None,
) -> SamplingParams:
    """The parameters of a prompt's first sequence.

    Args:
        param: the request's field that holds the prompt, for errors.
        default_max_tokens: taken where the request has none; None is the rest of the context.

    Raises:
        InvalidRequest: a field does not fit the model.
        PromptTooLong: prompt and new tokens exceed the context.
    """
    _check_vocabulary(fields, served.vocab_size)
    max_tokens = _max_tokens(fields, served, num_prompt_tokens, param=param, default=default_max_tokens)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}; the request ends after {max_tokens} new tokens; "
            f"lower min_tokens or raise {fields.token_limit()[0]}",
            param="min_tokens",
            code="invalid_value",
        )
    defaults = served.sampling_defaults
    # A text that follows a grammar needs an end.
    ends = frozenset() if fields.ignore_eos and fields.constraint() is None else served.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(fields.temperature, defaults.temperature),
        top_k=defaults.top_k if fields.top_k is None else fields.top_k,
        top_p=_or(fields.top_p, defaults.top_p),
        min_p=_or(fields.min_p, defaults.min_p),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        logit_bias=fields.logit_bias,
        min_tokens=min_tokens,
        seed=fields.seed,
        stop_token_ids=ends | frozenset(fields.stop_token_ids),
        num_logprobs=fields.num_logprobs(),
        num_prompt_logprobs=fields.num_prompt_logprobs(),
    )


def check_prompt_logprobs(fields: SamplingFields, num_prompt_tokens: int) -> None:
    """Refuse a request that asks for too many of them for `num_prompt_tokens` tokens, those of all choices.

    Raises:
        InvalidRequest: more than `MAX_PROMPT_LOGPROBS`.
    """
    num_top = fields.num_prompt_logprobs()
    if num_top is None or num_prompt_tokens * (1 + num_top) <= MAX_PROMPT_LOGPROBS:
        return
    field = "logprobs" if fields.echoes_prompt() else "prompt_logprobs"
    raise InvalidRequest(
        f"{field} is {num_top} for {num_prompt_tokens} prompt tokens, which makes {num_prompt_tokens * (1 + num_top)} "
        f"log-probabilities; at most {MAX_PROMPT_LOGPROBS} are told; send fewer prompts, or lower {field} or n",
        param=field,
        code="invalid_value",
    )


async def checked_grammar(fields: SamplingFields, served: ServedModel) -> str | None:
    """The grammar that a request wants its texts to follow, after a trial; None if it wants none.

    Raises:
        InvalidRequest: this service has no grammars, or not this one.
    """
    constraint = fields.constraint()
    if constraint is None:
        return None
    if served.grammars is None:
        raise InvalidRequest(
            f"{constraint.param} asks for text that follows a grammar; this service was installed without the extra "
            "`grammar`; leave it out, or let the operator run: pip install -e '.[grammar]'",
            param=constraint.param,
            code="not_supported",
        )
    return await served.grammars.check(constraint)


def with_seed_of(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of the `index`-th sequence of a prompt: seeds count up, so that equal prompts give different texts."""
    return params if params.seed is None else replace(params, seed=params.seed + index)


def _max_tokens(
    fields: SamplingFields, served: ServedModel, num_prompt_tokens: int, *, param: str, default: int | None
) -> int:
    context = served.max_model_len
    rest = context - num_prompt_tokens
    limit_field, limit = fields.token_limit()
    if limit == 0 and not fields.echoes_prompt() and fields.num_prompt_logprobs() is None:
        other = "prompt_logprobs" if "prompt_logprobs" in type(fields).model_fields else "echo true"
        raise InvalidRequest(
            f"{limit_field} is 0; then only the prompt can be told, which was not asked for; "
            f"send at least 1, or {other} as well",
            param=limit_field,
            code="invalid_value",
        )
    max_tokens = max(1, rest if default is None else min(rest, default)) if limit is None else limit
    if max_tokens > rest:
        raise PromptTooLong(
            f"{num_prompt_tokens} prompt tokens and {max_tokens} new ones make {num_prompt_tokens + max_tokens}; "
            f"the context is {context} tokens; shorten the prompt or lower {limit_field}",
            param=param if rest < 1 else limit_field,
            code="context_length_exceeded",
        )
    return max_tokens


def _check_vocabulary(fields: SamplingFields, vocab_size: int) -> None:
    if fields.top_k is not None and fields.top_k > vocab_size:
        raise InvalidRequest(
            f"top_k is {fields.top_k}; the vocabulary has {vocab_size} tokens; use 0 (all) to {vocab_size}",
            param="top_k",
            code="invalid_value",
        )
    _check_ids("logit_bias", (token_id for token_id, _ in fields.logit_bias), vocab_size)
    _check_ids("stop_token_ids", fields.stop_token_ids, vocab_size)


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{field} has token id {token_id}; the vocabulary is 0..{vocab_size - 1}; "
                "use ids of this model's tokenizer",
                param=field,
                code="invalid_value",
            )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
