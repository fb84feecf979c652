"""Prometheus series of the service: one source for each figure, the same names with and without quantization.

Counters and histograms are kept here; gauges are read when they are scraped, and exist as soon as what they
tell is known. `model`, `scheme` and `device` are on all series. They are added at the scrape, as the device is
known only when the model is loaded.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service import __version__
from service.engine.sequence import FinishReason, SequenceTimings
from service.engine.stats import EngineState, StepStats
from service.loading import memory
from service.loading.progress import LoadProgress, Phase
from service.loading.report import LoadReport

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
        device_memory: reads `device_allocated` and `device_reserved`; empty on a CPU.
    """

    report: LoadReport
    engine_state: Callable[[], EngineState]
    device_memory: Callable[[], Mapping[str, int]]


class TokenHistogram(Collector):
    """A histogram of what each token of a step gives; prometheus_client's takes 1.5 us for each, on a machine of 2026.

    The engine thread writes and the scraping thread reads: counts and sum may be one step apart.

    Args:
        buckets: their upper bounds, rising; the last one, infinity, is added.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, values: Sequence[float]) -> None:
        """Add values, none of them NaN."""
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterator[Metric]:
        """One family."""
        bounds = map(floatToGoString, self._bounds)
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """All series; also the engine's observer.

    Args:
        registry: this collector registers itself here.
        device: the label until the model is loaded.
    """

    def __init__(
        self, registry: CollectorRegistry, progress: LoadProgress, *, model: str, scheme: str, device: str
    ) -> None:
        self.registry = registry
        self._progress = progress
        self._labels = {"model": model, "scheme": scheme, "device": device}
        self._figures: ModelFigures | None = None
        self._own = CollectorRegistry(auto_describe=False)
        self.requests = self._counter("requests", "HTTP requests answered.", "route", "status")
        self._rejected = self._counter("requests_rejected", "Requests refused for want of capacity.", "reason")
        self._finished = self._counter("requests_finished", "Sequences that ended, by reason.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generated_tokens = self._counter("generated_tokens", "Generated tokens delivered to requests.")
        self._engine_tokens = self._counter("engine_tokens", "Tokens computed by the engine.")
        self._hit_tokens = self._counter("prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had.")
        self._preemptions = self._counter("preemptions", "Sequences sent back to the queue for want of KV blocks.")
        self._step_errors = self._counter("step_errors", "Engine steps that raised.")
        self._nonfinite = self._counter("nonfinite_logits", "Sequences that had NaN or infinite logits.")
        self._queue_s = self._histogram("request_queue_seconds", "Submit to first scheduled.", _FIRST_TOKEN_BUCKETS)
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "Submit to first token sampled.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token_s = TokenHistogram(
            f"{PREFIX}_inter_token_seconds", "From one token to the next.", _TOKEN_BUCKETS
        )
        self._own.register(self._inter_token_s)
        self._request_s = self._histogram("request_seconds", "Submit to end, whatever the reason.", _REQUEST_BUCKETS)
        self._step_s = self._histogram("step_seconds", "One engine step.", _TOKEN_BUCKETS, "kind")
        self._batch_sequences = self._histogram("batch_sequences", "Sequences of a step.", _SEQUENCE_BUCKETS)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens of a step.", _BATCH_TOKEN_BUCKETS)
        for reason in FinishReason:
            self._finished.labels(reason=reason)
        for name in REJECT_REASONS:
            self._rejected.labels(reason=name)
        registry.register(self)

    def model_loaded(self, figures: ModelFigures) -> None:
        """From now on the figures of the model are exported."""
        self._labels = self._labels | {"device": figures.report.device}
        self._figures = figures

    def count_rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one of REJECT_REASONS."""
        self._rejected.labels(reason=reason).inc()

    def on_step(self, stats: StepStats) -> None:
        """After each step."""
        self._step_s.labels(kind=stats.kind).observe(stats.seconds)
        self._batch_sequences.observe(stats.num_sequences)
        self._batch_tokens.observe(stats.num_tokens)
        self._engine_tokens.inc(stats.num_tokens)
        self._hit_tokens.inc(stats.num_hit_tokens)
        self._preemptions.inc(stats.num_preempted)
        self._inter_token_s.observe(stats.inter_token_s)
        for seconds in stats.first_token_s:
            self._first_token_s.observe(seconds)
        for seconds in stats.queue_s:
            self._queue_s.observe(seconds)

    def on_step_error(self) -> None:
        """A step raised."""
        self._step_errors.inc()

    def on_nonfinite(self) -> None:
        """A sequence had NaN or infinite logits."""
        self._nonfinite.inc()

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        """With each terminal event."""
        self._finished.labels(reason=reason).inc()
        self._request_s.observe(timings.total_s)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not collect in order to know the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All series with their common labels."""
        for metric in self._families():
            metric.samples = [sample._replace(labels=self._labels | sample.labels) for sample in metric.samples]
            yield metric

    def text(self) -> str:
        """All series in Prometheus' text format, the very bytes that `generate_latest` makes of them.

        It takes less than half of the time, in which a step may have to wait for the interpreter: names are valid by
        construction, and common labels are escaped once instead of for each sample.
        """
        common = list(map(_label, self._labels.items()))
        lines = []
        for metric in self._families():
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            lines += [f"# HELP {name} {metric.documentation}", f"# TYPE {name} {metric.type}"]
            for sample in metric.samples:
                labels = ",".join(sorted([*common, *map(_label, sample.labels.items())]))
                lines.append(f"{sample.name}{{{labels}}} {floatToGoString(sample.value)}")  # type: ignore[no-untyped-call]
        return "\n".join(lines) + "\n"

    def _families(self) -> Iterator[Metric]:
        """All series without their common labels."""
        for metric in (*self._own.collect(), *self._gauges()):
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            if metric.samples:
                yield metric

    def _gauges(self) -> Iterator[Metric]:
        yield _gauge("ready", "1 while the service takes requests.", float(self._is_ready()))
        memory_bytes = {"rss": memory.resident_bytes(), "anon": memory.anonymous_bytes()}
        if self._figures is not None:
            state = self._figures.engine_state()
            memory_bytes |= {"kv_cache": state.kv_cache_bytes, **self._figures.device_memory()}
            yield from _engine_gauges(state)
            yield from _load_gauges(self._figures.report)
        yield _family("memory_bytes", "Memory of this process and its device, now.", "kind", memory_bytes)

    def _is_ready(self) -> bool:
        has_failed = self._figures is not None and self._figures.engine_state().has_failed
        return self._progress.phase is Phase.READY and not has_failed

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self._own)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=PREFIX, registry=self._own, buckets=buckets)


def _engine_gauges(state: EngineState) -> Iterator[Metric]:
    cached, free = state.num_cached_kv_blocks, state.num_free_kv_blocks
    used = state.num_kv_blocks - cached - free
    yield _gauge("requests_running", "Sequences that the engine computes.", state.num_running)
    yield _gauge("requests_waiting", "Sequences in the queue.", state.num_waiting)
    yield _family("kv_blocks", "KV blocks.", "state", {"used": used, "cached": cached, "free": free})
    yield _gauge(
        "kv_utilization_ratio", "Share of the KV blocks that sequences hold.", used / max(1, state.num_kv_blocks)
    )
    if state.last_step_at is not None:
        yield _gauge("last_step_timestamp_seconds", "Unix time of the last finished step.", state.last_step_at)


def _load_gauges(report: LoadReport) -> Iterator[Metric]:
    facts = {"revision": report.revision, "dtype": report.dtype, "kernel": report.kernel, "recipe": report.recipe}
    info = GaugeMetricFamily(f"{PREFIX}_model_info", "What is served; always 1.", labels=(*facts, "version"))
    info.add_metric((*facts.values(), __version__), 1)
    yield info
    yield _family("weight_bytes", "Bytes of parameters and buffers as held.", "kind", asdict(report.weight_bytes))
    yield _gauge("weight_original_bytes", "What scheme none would hold.", report.original_bytes)
    yield _gauge("weight_saving_ratio", "1 - weight_bytes / weight_original_bytes.", report.saving_ratio)
    yield _gauge("weight_bits_per_parameter", "8 * weight_bytes / parameters.", report.bits_per_parameter)
    yield _family("load_peak_bytes", "Most memory in use at once until ready.", "where", report.peak_bytes)
    yield _family("load_phase_seconds", "Seconds of the load by phase.", "phase", report.phase_seconds)
    errors = [layer.relative_error for layer in report.layers if layer.scheme != "none"] or [0.0]
    yield _family(
        "quantization_error_ratio",
        "Relative error of quantized weights, over layers.",
        "stat",
        {"max": max(errors), "mean": fmean(errors)},
    )


def _label(item: tuple[str, str]) -> str:
    name, value = item
    return '{}="{}"'.format(name, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _family(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
