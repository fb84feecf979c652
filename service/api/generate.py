"""`POST /generate`: the native route, with token ids and timings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.answers import Generated, GeneratedDelta, GeneratedTexts
from service.api.choices import Delta, Result
from service.api.event_stream import open_stream
from service.api.generation import Generation
from service.api.logprobs import LogprobWriter
from service.api.openapi import worked
from service.api.preparation import preparation
from service.api.rendering import json_response, long_response
from service.api.routes import GenerationRoute
from service.api.schemas import GenerateRequest, Prompt
from service.api.state import ServiceState
from service.engine.sequence import SequenceTimings
from service.errors import InvalidRequest

_PROMPT_FIELDS = ("prompt", "prompts", "token_ids")

Writer = Callable[[Delta | Result], dict[str, Any]]
"""Writes the fields of log-probabilities of a delta or result."""


def generate_router(state: ServiceState) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=GenerationRoute)

    @router.post("/generate", response_model=None, responses=worked(Generated | GeneratedTexts, chunk=GeneratedDelta))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue `prompt`, `token_ids`, or each of `prompts`; without `max_tokens` to the end of the context.

        The answer is one result, or with `prompts` or an `n` above 1 a list of them.
        """
        prompts, param = _prompts_of(body)
        head = {"model": state.model_name, "scheme": state.scheme}
        with Generation(state, state.require_served(body.model)) as generation:
            async with preparation(state, request):
                await generation.start(prompts, body, param=param, default_max_tokens=None)
            generation.watch(request)
            write = partial(_logprobs, generation.logprobs, is_wanted=bool(body.logprobs))
            if body.stream:
                return await open_stream(
                    generation, render=lambda deltas: _events(head, deltas, write), last_event=lambda: b""
                )
            results = await generation.results()
            is_single = body.prompts is None and body.n in (None, 1)
            make = partial(_answer, head, results, write, is_single=is_single)
            return await long_response(make) if generation.is_long else json_response(make())

    return router


def _answer(head: dict[str, str], results: list[Result], write: Writer, *, is_single: bool) -> dict[str, Any]:
    answers = [head | write(result) | _result(result) for result in results]
    return answers[0] if is_single else head | {"results": answers}


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


def _result(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_generated_tokens": len(result.token_ids),
        "timings": _timings(result.timings),
    }


def _events(head: dict[str, str], deltas: list[Delta], write: Writer) -> bytes:
    """One event for each delta; the last of a choice has the reason, the timings and the scheme as well."""
    return "".join(f"data: {json.dumps(_delta(head, delta, write))}\n\n" for delta in deltas).encode("ascii")


def _delta(head: dict[str, str], delta: Delta, write: Writer) -> dict[str, Any]:
    event = {"index": delta.index, "text": delta.text, "token_ids": delta.token_ids} | write(delta)
    if delta.timings is None:
        return event
    return event | head | {"finish_reason": delta.finish_reason, "timings": _timings(delta.timings)}


def _logprobs(writer: LogprobWriter, part: Delta | Result, *, is_wanted: bool) -> dict[str, Any]:
    """Log-probabilities: of the prompt, where there are some, and of the generated tokens, if they are wanted."""
    fields = {"prompt_logprobs": writer.native(part.prompt_scores)} if part.prompt_scores else {}
    return fields | ({"logprobs": writer.native(part.scores)} if is_wanted else {})


def _timings(timings: SequenceTimings) -> dict[str, float | None]:
    """Seconds between named events; see `SequenceTimings`."""
    return {"queue_s": timings.queue_s, "first_token_s": timings.first_token_s, "total_s": timings.total_s}
