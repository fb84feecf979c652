"""`POST /generate`: the native route, with token ids and timings."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.api.event_stream import open_stream
from service.api.generation import Delta, Generation, Result
from service.api.logprobs import LogprobWriter, TokenScore
from service.api.schemas import GenerateRequest, Prompt
from service.api.state import ServiceState
from service.engine.sequence import SequenceTimings
from service.errors import InvalidRequest

_PROMPT_FIELDS = ("prompt", "prompts", "token_ids")


def generate_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/generate", response_model=None)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue `prompt`, `token_ids`, or each of `prompts`; without `max_tokens` to the end of the context.

        The answer is one result, or with `prompts` or an `n` above 1 a list of them.
        """
        prompts, param = _prompts_of(body)
        head = {"model": state.model_name, "scheme": state.scheme}
        with Generation(state, state.require_served(body.model)) as generation:
            await generation.start(prompts, body, param=param, default_max_tokens=None)
            generation.watch(request)
            writer = generation.logprobs if body.logprobs else None
            if body.stream:
                return await open_stream(
                    generation, render=lambda deltas: _events(head, deltas, writer), last_event=lambda: b""
                )
            results = [head | _result(result, writer) for result in await generation.results()]
            is_single = body.prompts is None and body.n in (None, 1)
            return JSONResponse(results[0] if is_single else head | {"results": results})

    return router


def _prompts_of(body: GenerateRequest) -> tuple[list[Prompt], str]:
    """The prompts, and the field that holds them."""
    given = [name for name in _PROMPT_FIELDS if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"{' and '.join(given) or 'no prompt'} given; send exactly one of prompt, prompts and token_ids",
            param=given[-1] if given else "prompt",
            code="invalid_value" if given else "missing_field",
        )
    value = getattr(body, given[0])
    return (value if body.prompts is not None else [value]), given[0]


def _result(result: Result, writer: LogprobWriter | None) -> dict[str, Any]:
    return _logprobs(result.scores, writer) | {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_generated_tokens": len(result.token_ids),
        "timings": _timings(result.timings),
    }


def _events(head: dict[str, str], deltas: list[Delta], writer: LogprobWriter | None) -> bytes:
    """One event for each delta; the last of a choice has the reason, the timings and the scheme as well."""
    return "".join(f"data: {json.dumps(_delta(head, delta, writer))}\n\n" for delta in deltas).encode("ascii")


def _delta(head: dict[str, str], delta: Delta, writer: LogprobWriter | None) -> dict[str, Any]:
    event = {"index": delta.index, "text": delta.text, "token_ids": delta.token_ids}
    event |= _logprobs(delta.scores, writer)
    if delta.timings is None:
        return event
    return event | head | {"finish_reason": delta.finish_reason, "timings": _timings(delta.timings)}


def _logprobs(scores: tuple[TokenScore, ...], writer: LogprobWriter | None) -> dict[str, Any]:
    """The field of log-probabilities, if they are asked for."""
    return {} if writer is None else {"logprobs": writer.native(scores)}


def _timings(timings: SequenceTimings) -> dict[str, float | None]:
    """Seconds between named events; see `SequenceTimings`."""
    return asdict(timings)
