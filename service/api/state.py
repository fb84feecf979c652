"""What the routes share: the progress of the start, and the model once it is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.api.defaults import SamplingDefaults
from service.api.grammars import GrammarChecker
from service.api.streams import EventRouter
from service.api.templates import ChatTemplate
from service.api.text import TextCodec
from service.engine.sequence import FinishReason, SamplingParams
from service.engine.stats import EngineState
from service.errors import NotFound, QueueFull, ServiceFailed, Unavailable
from service.loading.fidelity_report import Fidelity
from service.loading.progress import LoadProgress, Phase
from service.loading.report import LoadReport
from service.metrics import Metrics

_REJECTIONS = {Phase.DRAINING: "draining", Phase.FAILED: "failed"}


class EngineHandle(Protocol):
    """What the HTTP side uses of the engine; safe to call from any thread."""

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> None:
        """Accept a sequence, or raise a `RequestError`."""

    def check_room(self, num_sequences: int) -> None:
        """Raise the `RequestError` that `submit` raises for want of room."""

    def prepare_grammar(self, request_id: str, grammar: str) -> None:
        """Compile the grammar of a sequence that `submit` brings next, or raise a `GrammarError`."""

    def abort(self, request_id: str, reason: FinishReason = ...) -> None:
        """End a sequence; its terminal event still comes."""

    def is_queued(self, request_id: str) -> bool:
        """Whether a sequence waits and was never scheduled."""

    @property
    def has_failed(self) -> bool:
        """Whether only a restart helps."""

    def state(self) -> EngineState:
        """Read the gauges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that can take requests.

    Attributes:
        max_model_len: prompt and new tokens of one sequence, as far as context and KV memory allow.
        fidelity: how far the comparison with the unquantized model has come.
        chat_template: None if the model has none.
        grammars: None without the extra `grammar`.
    """

    engine: EngineHandle
    codec: TextCodec
    report: LoadReport
    fidelity: Callable[[], Fidelity]
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    sampling_defaults: SamplingDefaults
    chat_template: ChatTemplate | None
    grammars: GrammarChecker | None


@dataclass(slots=True, kw_only=True)
class ServiceState:
    """Owned by the event loop, which alone sets `served`; `progress` and `metrics` take care of themselves.

    Attributes:
        model_name: what clients call the model; known from the start.
        scheme: the `scheme` label.
        created: Unix seconds of the start.
        queue_timeout_s: how long a request may wait for its start.
        request_timeout_s: how long it may take in all.
        log_prompts: whether the log may hold what clients send.
    """

    model_name: str
    scheme: str
    metrics: Metrics
    router: EventRouter
    progress: LoadProgress = field(default_factory=LoadProgress)
    served: ServedModel | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    log_prompts: bool = False

    @property
    def phase(self) -> Phase:
        """Where the service is in its life; it has failed also when its engine has."""
        if self.served is not None and self.served.engine.has_failed:
            return Phase.FAILED
        return self.progress.phase

    def require_served(self, model: str | None = None) -> ServedModel:
        """The model, if it takes requests and is the one that a request names.

        Raises:
            NotFound: another model.
            Unavailable: it is loading, draining or has failed.
        """
        self.check_model(model)
        if self.served is None or self.phase is not Phase.READY:
            self.metrics.count_rejected(_REJECTIONS.get(self.phase, "loading"))
            raise self.not_ready()
        return self.served

    def check_room(self, num_sequences: int = 1) -> None:
        """Refuse so many sequences if the model that is served has no room for them now.

        Raises:
            QueueFull, Unavailable: what the engine would raise; counted.
        """
        if self.served is None or self.phase is not Phase.READY:
            return  # another error says why
        try:
            self.served.engine.check_room(num_sequences)
        except (QueueFull, Unavailable) as error:
            self.count_rejected(error)
            raise

    def count_rejected(self, error: QueueFull | Unavailable) -> None:
        """The engine has refused a request."""
        self.metrics.count_rejected("queue_full" if isinstance(error, QueueFull) else "unavailable")

    def not_ready(self) -> Unavailable:
        """Why no request is taken in this phase, and whether it will be."""
        phase = self.phase
        if phase is Phase.FAILED:
            return ServiceFailed("the service has failed; its log has the reason; restart it", code="failed")
        return Unavailable(
            f"the service is in phase {phase}; it takes requests when /readyz answers 200; retry later",
            code=str(phase),
        )

    def check_model(self, model: str | None) -> None:
        """Raise NotFound for a name that is not the served model's."""
        if model is not None and model != self.model_name:
            raise NotFound(
                f"model {model!r} is not served here; this service has {self.model_name!r}; use it, or leave model out",
                param="model",
                code="model_not_found",
            )

    def passed_limit_s(self) -> float | None:
        """The seconds that a step may take, if requests are open and none was finished for longer; else None."""
        busy_since = self.router.busy_since
        if self.served is None or busy_since is None:
            return None
        busy_s = time.monotonic() - busy_since
        engine = self.served.engine.state()
        stuck_s = busy_s if engine.since_step_s is None else min(busy_s, engine.since_step_s)
        return engine.step_limit_s if stuck_s > engine.step_limit_s else None
