"""The service with its engine in a process of its own, to compare with; see `bench_processes`.

    python -m tests.benchmarks.two_processes serve ...

The command `pennyweight` but for that: HTTP, tokenizing and streams stay here, and `submit`, `abort`, `state` and
events cross a pipe as the objects that cross between the threads otherwise. What the engine tells its observer
crosses with the events of its step. A `submit` is not waited for: what can be wrong with it is checked here.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from torch import nn

from service import assembly, cli
from service.api.state import ServiceState
from service.engine.checks import check_length, check_token_ids
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent, SequenceTimings
from service.engine.stats import EngineObserver, EnginePath, EngineState, StepStats
from service.loading.loader import load_model
from service.loading.progress import LoadProgress
from service.settings import Settings

Observation = tuple[str, tuple[Any, ...]]
"""Name of an observer's method, and its arguments."""


class Relay:
    """Observer and destination of events in the engine's process: sends both, once for each step."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send
        self._observations: list[Observation] = []

    def deliver(self, events: Sequence[SequenceEvent]) -> None:
        observations, self._observations = self._observations, []
        self._send((observations, events))

    def on_step(self, stats: StepStats) -> None:
        self._observations.append(("on_step", (stats,)))

    def on_step_error(self) -> None:
        self._observations.append(("on_step_error", ()))

    def on_nonfinite(self) -> None:
        self._observations.append(("on_nonfinite", ()))

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        self._observations.append(("on_finished", (reason, timings)))


def run_engine(pipe: Connection, settings: Settings, config: EngineConfig) -> None:
    """Body of the engine's process: load, then do what comes through the pipe."""
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            pipe.send(message)

    relay = Relay(send)
    model = load_model(assembly.load_options(settings), LoadProgress()).model
    engine = Engine(model, config, observer=relay, deliver=relay.deliver)
    engine.start()
    send(engine.path)
    while (message := pipe.recv()) is not None:
        name, arguments, options = message
        answer = getattr(engine, name)(*arguments, **options)
        if name == "state":
            send(answer)
    engine.stop()


class RemoteEngine:
    """Stands for the engine in the process of HTTP."""

    settings: Settings
    """Of the service, before the first one is made."""

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        *,
        observer: EngineObserver,
        deliver: Callable[[Sequence[SequenceEvent]], None],
        **_: object,
    ) -> None:
        self._config = config
        self._observer = observer
        self._deliver = deliver
        self._lock = threading.Lock()
        self._states: SimpleQueue[EngineState] = SimpleQueue()
        self.has_failed = False
        self.path: EnginePath | None = None
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=run_engine, args=(other, self.settings, config), daemon=True)

    def start(self) -> None:
        self._process.start()
        self.path = self._pipe.recv()
        threading.Thread(target=self._read, name="events", daemon=True).start()

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, **options: str) -> None:
        config = self._config
        check_token_ids(prompt_ids, vocab_size=config.vocab_size)
        check_length(prompt_ids, params, max_model_len=config.max_model_len, num_slots=config.max_model_len)
        self._call("submit", request_id, list(prompt_ids), params, **options)

    def check_room(self, num_sequences: int) -> None:
        """Never full, as far as this process knows."""

    def prepare_grammar(self, request_id: str, grammar: str) -> None:
        raise NotImplementedError("no grammars here")

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self._call("abort", request_id, reason)

    def is_queued(self, request_id: str) -> bool:
        return False

    def state(self) -> EngineState:
        self._call("state")
        return self._states.get()

    def drain(self, timeout_s: float) -> None:
        self._call("drain", timeout_s)
        self.state()  # the answer follows the drain

    def stop(self) -> None:
        with self._lock:
            self._pipe.send(None)
        self._process.join()

    def _call(self, name: str, *arguments: object, **options: object) -> None:
        with self._lock:
            self._pipe.send((name, arguments, options))

    def _read(self) -> None:
        while True:
            try:
                message = self._pipe.recv()
            except EOFError:
                return
            if isinstance(message, EngineState):
                self._states.put(message)
                continue
            observations, events = message
            for name, arguments in observations:
                getattr(self._observer, name)(*arguments)
            self._deliver(events)


def main() -> int:
    """Run the command with the engine elsewhere."""
    load = assembly.load

    def load_with(settings: Settings, state: ServiceState) -> assembly.Loaded:
        RemoteEngine.settings = settings
        return load(settings, state)

    vars(assembly).update(load=load_with, Engine=RemoteEngine)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
