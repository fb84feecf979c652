"""The sequences of one HTTP request: submitted together, read together, aborted together."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import Request
from starlette.types import Receive

from service.api.errors import ClientDisconnected
from service.api.logprobs import LogprobWriter, ScoreQueue, TokenScore
from service.api.logs import REQUEST_ID
from service.api.sampling import sampling_params, with_seed_of
from service.api.schemas import Prompt, SamplingFields
from service.api.state import ServedModel, ServiceState
from service.api.streams import Inbox
from service.api.text import TextStream
from service.engine.sequence import FinishReason, SequenceEvent, SequenceTimings
from service.errors import (
    EngineFailure,
    InvalidRequest,
    QueueFull,
    RequestError,
    ServiceFailed,
    Unavailable,
)

MAX_SEQUENCES = 256
"""Of one request: prompts times choices of each."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event brought for one choice.

    Attributes:
        scores: of the tokens that begin in this text or an earlier one and were not told yet, if they are asked for.
        finish_reason: `stop` or `length` in the last delta of a choice.
        timings: with `finish_reason`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    finish_reason: str | None
    timings: SequenceTimings | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One choice as a whole."""

    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    finish_reason: str
    num_prompt_tokens: int
    timings: SequenceTimings


@dataclass(frozen=True, slots=True)
class _Choice:
    index: int
    num_prompt_tokens: int
    text: TextStream
    scores: ScoreQueue


class Generation:
    """Runs a request's prompts in the engine, `n` choices for each, and yields what comes back.

    A context manager that closes at the end, whatever happened, unless a stream has taken it over.

    Attributes:
        logprobs: writes the scores of the choices.
        num_prompt_tokens: of all prompts, each once.
    """

    def __init__(self, state: ServiceState, served: ServedModel) -> None:
        self._state = state
        self._served = served
        self._inbox = Inbox()
        self._choices: dict[str, _Choice] = {}
        self._open: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._is_streamed = False
        self.logprobs = LogprobWriter(served.codec)
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def __enter__(self) -> Generation:
        """Nothing runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close, unless a stream will."""
        if not self._is_streamed:
            self.close()

    async def start(
        self, prompts: Sequence[Prompt], fields: SamplingFields, *, param: str, default_max_tokens: int | None
    ) -> None:
        """Tokenize and submit all prompts; choices come in the order of prompts, those of one side by side.

        `param` is the request's field that holds the prompts, for errors; `default_max_tokens` is taken where
        the request has none, and None is the rest of the context.

        Raises:
            RequestError: a prompt is refused; closing takes back the others.
        """
        num_choices = fields.n or 1
        if num_choices * len(prompts) > MAX_SEQUENCES:
            raise InvalidRequest(
                f"n is {num_choices} and there are {len(prompts)} prompts, which makes {num_choices * len(prompts)} "
                f"texts; at most {MAX_SEQUENCES} are allowed; lower n or send fewer prompts",
                param="n",
                code="invalid_value",
            )
        codec = self._served.codec
        all_ids = [await codec.encode(p, param=param) if isinstance(p, str) else p for p in prompts]
        all_params = [
            sampling_params(fields, self._served, len(ids), param=param, default_max_tokens=default_max_tokens)
            for ids in all_ids
        ]
        request_id = f"{REQUEST_ID.get()}-{uuid.uuid4().hex[:8]}"  # clients may send one id twice
        choices = (
            (prompt_ids, with_seed_of(params, number))
            for prompt_ids, params in zip(all_ids, all_params, strict=True)
            for number in range(num_choices)
        )
        for index, (prompt_ids, params) in enumerate(choices):
            sequence_id = f"{request_id}-{index}"
            try:
                self._served.engine.submit(sequence_id, prompt_ids, params)
            except InvalidRequest as error:
                error.param = param if error.param == "prompt" else error.param
                raise
            except (QueueFull, Unavailable) as error:
                self._state.metrics.count_rejected("queue_full" if isinstance(error, QueueFull) else "unavailable")
                raise
            self._state.router.open(sequence_id, self._inbox)
            self._open.add(sequence_id)
            text = TextStream(codec, prompt_ids, fields.stop)
            self._choices[sequence_id] = _Choice(index, len(prompt_ids), text, ScoreQueue())
        self.num_prompt_tokens = sum(map(len, all_ids))
        self._state.metrics.prompt_tokens.inc(self.num_prompt_tokens)

    def watch(self, request: Request) -> None:
        """Abort everything when the client leaves; the request's body must have been read."""
        self._watcher = asyncio.create_task(self._abort_on_disconnect(request.receive))

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What each step brings, until all choices are finished.

        Raises:
            EngineFailure, Unavailable: a sequence ended badly.
            ClientDisconnected: nobody is there to read the rest.
        """
        while self._open:
            deltas: list[Delta] = []
            try:
                for event in await self._inbox.take():
                    if (delta := self._read(event)) is not None:
                        deltas.append(delta)  # noqa: PERF401 - it stays when the next event raises
            except (RequestError, ClientDisconnected):
                if deltas:  # what came before the failure is not lost
                    yield deltas
                raise
            if deltas:
                yield deltas

    async def results(self) -> list[Result]:
        """All choices as a whole; raises what `deltas` raises."""
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        async for step in self.deltas():
            for delta in step:
                deltas[delta.index].append(delta)
        return [
            _join(parts, choice.num_prompt_tokens) for parts, choice in zip(deltas, self._choices.values(), strict=True)
        ]

    def hand_over(self) -> None:
        """Leave it to a stream to close this."""
        self._is_streamed = True

    def close(self) -> None:
        """Abort what still runs and forget it."""
        if self._watcher is not None:
            self._watcher.cancel()
        for sequence_id in self._open:
            self._state.router.close(sequence_id)
            self._served.engine.abort(sequence_id, FinishReason.ABORT)
        self._open.clear()

    async def _abort_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for sequence_id in self._open:
            self._served.engine.abort(sequence_id, FinishReason.ABORT)

    def _read(self, event: SequenceEvent) -> Delta | None:
        """Turn an event into text; None if there is nothing to tell.

        Raises:
            EngineFailure, Unavailable, ClientDisconnected: the sequence ended badly.
        """
        choice = self._choices[event.request_id]
        text, token_ids, reason = "", event.token_ids, event.finish_reason
        was_stopped = choice.text.stopped
        if was_stopped:
            token_ids = ()
        elif token_ids:
            text = _push(choice, event)
            self.num_generated_tokens += len(token_ids)
            self._state.metrics.generated_tokens.inc(len(token_ids))
            if choice.text.stopped and reason is None:
                self._served.engine.abort(event.request_id, FinishReason.STOP)
        if reason is None:
            scores = choice.scores.take(text, all_text=False)
            return Delta(choice.index, text, token_ids, scores, None, None) if token_ids else None
        self._open.discard(event.request_id)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH) and not was_stopped:
            raise _failure(reason, event.error)
        text += choice.text.finish()
        reason = FinishReason.STOP if choice.text.stopped else reason
        scores = choice.scores.take(text, all_text=not choice.text.stopped)
        return Delta(choice.index, text, token_ids, scores, str(reason), event.timings)


def _push(choice: _Choice, event: SequenceEvent) -> str:
    """The text that an event's tokens set free."""
    if not event.logprobs:
        return choice.text.push(event.token_ids)
    text = ""
    for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=True):
        choice.scores.add(TokenScore(token_id, choice.text.num_characters, logprobs))
        text += choice.text.push((token_id,))
    return text


def _join(deltas: list[Delta], num_prompt_tokens: int) -> Result:
    last = deltas[-1]
    assert last.finish_reason is not None
    assert last.timings is not None
    return Result(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        scores=tuple(score for delta in deltas for score in delta.scores),
        finish_reason=last.finish_reason,
        num_prompt_tokens=num_prompt_tokens,
        timings=last.timings,
    )


def _failure(reason: FinishReason, error: str | None) -> Exception:
    """Why a sequence has no proper end, as the client is told."""
    if reason is FinishReason.ABORT:
        return ClientDisconnected()
    if reason is FinishReason.SHUTDOWN:
        return Unavailable("the service shuts down before this request was finished; retry", code="shutdown")
    if error is None:
        return ServiceFailed("the engine has failed; restart the service", code="engine_failed")
    return EngineFailure(f"{error}; other requests are not affected", code=f"engine_{reason}")
