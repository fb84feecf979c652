"""The sequences of one HTTP request: submitted together, read together, aborted together."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from fastapi import Request
from starlette.types import Receive

from service.api.choices import Choice, Delta, Result, join, join_events
from service.api.echo import make_echo
from service.api.errors import ClientDisconnected
from service.api.logprobs import LogprobWriter
from service.api.logs import REQUEST_ID, current_record
from service.api.sampling import check_prompt_logprobs, checked_grammar, sampling_params, with_seed_of
from service.api.schemas import Prompt, SamplingFields
from service.api.state import ServedModel, ServiceState
from service.api.streams import MAX_HELD, Inbox
from service.api.text import TextStream
from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent
from service.errors import (
    EngineFailure,
    InvalidRequest,
    QueueFull,
    RequestError,
    RequestTimedOut,
    ServiceFailed,
    Unavailable,
)

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 256
"""Of one request: prompts times choices of each."""
_MAX_LOGGED_CHARACTERS = 10_000
_UNWATCHED_S = 0.01
"""Less than a step may take, so that what a client had is freed as soon."""


class Generation:
    """Runs a request's prompts in the engine, `n` choices for each, and yields what comes back.

    A context manager that closes at the end, whatever happened, unless a stream has taken it over.

    Attributes:
        logprobs: writes the scores of the choices.
        is_long: whether the answer has log-probabilities: 1,000 tokens with 20 each take 40 ms to write.
        num_prompt_tokens: of all prompts, each once.
    """

    def __init__(self, state: ServiceState, served: ServedModel) -> None:
        self._state = state
        self._served = served
        self._inbox = Inbox(on_overflow=self._drop_slow_reader)
        self._choices: dict[str, Choice] = {}
        self._open: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._is_streamed = False
        self._may_stop = False
        self._record = current_record()
        self.logprobs = LogprobWriter(served.codec)
        self.is_long = False
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
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(self._state.request_timeout_s, self._time_out))
        if num_choices * len(prompts) > 1:  # for one there was some when the request came
            self._state.check_room(num_choices * len(prompts))  # a request that finds none costs no tokenizing
        codec = self._served.codec
        all_ids = [await codec.encode(p, param=param) if isinstance(p, str) else p for p in prompts]
        all_params = [
            sampling_params(fields, self._served, len(ids), param=param, default_max_tokens=default_max_tokens)
            for ids in all_ids
        ]
        if (grammar := await checked_grammar(fields, self._served)) is not None:
            all_params = [replace(params, grammar=grammar) for params in all_params]
        self._may_stop = bool(fields.stop)
        self.is_long = not (fields.num_prompt_logprobs() is None and fields.num_logprobs() is None)
        check_prompt_logprobs(fields, num_choices * sum(map(len, all_ids)))
        echoes = [
            await make_echo(codec, prompt, ids, fields, vocab_size=self._served.vocab_size)
            for prompt, ids in zip(prompts, all_ids, strict=True)
        ]
        request_id = f"{REQUEST_ID.get()}-{secrets.token_hex(4)}"  # clients may send one id twice
        choices = (
            (prompt_ids, with_seed_of(params, number), echo)
            for prompt_ids, params, echo in zip(all_ids, all_params, echoes, strict=True)
            for number in range(num_choices)
        )
        for index, (prompt_ids, params, echo) in enumerate(choices):
            sequence_id = f"{request_id}-{index}"
            await self._submit(sequence_id, prompt_ids, params, param=param)
            self._state.router.open(sequence_id, self._inbox)
            self._open.add(sequence_id)
            text = TextStream(codec, prompt_ids, fields.stop, min_tokens=params.min_tokens)
            self._choices[sequence_id] = Choice(
                index, text, num_prompt_tokens=len(prompt_ids), echo=echo, tells_end=fields.echoes_prompt()
            )
        self._timers.append(loop.call_later(self._state.queue_timeout_s, self._time_out_in_queue))
        self.num_prompt_tokens = sum(map(len, all_ids))
        self._state.metrics.count_prompt_tokens(self.num_prompt_tokens)
        self._record.num_prompt_tokens = self.num_prompt_tokens
        if self._state.log_prompts:
            await asyncio.to_thread(self._log_prompts, prompts)

    def watch(self, request: Request) -> None:
        """Abort everything when the client leaves; the request's body must have been read.

        Watching begins a little later, because what is soon answered need not be watched.
        """
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(_UNWATCHED_S, self._begin_watching, request.receive))

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What each step brings, until all choices are finished.

        Raises:
            EngineFailure, Unavailable: a sequence ended badly.
            RequestTimedOut: the request has waited or taken too long.
            ClientDisconnected: nobody is there to read the rest.
        """
        while self._open:
            deltas: list[Delta] = []
            try:
                events = await self._inbox.take()
                for event in join_events(events) if self._inbox.is_patient else events:
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
        self._inbox.is_patient = not self._may_stop  # text that must be searched is searched as it comes
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        async for step in self.deltas():
            for delta in step:
                deltas[delta.index].append(delta)
        return [
            join(parts, choice.num_prompt_tokens) for parts, choice in zip(deltas, self._choices.values(), strict=True)
        ]

    def hand_over(self) -> None:
        """Leave it to a stream to close this."""
        self._is_streamed = True

    def close(self) -> None:
        """Abort what still runs and forget it."""
        if self._watcher is not None:
            self._watcher.cancel()
        for timer in self._timers:
            timer.cancel()
        self._record.num_generated_tokens = self.num_generated_tokens
        if self._open and not self._record.finish_reasons:
            self._record.finish_reasons.add(FinishReason.ABORT)
        for sequence_id in self._open:
            self._state.router.close(sequence_id)
            self._served.engine.abort(sequence_id, FinishReason.ABORT)
        self._open.clear()

    async def _submit(self, sequence_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, param: str) -> None:
        engine = self._served.engine
        if params.grammar is not None:
            await asyncio.to_thread(engine.prepare_grammar, sequence_id, params.grammar)  # it has passed a trial
        try:
            engine.submit(sequence_id, prompt_ids, params, cache_salt=self._record.client or "")
        except InvalidRequest as error:
            error.param = param if error.param == "prompt" else error.param
            raise
        except (QueueFull, Unavailable) as error:
            self._state.count_rejected(error)
            raise

    def _log_prompts(self, prompts: Sequence[Prompt]) -> None:
        """What the model reads; only where an operator has asked for it."""
        for prompt in prompts:
            codec = self._served.codec
            text = prompt if isinstance(prompt, str) else codec.decode(prompt, skip_special_tokens=False)
            logger.info("prompt: %s", text[:_MAX_LOGGED_CHARACTERS])

    def _end(self, reason: FinishReason, error: Exception) -> None:
        """Abort what still runs; who reads is told `error` behind what came before, without waiting for the engine."""
        for sequence_id in self._open:
            self._served.engine.abort(sequence_id, reason)
        self._record.finish_reasons.add(reason)
        self._inbox.fail(error)

    def _time_out(self) -> None:
        limit_s = self._state.request_timeout_s
        message = f"the request took longer than {limit_s:g} s, the limit; ask for fewer tokens, or raise "
        self._end(FinishReason.TIMEOUT, RequestTimedOut(f"{message}--request-timeout", code="request_timeout"))

    def _time_out_in_queue(self) -> None:
        if not self._served.engine.is_queued(next(iter(self._choices))):
            return  # they begin in this order, so that the request has begun
        limit_s = self._state.queue_timeout_s
        message = f"the request waited longer than {limit_s:g} s, the limit, and has not begun; try another instance"
        self._end(FinishReason.TIMEOUT, RequestTimedOut(message, code="queue_timeout"))

    def _drop_slow_reader(self) -> None:
        message = f"more than {MAX_HELD} tokens wait for this client; read faster, or ask for fewer tokens"
        self._end(FinishReason.ABORT, RequestTimedOut(message, code="slow_reader"))

    def _begin_watching(self, receive: Receive) -> None:
        self._watcher = asyncio.create_task(self._abort_on_disconnect(receive))

    async def _abort_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end(FinishReason.ABORT, ClientDisconnected())

    def _read(self, event: SequenceEvent) -> Delta | None:
        """Turn an event into text; None if there is nothing to tell.

        Raises:
            EngineFailure, Unavailable, ClientDisconnected: the sequence ended badly.
        """
        choice, reason = self._choices[event.request_id], event.finish_reason
        was_stopped = choice.stopped
        if reason is not None:
            self._open.discard(event.request_id)
            if reason not in (FinishReason.STOP, FinishReason.LENGTH) and not was_stopped:
                self._record.finish_reasons.add(reason)
                raise _failure(reason, event.error)
        delta = choice.read(event)
        self.num_generated_tokens += len(delta.token_ids)
        self._state.metrics.count_generated_tokens(len(delta.token_ids))
        if delta.finish_reason is not None:
            self._record.finish_reasons.add(FinishReason(delta.finish_reason))
        elif choice.stopped and not was_stopped:
            self._served.engine.abort(event.request_id, FinishReason.STOP)
        has_news = delta.token_ids or delta.prompt_text or delta.prompt_scores or delta.finish_reason
        return delta if has_news else None


def _failure(reason: FinishReason, error: str | None) -> Exception:
    """Why a sequence has no proper end, as the client is told."""
    if reason is FinishReason.ABORT:
        return ClientDisconnected()
    if reason is FinishReason.TIMEOUT:
        return RequestTimedOut("the request was given up for lack of time; retry later", code="timeout")
    if reason is FinishReason.SHUTDOWN:
        return Unavailable("the service shuts down before this request was finished; retry", code="shutdown")
    if error is None:
        return ServiceFailed("the engine has failed; restart the service", code="engine_failed")
    return EngineFailure(f"{error}; other requests are not affected", code=f"engine_{reason}")
