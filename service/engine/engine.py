"""The engine: takes token ids from any thread, runs the model on its own, delivers events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch
from torch import nn

from service.engine.allocator import BlockAllocator
from service.engine.block_manager import BlockManager
from service.engine.blocks import BLOCK_SIZE
from service.engine.checks import check_length, check_queue, check_token_ids
from service.engine.config import EngineConfig
from service.engine.execution import StepExecutor
from service.engine.filters import check_supported
from service.engine.grammar import Compile, Grammars
from service.engine.logprobs import max_scored_tokens
from service.engine.pacing import STEP_LIMIT_FACTOR, StepPacer
from service.engine.paths import choose_runner
from service.engine.probe import num_probed_tokens
from service.engine.runner import ModelRunner
from service.engine.sampler import Sampler
from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, SamplingParams, Sequence, SequenceEvent
from service.engine.stats import EngineObserver, EnginePath, EngineState
from service.errors import InvalidRequest, SettingError, Unavailable

logger = logging.getLogger(__name__)

_LAST_STEP_S = 10.0  # how long `drain` and `stop` wait for the step that is under way
_QUIET_S = 1.0  # without a request before blocks are checked, which takes 30 ms where there are 100,000


class Engine:
    """Continuous batching on one thread.

    `submit`, `abort`, `state`, `drain` and `stop` may be called from any thread; the observer and
    `deliver` are called on the engine thread, `deliver` at most once per step with all its events.
    Each accepted request gets exactly one terminal event, whatever ends it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        *,
        observer: EngineObserver,
        deliver: Callable[[Seq[SequenceEvent]], None],
        compile_grammar: Compile | None = None,
    ) -> None:
        check_supported(model)
        self._model = model
        self._config = config
        self._observer = observer
        self._deliver = deliver
        self._grammars = Grammars(compile_grammar)
        self._executor: StepExecutor  # made and used on the engine thread
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._changed = threading.Condition()  # guards all below
        self._allocator = BlockAllocator(0)
        self._pacer = StepPacer(config.step_budget_ms / 1000, least_tokens=BLOCK_SIZE)
        self._scheduler = self._new_scheduler(config.max_num_seqs)
        self._path: EnginePath | None = None
        self._open: set[str] = set()  # accepted and not ended
        self._is_stepping = False
        self._refusal: tuple[str, str] | None = ("the engine has not started; retry later", "loading")
        self._stopping = False
        self._has_failed = False
        self._last_step_at: float | None = None  # Unix time
        self._stepped_at: float | None = None  # the same moment, monotonic

    def start(self) -> None:
        """Start the engine thread; returns when it can serve.

        Raises:
            UnsupportedModel: no way of computing the model is right.
            SettingError: the KV memory holds no block.
        """
        self._thread.start()
        self._started.result()

    @property
    def path(self) -> EnginePath | None:
        """In which way the model is computed; None before the start."""
        return self._path

    @property
    def has_failed(self) -> bool:
        """Whether the engine thread has ended by an error of its own; only a restart helps."""
        return self._has_failed

    def submit(self, request_id: str, prompt_ids: Seq[int], params: SamplingParams, *, cache_salt: str = "") -> None:
        """Accept a sequence; events with `request_id` follow.

        It shares cached prompts only with sequences of the same `cache_salt`.

        Raises:
            InvalidRequest: no token, a token outside the vocabulary, or a `request_id` in use.
            PromptTooLong: prompt and `max_tokens` exceed the context or the KV memory.
            QueueFull: `max_queue` sequences wait.
            Unavailable: not started, draining, stopped or failed.
        """
        check_token_ids(prompt_ids, vocab_size=self._config.vocab_size)
        with self._changed:
            self._check_room()
            num_slots = self._allocator.num_blocks * BLOCK_SIZE
            check_length(prompt_ids, params, max_model_len=self._config.max_model_len, num_slots=num_slots)
            if request_id in self._open:
                raise InvalidRequest(
                    f"request id {request_id!r} is in use; ids are unique; choose another", code="request_id_in_use"
                )
            self._open.add(request_id)
            self._scheduler.add(
                Sequence(
                    request_id=request_id,
                    token_ids=list(prompt_ids),
                    num_prompt_tokens=len(prompt_ids),
                    params=params,
                    submitted_at=time.monotonic(),
                    cache_salt=cache_salt,
                )
            )
            self._changed.notify_all()

    def check_room(self, num_sequences: int) -> None:
        """Raise what `submit` would raise now at one of so many sequences, whatever they are.

        Raises:
            InvalidRequest: the queue never holds as many.
            QueueFull, Unavailable: as `submit`.
        """
        with self._changed:
            self._check_room(num_sequences)

    def prepare_grammar(self, request_id: str, grammar: str) -> None:
        """Compile a grammar on the calling thread, for the `submit` that follows; else the engine waits for it.

        Raises:
            GrammarError: it cannot be compiled.
        """
        self._grammars.prepare(request_id, grammar)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence with `reason`; one that is unknown or has ended is left alone."""
        with self._changed:
            self._scheduler.abort(request_id, reason, time.monotonic())
            self._changed.notify_all()

    def is_queued(self, request_id: str) -> bool:
        """Whether a sequence waits and was never scheduled."""
        with self._changed:
            return self._scheduler.is_queued(request_id)

    def state(self) -> EngineState:
        """Read the gauges."""
        with self._changed:
            return EngineState(
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                num_kv_blocks=self._allocator.num_blocks,
                num_free_kv_blocks=self._allocator.num_free,
                num_cached_kv_blocks=self._allocator.num_cached,
                block_size=BLOCK_SIZE,
                kv_cache_bytes=self._executor.runner.num_bytes if self._path else 0,
                last_step_at=self._last_step_at,
                since_step_s=None if self._stepped_at is None else time.monotonic() - self._stepped_at,
                step_limit_s=self._step_limit_s(),
                has_failed=self._has_failed,
                path=self._path,
            )

    def drain(self, timeout_s: float) -> None:
        """Refuse new sequences and wait for the accepted ones; what is left after `timeout_s` ends with SHUTDOWN."""
        with self._changed:
            self._refuse("the service is draining and takes no new request; retry on another instance", "draining")
            if not self._changed.wait_for(self._is_idle, timeout_s):
                self._scheduler.abort_all(FinishReason.SHUTDOWN, time.monotonic())
                self._changed.notify_all()
                self._changed.wait_for(self._is_idle, _LAST_STEP_S)

    def stop(self) -> None:
        """End all sequences with SHUTDOWN, then the thread."""
        with self._changed:
            self._refuse("the engine has stopped; retry on another instance", "stopped")
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP_S)
        self._grammars.close()

    def step(self) -> None:
        """Schedule, forward, sample, commit, deliver."""
        with self._changed:
            batch = self._scheduler.schedule(time.monotonic())
        if batch is not None:
            for request_id in batch.preempted:
                self._executor.runner.forget(request_id)
            outcomes = self._executor.compute(batch.works)
            with self._changed:
                stats = self._scheduler.commit(batch, outcomes, time.monotonic())
                self._last_step_at, self._stepped_at = time.time(), time.monotonic()
            self._observer.on_step(stats)
        self._publish()

    def _new_scheduler(self, max_num_seqs: int, runner: ModelRunner | None = None) -> Scheduler:
        config = self._config
        chunked = runner is None or runner.chunked
        # Elsewhere blocks only count tokens, and each sequence has a cache of its own.
        is_packed = runner is not None and runner.path is EnginePath.PACKED
        prefix_cache = config.prefix_cache and is_packed and not config.deterministic
        return Scheduler(
            BlockManager(self._allocator, block_size=BLOCK_SIZE, prefix_cache=prefix_cache),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunked=chunked,
            chunk_length=config.chunk_length(chunked=chunked) or 1,
            pacer=self._pacer,
            max_num_scored=max_scored_tokens(config.vocab_size),
        )

    def _step_limit_s(self) -> float:
        if self._path is None:
            return self._config.least_step_limit_s
        size = self._config.longest_step(self._path, chunked=self._executor.runner.chunked)
        return max(self._config.least_step_limit_s, STEP_LIMIT_FACTOR * self._pacer.longest_s(size))

    def _run(self) -> None:
        """Body of the engine thread."""
        try:
            self._prepare()
        except BaseException as error:  # noqa: BLE001 - `start` raises it
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        reason = FinishReason.SHUTDOWN
        try:
            self._serve()
        except Exception:
            logger.exception("the engine thread failed")
            reason = FinishReason.ERROR
            with self._changed:
                self._refusal = ("the engine has failed; restart the service", "engine_failed")
                self._has_failed = True
        self._end_all(reason)

    def _prepare(self) -> None:
        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)  # holds for the calling thread only
        config = self._config
        started = time.monotonic()
        runner = choose_runner(self._model, vocab_size=config.vocab_size, max_model_len=config.max_model_len)
        probe_s = time.monotonic() - started
        try:
            num_blocks, num_seqs = runner.allocate(
                config.kv_memory_bytes,
                max_num_seqs=config.max_num_seqs,
                max_model_len=config.max_model_len,
                kv_cache=config.kv_cache,
            )
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise RuntimeError
            raise SettingError(
                f"{config.kv_memory_bytes} bytes for keys and values cannot be allocated; lower --kv-memory"
            ) from error
        chunk_length = config.chunk_length(chunked=runner.chunked)
        if chunk_length is not None:
            runner.make_deterministic()
            logger.info("deterministic: each sequence is computed on its own, and the prefix cache is off")
        self._executor = StepExecutor(runner, Sampler(self._grammars), self._observer, chunk_length=chunk_length)
        with self._changed:
            self._pacer.assume(probe_s / num_probed_tokens(config.max_model_len))
            self._allocator = BlockAllocator(num_blocks)
            self._scheduler = self._new_scheduler(num_seqs, runner)
            self._path = runner.path
            self._refusal = None

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with self._changed:
                self._is_stepping = False
                self._changed.notify_all()
                is_quiet = not self._changed.wait_for(self._is_wanted, _QUIET_S)
            if is_quiet:
                self._scheduler.check_blocks()  # without the lock: only this thread changes blocks
            with self._changed:
                self._changed.wait_for(self._is_wanted)
                if self._stopping:
                    return
                self._is_stepping = True
            self.step()

    def _end_all(self, reason: FinishReason) -> None:
        with self._changed:
            self._scheduler.abort_all(reason, time.monotonic())
            while self._scheduler.num_running:
                try:
                    self._scheduler.schedule(time.monotonic())  # takes out what was running
                except AssertionError:  # by the blocks of one of them, which is out; the others are still to end
                    logger.exception("blocks could not be given back")
        self._publish()
        with self._changed:
            self._is_stepping = False
            self._changed.notify_all()

    def _publish(self) -> None:
        """Tell the observer, then deliver: who sees the end of a request sees it counted."""
        with self._changed:
            events = self._scheduler.take_events()
            self._open.difference_update(event.request_id for event in events if event.finish_reason is not None)
        try:
            for event in events:
                if event.finish_reason is None or event.timings is None:
                    continue
                self._executor.forget(event.request_id)
                if event.finish_reason is FinishReason.NONFINITE:
                    self._observer.on_nonfinite()
                self._observer.on_finished(event.finish_reason, event.timings)
        finally:  # whatever an observer does, each request gets its end
            if events:
                self._deliver(events)

    def _check_room(self, num_sequences: int = 1) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal[0], code=self._refusal[1])
        check_queue(
            num_sequences,
            num_waiting=self._scheduler.num_waiting,
            max_queue=self._config.max_queue,
            queue_s=self._scheduler.queue_s(time.monotonic()),
        )

    def _refuse(self, message: str, code: str) -> None:
        if not self._has_failed:  # that reason stays
            self._refusal = (message, code)

    def _is_wanted(self) -> bool:
        return self._stopping or self._scheduler.has_work

    def _is_idle(self) -> bool:
        return not self._is_stepping and not self._scheduler.has_work
