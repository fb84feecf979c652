"""The command as a newcomer uses it: the demo model, from the first second to the signal that ends it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors import safe_open

from service.demo import model_folder
from tests.api.support import assert_error, eventually, sse_events
from tests.e2e.support import ready, started

pytestmark = pytest.mark.e2e

LONG = {"prompt": "The captain", "max_tokens": 900, "temperature": 0, "seed": 1, "stream": True}


def _metrics(client: httpx.Client) -> dict[str, float]:
    """Samples by name and the one label that is not on all of them."""
    figures = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            own = [value for name, value in sample.labels.items() if name not in ("model", "scheme", "device")]
            figures[" ".join([sample.name.removeprefix("pennyweight_"), *own])] = sample.value
    return figures


@pytest.fixture(scope="module")
def demo() -> Iterator[httpx.Client]:
    """A client of the demo model at the default recipe."""
    with ready() as (_, client):
        yield client


def test_before_the_model_is_loaded_the_port_answers_what_it_knows() -> None:
    with started() as server, server.client() as client:
        assert client.get("/livez").status_code == 200
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert set(answer.json()) == {"phase", "done_bytes", "total_bytes", "elapsed_s", "remaining_s", "error"}
        assert answer.json()["phase"] in ("resolve", "plan", "load")
        for route in ("/v1/completions", "/generate"):
            refused = client.post(route, json={"prompt": "a"})
            assert_error(refused, 503, param=None, code=refused.json()["error"]["code"], message="retry later")
            assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/v1/quantization").status_code == 503
        assert client.get("/v1/models").json()["data"][0]["id"] == "pennyweight-demo"
        figures = _metrics(client)
        assert figures["ready"] == 0
        assert figures["requests_rejected_total loading"] == 2
        assert not any(name.startswith(("weight_", "kv_", "model_info", "batch_bytes")) for name in figures)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_the_demo_model_writes_prose_through_the_official_client(demo: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{demo.base_url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["pennyweight-demo"]
        whole = client.completions.create(
            model="pennyweight-demo", prompt="The captain looked at the sea and", max_tokens=20, temperature=0
        )
        with client.completions.create(
            model="pennyweight-demo",
            prompt="The captain looked at the sea and",
            max_tokens=20,
            temperature=0,
            stream=True,
        ) as stream:
            streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == whole.choices[0].text
    assert len(streamed.split()) >= 10


def test_the_saving_in_the_metrics_is_a_hand_count_of_the_file(demo: httpx.Client) -> None:
    with safe_open(model_folder() / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    original = 2 * sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)
    # w8a16: a byte for each weight and a float32 scale for each row of a matrix; vectors stay as they are.
    codes = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    rows = sum(shape[0] for shape in shapes if len(shape) == 2)
    vectors = 2 * sum(shape[0] for shape in shapes if len(shape) == 1)
    figures = _metrics(demo)
    assert figures["weight_original_bytes"] == original
    assert figures["weight_bytes codes"] == codes
    assert figures["weight_bytes scales"] == 4 * rows
    assert figures["weight_bytes unquantized"] == vectors
    assert figures["weight_saving_ratio"] == pytest.approx(1 - (codes + 4 * rows + vectors) / original, rel=1e-12)


def test_a_prompt_that_comes_again_is_found_in_the_cache(demo: httpx.Client) -> None:
    before = _metrics(demo)["prefix_cache_hit_tokens_total"]
    fields = {"prompt": list(range(100, 140)), "max_tokens": 8, "temperature": 0}
    for _ in range(2):
        assert demo.post("/v1/completions", json=fields).status_code == 200
    figures = _metrics(demo)
    assert figures["prefix_cache_hit_tokens_total"] - before == 32
    assert figures["kv_blocks cached"] >= 2


def test_all_series_of_this_version_are_exported_with_the_common_labels(demo: httpx.Client) -> None:
    demo.post("/v1/completions", json={"prompt": "The", "max_tokens": 2})
    families = list(text_string_to_metric_families(demo.get("/metrics").text))
    names = {family.name.removeprefix("pennyweight_") for family in families}
    assert names == {
        *("model_info", "weight_bytes", "weight_original_bytes", "weight_saving_ratio", "weight_bits_per_parameter"),
        *("load_peak_bytes", "load_phase_seconds", "memory_bytes", "quantization_error_ratio"),
        *("requests", "requests_running", "requests_waiting", "requests_rejected", "requests_finished"),
        *("request_queue_seconds", "time_to_first_token_seconds", "inter_token_seconds", "request_seconds"),
        *("step_seconds", "prompt_tokens", "generated_tokens", "engine_tokens", "batch_sequences", "batch_tokens"),
        *("prefix_cache_hit_tokens", "preemptions"),
        *("kv_blocks", "kv_utilization_ratio", "step_errors", "nonfinite_logits", "last_step_timestamp_seconds"),
        "ready",
    }
    for family in families:
        assert family.documentation
        for sample in family.samples:
            assert (sample.labels["model"], sample.labels["scheme"], sample.labels["device"]) == (
                "pennyweight-demo",
                "w8a16",
                "cpu",
            )


def test_a_signal_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    with (
        ready("--drain-timeout", "100") as (server, client),
        client.stream("POST", "/v1/completions", json=LONG) as stream,
    ):
        lines = stream.iter_lines()
        text = next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        with httpx.Client(base_url=client.base_url) as other:
            refused = other.get("/readyz")
            assert (refused.status_code, refused.json()["phase"]) == (503, "draining")
            live = other.get("/livez")
            assert (live.status_code, live.headers["connection"]) == (200, "close")
            refused = other.post("/generate", json={"prompt": "a"})
            assert_error(refused, 503, param=None, code="draining", message="draining")
            assert int(refused.headers["retry-after"]) >= 1
        events = sse_events("\n".join([text, *lines]))
        assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert server.exit_code() == 0


def test_an_interrupt_is_such_a_signal_and_what_does_not_finish_in_time_is_told() -> None:
    with (
        ready("--drain-timeout", "0.5", "--max-num-seqs", "1") as (server, client),
        httpx.Client(base_url=client.base_url, timeout=client.timeout) as other,
        ThreadPoolExecutor() as pool,
    ):
        # One after the other takes far longer than the service has left.
        with client.stream("POST", "/v1/completions", json=LONG | {"n": 16, "ignore_eos": True}) as stream:
            lines = stream.iter_lines()
            text = next(lines)
            waiting = pool.submit(other.post, "/generate", json={"prompt": "a"})
            assert eventually(lambda: _metrics(client)["requests_waiting"] == 16)
            server.process.send_signal(signal.SIGINT)
            *_, last = sse_events("\n".join([text, *lines]))
        assert last["error"]["code"] == "shutdown"
        assert_error(waiting.result(), 503, param=None, code="shutdown", message="shuts down before this request")
        assert server.exit_code() == 0
    assert not any("Traceback" in line for line in server.log), server.log


def test_a_second_signal_ends_at_once() -> None:
    with ready() as (server, client), client.stream("POST", "/v1/completions", json=LONG) as stream:
        next(stream.iter_lines())
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 1
