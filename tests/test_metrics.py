"""Series, their names, labels and values, read back through Prometheus' own parser."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import __version__
from service.engine.sequence import FinishReason, SequenceTimings
from service.engine.stats import EngineState, StepStats
from service.loading.fidelity_report import OFF, RUNNING, UNQUANTIZED, Fidelity
from service.loading.progress import LoadProgress, Phase
from service.loading.report import HonestyReport, LayerReport, LoadReport, WeightBytes
from service.metrics import Metrics, ModelFigures

LAYER = LayerReport(
    name="a",
    shape=(10, 10),
    scheme="w8a16",
    reason="",
    bytes=140,
    bits_per_weight=11.2,
    relative_error=0.01,
    sqnr_db=40.0,
)
REPORT = LoadReport(
    recipe="w8a16,b=none",
    scheme="mixed-01234567",
    dtype="bfloat16",
    device="cpu",
    kernel="torch",
    weight_hash="0" * 64,
    revision="local",
    weight_bytes=WeightBytes(codes=100, scales=40, unquantized=60),
    original_bytes=400,
    num_parameters=200,
    phase_seconds={"read": 1.0, "quantize": 2.0},
    total_seconds=3.0,
    peak_bytes={"host": 1000},
    resident_before_bytes=500,
    honesty=HonestyReport(num_tensors=9, num_assigned=3, num_quantized=2, planned_bytes=200),
    layers=(LAYER, replace(LAYER, relative_error=0.03), replace(LAYER, scheme="none", relative_error=0.0)),
)
STATE = EngineState(
    num_running=2,
    num_waiting=3,
    num_kv_blocks=8,
    num_free_kv_blocks=5,
    num_cached_kv_blocks=1,
    block_size=16,
    kv_cache_bytes=4096,
    last_step_at=1700000000.0,
)
STEP = StepStats(
    kind="mixed",
    seconds=0.02,
    num_sequences=3,
    num_tokens=40,
    num_prompt_tokens=38,
    inter_token_s=(0.003, 0.004),
    first_token_s=(0.5,),
    queue_s=(0.1,),
    num_hit_tokens=32,
    num_preempted=1,
)
TIMINGS = SequenceTimings(queue_s=0.1, first_token_s=0.5, total_s=0.7)


@pytest.fixture
def progress() -> LoadProgress:
    return LoadProgress()


@pytest.fixture
def metrics(progress: LoadProgress) -> Metrics:
    return Metrics(progress, model="m", scheme="mixed-01234567", device="unknown")


def _load(
    metrics: Metrics,
    state: EngineState = STATE,
    device_memory: dict[str, int] | None = None,
    fidelity: Fidelity = OFF,
) -> None:
    metrics.model_loaded(
        ModelFigures(
            report=REPORT,
            engine_state=lambda: state,
            fidelity=lambda: fidelity,
            device_memory=lambda: device_memory or {},
        )
    )


def _samples(metrics: Metrics) -> dict[str, float]:
    """Value by name and own labels; the common ones are checked and left out."""
    found = {}
    for family in text_string_to_metric_families(metrics.text()):
        for sample in family.samples:
            own = dict(sample.labels)
            assert (own.pop("model"), own.pop("scheme")) == ("m", "mixed-01234567")
            own.pop("device")
            labels = ",".join(f"{name}={value}" for name, value in sorted(own.items()))
            assert sample.name.startswith("pennyweight_")
            found[sample.name.removeprefix("pennyweight_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_before_the_load_nothing_of_the_model_is_exported(metrics: Metrics) -> None:
    names = {name.partition("{")[0] for name in _samples(metrics)}
    assert "ready" in names
    assert not names & {"model_info", "weight_bytes", "load_peak_bytes", "kv_blocks", "requests_running"}
    assert not names & {"last_step_timestamp_seconds", "quantization_error_ratio", "step_seconds_count"}


def test_the_figures_of_the_model_are_those_of_its_report(metrics: Metrics) -> None:
    _load(metrics)
    samples = _samples(metrics)
    info = f"model_info{{dtype=bfloat16,kernel=torch,recipe=w8a16,b=none,revision=local,version={__version__}}}"
    expected = {
        info: 1,
        "weight_bytes{kind=codes}": 100,
        "weight_bytes{kind=scales}": 40,
        "weight_bytes{kind=unquantized}": 60,
        "weight_original_bytes": 400,
        "weight_saving_ratio": 0.5,
        "weight_bits_per_parameter": 8,
        "load_peak_bytes{where=host}": 1000,
        "load_phase_seconds{phase=read}": 1,
        "load_phase_seconds{phase=quantize}": 2,
        "quantization_error_ratio{stat=max}": 0.03,
        "quantization_error_ratio{stat=mean}": 0.02,
    }
    assert {name: samples[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("fidelity", [OFF, RUNNING], ids=["off", "running"])
def test_before_it_is_known_no_fidelity_is_exported(metrics: Metrics, fidelity: Fidelity) -> None:
    _load(metrics, fidelity=fidelity)
    assert not [name for name in _samples(metrics) if "fidelity" in name]


def test_a_fidelity_that_is_known_is_exported(metrics: Metrics) -> None:
    _load(metrics, fidelity=Fidelity(state="done", kl_mean_nats=0.25, top1_ratio=0.75))
    samples = _samples(metrics)
    assert (samples["fidelity_kl_nats"], samples["fidelity_top1_ratio"]) == (0.25, 0.75)


def test_an_unquantized_model_has_lost_nothing(metrics: Metrics) -> None:
    _load(metrics, fidelity=UNQUANTIZED)
    samples = _samples(metrics)
    assert (samples["fidelity_kl_nats"], samples["fidelity_top1_ratio"]) == (0, 1)


def test_an_unquantized_model_has_error_zero(metrics: Metrics) -> None:
    layers = (replace(LAYER, scheme="none", relative_error=0.0),)
    report = replace(REPORT, layers=layers, weight_bytes=WeightBytes(codes=0, scales=0, unquantized=400))
    metrics.model_loaded(
        ModelFigures(report=report, engine_state=lambda: STATE, fidelity=lambda: OFF, device_memory=dict)
    )
    samples = _samples(metrics)
    assert samples["quantization_error_ratio{stat=max}"] == samples["quantization_error_ratio{stat=mean}"] == 0
    assert samples["weight_saving_ratio"] == samples["weight_bytes{kind=codes}"] == 0


def test_the_gauges_of_the_engine_are_read_at_the_scrape(metrics: Metrics) -> None:
    _load(metrics)
    samples = _samples(metrics)
    assert (samples["requests_running"], samples["requests_waiting"]) == (2, 3)
    assert [samples[f"kv_blocks{{state={name}}}"] for name in ("used", "cached", "free")] == [2, 1, 5]
    assert samples["kv_utilization_ratio"] == 0.25
    assert samples["memory_bytes{kind=kv_cache}"] == 4096
    assert samples["last_step_timestamp_seconds"] == 1700000000


def test_there_is_no_last_step_before_the_first(metrics: Metrics) -> None:
    _load(metrics, replace(STATE, last_step_at=None))
    assert "last_step_timestamp_seconds" not in _samples(metrics)


def test_device_memory_exists_on_a_device_only(metrics: Metrics) -> None:
    _load(metrics)
    assert not any("device_" in name for name in _samples(metrics))
    _load(metrics, device_memory={"device_allocated": 5, "device_reserved": 6})
    assert _samples(metrics)["memory_bytes{kind=device_reserved}"] == 6


def test_resident_memory_agrees_with_psutil(metrics: Metrics) -> None:
    samples = _samples(metrics)
    # Two readings a moment apart in a quiet process: pages of the reading itself, well under 16 MiB.
    assert abs(samples["memory_bytes{kind=rss}"] - psutil.Process().memory_info().rss) < 16 * 2**20
    assert 0 < samples["memory_bytes{kind=anon}"] <= samples["memory_bytes{kind=rss}"]


def test_ready_follows_the_phase(metrics: Metrics, progress: LoadProgress) -> None:
    assert _samples(metrics)["ready"] == 0
    progress.enter(Phase.READY)
    assert _samples(metrics)["ready"] == 1
    progress.enter(Phase.DRAINING)
    assert _samples(metrics)["ready"] == 0


def test_a_step_is_counted_once_in_each_series(metrics: Metrics) -> None:
    metrics.on_step(STEP)
    samples = _samples(metrics)
    assert samples["engine_tokens_total"] == samples["batch_tokens_sum"] == 40
    assert samples["batch_sequences_sum"] == 3
    assert samples["prefix_cache_hit_tokens_total"] == 32
    assert samples["preemptions_total"] == 1
    assert samples["step_seconds_sum{kind=mixed}"] == 0.02
    assert samples["inter_token_seconds_count"] == 2
    assert samples["time_to_first_token_seconds_sum"] == 0.5
    assert samples["request_queue_seconds_sum"] == 0.1


def test_buckets_tell_tokens_below_10_ms_apart(metrics: Metrics) -> None:
    metrics.on_step(replace(STEP, inter_token_s=(0.0009, 0.002, 0.004, 0.009)))
    samples = _samples(metrics)
    assert [samples[f"inter_token_seconds_bucket{{le={le}}}"] for le in (0.001, 0.0025, 0.005, 0.01)] == [1, 2, 3, 4]


def test_ends_are_counted_by_reason_and_all_reasons_are_there(metrics: Metrics) -> None:
    metrics.on_finished(FinishReason.STOP, TIMINGS)
    samples = _samples(metrics)
    assert [samples[f"requests_finished_total{{reason={reason}}}"] for reason in FinishReason] == [1, 0, 0, 0, 0, 0, 0]
    assert samples["request_seconds_sum"] == 0.7


def test_failures_are_counted(metrics: Metrics) -> None:
    metrics.on_step_error()
    metrics.on_nonfinite()
    metrics.count_rejected("queue_full")
    samples = _samples(metrics)
    assert samples["step_errors_total"] == samples["nonfinite_logits_total"] == 1
    assert samples["requests_rejected_total{reason=queue_full}"] == 1


def test_the_device_becomes_known_for_all_series_at_once(metrics: Metrics) -> None:
    def devices() -> set[str]:
        families = text_string_to_metric_families(metrics.text())
        return {sample.labels["device"] for family in families for sample in family.samples}

    metrics.count_rejected("loading")
    assert devices() == {"unknown"}
    _load(metrics)
    assert devices() == {"cpu"}


def test_a_scrape_that_hangs_keeps_no_step_waiting(metrics: Metrics) -> None:
    is_reading, may_go_on = Event(), Event()

    def read_device() -> dict[str, int]:
        is_reading.set()
        may_go_on.wait()
        return {}

    figures = ModelFigures(report=REPORT, engine_state=lambda: STATE, fidelity=lambda: OFF, device_memory=read_device)
    metrics.model_loaded(figures)
    with ThreadPoolExecutor(1) as scraper:
        scrape = scraper.submit(metrics.text)
        assert is_reading.wait(60)
        metrics.on_step(STEP)
        metrics.on_finished(FinishReason.STOP, TIMINGS)
        assert not scrape.done()
        may_go_on.set()
        assert "memory_bytes" in scrape.result(60)
    assert _samples(metrics)["step_seconds_count{kind=mixed}"] == 1
