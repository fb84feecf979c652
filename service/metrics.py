"""Prometheus series of the service: one source for each figure, the same names with and without quantization.

Counters and histograms are kept here; gauges are read when they are scraped, and exist as soon as what they
tell is known. `model`, `scheme` and `device` are on all series. They are added at the scrape, as the device is
known only when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TypeVar

from service import __version__
from service.engine.sequence import FinishReason, SequenceTimings
from service.engine.stats import EngineState, StepStats
from service.loading.fidelity_report import Fidelity
from service.loading.memory import ProcessMemory
from service.loading.progress import LoadProgress, Phase
from service.loading.report import LoadReport
from service.series import Counter, Family, Gauge, Histogram, label_text

_Family = TypeVar("_Family", bound=Family)

PREFIX = "pennyweight"
REJECT_REASONS = (
    *("queue_full", "rate_limit", "concurrency_limit", "connection_limit"),
    *("loading", "draining", "failed", "unavailable"),
)

# Sources: OpenTelemetry's semantic conventions for generative AI (May 2026), with finer steps below 10 ms
# for small models and coarser ones above 10 s for large models on CPUs.
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_TOKEN_BUCKETS = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),)
_REQUEST_BUCKETS = tuple(0.01 * 2**n for n in range(14))
_SEQUENCE_BUCKETS = tuple(float(2**n) for n in range(9))
_BATCH_TOKEN_BUCKETS = tuple(float(4**n) for n in range(8))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """Where the figures of a loaded model come from.

    Attributes:
        engine_state: reads the engine's gauges.
        fidelity: how far the comparison with the unquantized model has come.
        device_memory: reads `device_allocated` and `device_reserved`; empty on a CPU.
    """

    report: LoadReport
    engine_state: Callable[[], EngineState]
    fidelity: Callable[[], Fidelity]
    device_memory: Callable[[], Mapping[str, int]]


class Metrics:
    """All series; also the engine's observer.

    Args:
        device: the label until the model is loaded.
    """

    def __init__(self, progress: LoadProgress, *, model: str, scheme: str, device: str) -> None:
        self._progress = progress
        self._labels = {"model": model, "scheme": scheme, "device": device}
        self._figures: ModelFigures | None = None
        self._memory = ProcessMemory()
        self._load_text = ""
        self._own: list[Family] = []
        self._requests = self._counter("requests", "HTTP requests answered.", "route", "status")
        self._rejected = self._counter("requests_rejected", "Requests refused for want of capacity.", "reason")
        self._finished = self._counter("requests_finished", "Sequences that ended, by reason.", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generated_tokens = self._counter("generated_tokens", "Generated tokens delivered to requests.")
        self._engine_tokens = self._counter("engine_tokens", "Tokens computed by the engine.")
        self._hit_tokens = self._counter("prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had.")
        self._preemptions = self._counter("preemptions", "Sequences sent back to the queue for want of KV blocks.")
        self._step_errors = self._counter("step_errors", "Engine steps that raised.")
        self._nonfinite = self._counter("nonfinite_logits", "Sequences that had NaN or infinite logits.")
        self._queue_s = self._histogram("request_queue_seconds", "Submit to first scheduled.", _FIRST_TOKEN_BUCKETS)
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "Submit to first token sampled.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token_s = self._histogram("inter_token_seconds", "From one token to the next.", _TOKEN_BUCKETS)
        self._request_s = self._histogram("request_seconds", "Submit to end, whatever the reason.", _REQUEST_BUCKETS)
        self._step_s = self._histogram("step_seconds", "One engine step.", _TOKEN_BUCKETS, "kind")
        self._batch_sequences = self._histogram("batch_sequences", "Sequences of a step.", _SEQUENCE_BUCKETS)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens of a step.", _BATCH_TOKEN_BUCKETS)
        for reason in FinishReason:
            self._finished.add(0, reason)
        for name in REJECT_REASONS:
            self._rejected.add(0, name)

    def model_loaded(self, figures: ModelFigures) -> None:
        """From now on the figures of the model are exported."""
        self._labels = self._labels | {"device": figures.report.device}
        self._load_text = self._written(_load_gauges(figures.report))
        self._figures = figures

    def count_request(self, route: str, status: int) -> None:
        """A request was answered; `route` is that of a handler, never what a client wrote."""
        self._requests.add(1, route, str(status))

    def count_rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of REJECT_REASONS."""
        self._rejected.add(1, reason)

    def count_prompt_tokens(self, num_tokens: int) -> None:
        """A request with a prompt of so many tokens was accepted."""
        self._prompt_tokens.add(num_tokens)

    def count_generated_tokens(self, num_tokens: int) -> None:
        """So many tokens were delivered to a request."""
        self._generated_tokens.add(num_tokens)

    def on_step(self, stats: StepStats) -> None:
        """After each step."""
        self._step_s.observe(stats.seconds, stats.kind)
        self._batch_sequences.observe(stats.num_sequences)
        self._batch_tokens.observe(stats.num_tokens)
        self._engine_tokens.add(stats.num_tokens)
        self._hit_tokens.add(stats.num_hit_tokens)
        self._preemptions.add(stats.num_preempted)
        self._inter_token_s.observe_all(stats.inter_token_s)
        self._first_token_s.observe_all(stats.first_token_s)
        self._queue_s.observe_all(stats.queue_s)

    def on_step_error(self) -> None:
        """A step raised."""
        self._step_errors.add(1)

    def on_nonfinite(self) -> None:
        """A sequence had NaN or infinite logits."""
        self._nonfinite.add(1)

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        """With each terminal event."""
        self._finished.add(1, reason)
        self._request_s.observe(timings.total_s)

    def text(self) -> str:
        """All series in Prometheus' text format."""
        return self._written(self._own) + self._written(self._gauges()) + self._load_text

    def _written(self, families: Iterable[Family]) -> str:
        common = label_text(self._labels)
        return "".join(line for family in families for line in family.lines(common))

    def _gauges(self) -> Iterator[Family]:
        """What is read at each scrape."""
        yield _gauge("ready", "1 while the service takes requests.", float(self._is_ready()))
        resident, anonymous = self._memory.read()
        memory_bytes = {"rss": resident, "anon": anonymous}
        if self._figures is not None:
            state = self._figures.engine_state()
            memory_bytes |= {"kv_cache": state.kv_cache_bytes, **self._figures.device_memory()}
            yield from _engine_gauges(state)
            yield from _fidelity_gauges(self._figures.fidelity())
            seconds = self._figures.report.phase_seconds  # the cache is written after the start
            yield _gauges("load_phase_seconds", "Seconds of the load by phase.", "phase", seconds)
        yield _gauges("memory_bytes", "Memory of this process and its device, now.", "kind", memory_bytes)

    def _is_ready(self) -> bool:
        has_failed = self._figures is not None and self._figures.engine_state().has_failed
        return self._progress.phase is Phase.READY and not has_failed

    def _counter(self, name: str, text: str, *label_names: str) -> Counter:
        return self._added(Counter(f"{PREFIX}_{name}_total", text, *label_names))

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *label_names: str) -> Histogram:
        return self._added(Histogram(f"{PREFIX}_{name}", text, bounds, *label_names))

    def _added(self, family: _Family) -> _Family:
        self._own.append(family)
        return family


def _engine_gauges(state: EngineState) -> Iterator[Gauge]:
    cached, free = state.num_cached_kv_blocks, state.num_free_kv_blocks
    used = state.num_kv_blocks - cached - free
    yield _gauge("requests_running", "Sequences that the engine computes.", state.num_running)
    yield _gauge("requests_waiting", "Sequences in the queue.", state.num_waiting)
    yield _gauges("kv_blocks", "KV blocks.", "state", {"used": used, "cached": cached, "free": free})
    yield _gauge(
        "kv_utilization_ratio", "Share of the KV blocks that sequences hold.", used / max(1, state.num_kv_blocks)
    )
    if state.last_step_at is not None:
        yield _gauge("last_step_timestamp_seconds", "Unix time of the last finished step.", state.last_step_at)


def _fidelity_gauges(fidelity: Fidelity) -> Iterator[Gauge]:
    """Nothing before they are known."""
    if fidelity.kl_mean_nats is not None and fidelity.top1_ratio is not None:
        yield _gauge("fidelity_kl_nats", "Mean KL(original || served) of the next token.", fidelity.kl_mean_nats)
        yield _gauge("fidelity_top1_ratio", "Share of tokens for which both find one likeliest.", fidelity.top1_ratio)


def _load_gauges(report: LoadReport) -> Iterator[Gauge]:
    facts = {"revision": report.revision, "dtype": report.dtype, "kernel": report.kernel, "recipe": report.recipe}
    text = "What is served; always 1."
    yield Gauge(f"{PREFIX}_model_info", text, {(*facts.values(), __version__): 1}, *facts, "version")
    yield _gauges("weight_bytes", "Bytes of parameters and buffers as held.", "kind", asdict(report.weight_bytes))
    yield _gauge("weight_original_bytes", "What scheme none would hold.", report.original_bytes)
    yield _gauge("weight_saving_ratio", "1 - weight_bytes / weight_original_bytes.", report.saving_ratio)
    yield _gauge("weight_bits_per_parameter", "8 * weight_bytes / parameters.", report.bits_per_parameter)
    yield _gauges("load_peak_bytes", "Most memory in use at once until ready.", "where", report.peak_bytes)
    errors = [layer.relative_error for layer in report.layers if layer.scheme != "none"] or [0.0]
    yield _gauges(
        "quantization_error_ratio",
        "Relative error of quantized weights, over layers.",
        "stat",
        {"max": max(errors), "mean": fmean(errors)},
    )


def _gauge(name: str, text: str, value: float) -> Gauge:
    return Gauge(f"{PREFIX}_{name}", text, {(): value})


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Gauge:
    return Gauge(f"{PREFIX}_{name}", text, {(key,): value for key, value in values.items()}, label)
