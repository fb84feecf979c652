"""What a service tells about the comparison with its original, and a limit that keeps it from serving."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from service.api.probe_text import PROBE_TEXTS
from service.api.text import encode_probe
from service.loading.fidelity_report import NUM_TOKENS
from service.loading.progress import Phase
from tests.api.support import RunningService, eventually, run_service, start_service
from tests.models import VOCAB_SIZE, build_tokenizer, write_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("fidelity") / "m")
    return {"model": str(folder), "device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 2**22}


def fidelity(running: RunningService) -> dict[str, Any]:
    found: dict[str, Any] = running.client.get("/v1/quantization").json()["fidelity"]
    return found


def exported(running: RunningService) -> bool:
    return "pennyweight_fidelity_kl_nats" in running.client.get("/metrics").text


def test_it_is_compared_beside_requests_and_told_in_report_and_metrics(tiny: Mapping[str, Any]) -> None:
    with run_service({**tiny, "fidelity": "background"}) as running:
        running.canary()
        assert eventually(lambda: fidelity(running)["state"] != "running")
        found = fidelity(running)
        assert (found["state"], found["num_tokens"]) == ("done", NUM_TOKENS)
        assert running.metric("fidelity_kl_nats") == pytest.approx(found["kl_mean_nats"], rel=1e-6)
        assert running.metric("fidelity_top1_ratio") == found["top1_ratio"]
        assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{i}" for i in range(3)]


def test_before_ready_it_is_known_with_the_first_answer_and_part_of_the_load(tiny: Mapping[str, Any]) -> None:
    with run_service({**tiny, "fidelity": "before-ready"}) as running:
        found = fidelity(running)
        assert found["state"] == "done"
        assert running.client.get("/v1/quantization").json()["phase_seconds"]["probe"] >= found["seconds"] > 0


def test_off_it_is_neither_made_nor_exported(tiny: Mapping[str, Any]) -> None:
    with run_service({**tiny, "fidelity": "off"}) as running:
        assert fidelity(running)["state"] == "off"
        assert not exported(running)


@pytest.mark.parametrize("mode", ["off", "background", "before-ready"])
def test_an_unquantized_service_has_lost_nothing(tiny: Mapping[str, Any], mode: str) -> None:
    with run_service({**tiny, "fidelity": mode, "quantize": "none"}) as running:
        found = fidelity(running)
        assert (found["state"], found["kl_mean_nats"], found["top1_ratio"], found["layers"]) == ("done", 0, 1, [])
        assert exported(running)


def test_a_limit_that_is_kept_lets_it_serve(tiny: Mapping[str, Any]) -> None:
    with run_service({**tiny, "fidelity": "background", "max_kl": 1.0}) as running:
        assert 0 < fidelity(running)["kl_mean_nats"] < 1


def test_a_limit_that_is_passed_keeps_it_from_serving(
    tiny: Mapping[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**tiny, "fidelity": "background", "max_kl": 1e-6, "failed_linger": 600}
    with caplog.at_level(logging.ERROR, "service.app"), start_service(settings) as running:
        assert eventually(lambda: running.service.state.phase is Phase.FAILED)
        answer = running.client.get("/readyz")
        assert (answer.status_code, answer.json()["phase"]) == (503, "failed")
        assert running.complete(prompt="a").status_code == 503
        running.service.on_signal()
        assert running.wait_for_end() == 1
    assert "w8a16 moves the next token's distribution by" in caplog.text
    assert "--max-kl allows 1e-06; use a recipe with more bits, or raise the limit" in caplog.text


def test_a_service_that_ends_does_not_wait_for_it(tiny: Mapping[str, Any]) -> None:
    with run_service({**tiny, "fidelity": "background"}) as running:
        running.service.on_signal()
        assert running.wait_for_end() == 0


def test_a_probe_has_as_many_tokens_of_each_text() -> None:
    tokenizer: Any = build_tokenizer()
    ids = encode_probe(tokenizer, PROBE_TEXTS, vocab_size=VOCAB_SIZE, length=NUM_TOKENS)
    assert len(ids) == NUM_TOKENS
    for number, text in enumerate(PROBE_TEXTS):
        part = tokenizer.decode(ids[number * 64 : number * 64 + 64])
        assert text.startswith(part.rstrip("\N{REPLACEMENT CHARACTER}")), part


def test_a_probe_has_no_token_that_the_model_has_not() -> None:
    tokenizer: Any = build_tokenizer()
    ids = encode_probe(tokenizer, PROBE_TEXTS, vocab_size=100, length=NUM_TOKENS)
    assert max(ids) < 100


def test_every_probe_text_is_long_enough_for_large_vocabularies() -> None:
    for text in PROBE_TEXTS:  # where no token is shorter than a word, of which each has at least a part of its own
        assert len(text.split()) >= NUM_TOKENS // len(PROBE_TEXTS), text
