"""Starts that fail and ends that come early, in this process."""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from service.kernels import dispatch
from service.loading.progress import Phase
from service.loading.shards import SINGLE_NAME
from tests.api.support import RunningService, assert_error, eventually, run_service, sse_events, start_service
from tests.hub import serve_hub, use
from tests.models import build_tokenizer, write_checkpoint

TINY: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 2**22}


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path]) -> dict[str, Any]:
    """Settings of a tiny Llama."""
    return TINY | {"model": str(checkpoint("llama"))}


@pytest.mark.parametrize(
    ("changes", "exit_code", "message"),
    [
        ({"quantize": "w8a16,nothing.*=none"}, 2, r"nothing\.\*"),
        ({"max_model_len": 257}, 2, "--max-model-len 257: llama was made for 256 tokens; use at most that"),
        ({"kv_memory": 1}, 2, "KV"),
        ({"model": "/nowhere/model"}, 1, "/nowhere/model: no such directory"),
        ({"revision": "main"}, 2, "--revision main: .* is a local directory"),
        ({"kv_memory": "900TiB"}, 3, "needs [0-9]+ bytes"),
        ({"max_model_len": 256, "kv_memory": "64KiB"}, 2, "--max-model-len 256: the KV memory holds"),
    ],
    ids=["pattern", "context", "KV memory", "path", "revision", "more than is free", "too little for the context"],
)
def test_a_load_that_fails_ends_the_service_with_its_code_and_message(
    tiny: dict[str, Any],
    changes: dict[str, Any],
    exit_code: int,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "service.app"), start_service(tiny | changes) as running:
        assert running.wait_for_end() == exit_code
    assert caplog.messages[-1].startswith("the model cannot be served: ")
    assert re.search(message, caplog.messages[-1])


def spoil(folder: Path, name: str, value: float) -> Path:
    """Fill a weight of a checkpoint."""
    tensors = load_file(folder / SINGLE_NAME)
    tensors[name].fill_(value)
    save_file(tensors, folder / SINGLE_NAME)
    return folder


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan, "NaN or infinite values in model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.down_proj.weight", 3e38, "NaN or infinity in .*, first out of model.layers.1.mlp.down_pr"),
        ("model.layers.2.input_layernorm.weight", 3e38, "NaN or infinity in .*, first out of model.layers.2.*, whose"),
    ],
    ids=["NaN in the file", "overflow in a linear", "overflow behind a norm"],
)
def test_a_model_that_computes_no_numbers_is_not_served_and_the_layer_is_named(
    name: str, value: float, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = spoil(write_checkpoint("llama", tmp_path / "m"), name, value)
    settings = TINY | {"model": str(folder), "quantize": "none"}
    with caplog.at_level(logging.ERROR, "service.app"), start_service(settings) as running:
        assert running.wait_for_end() == 1
    assert re.search(message, caplog.messages[-1])


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (
            200,
            r"its tokenizer has token ids up to 299, the model takes 0\.\.199; the tokenizer belongs to another model",
        ),
        (512, None),
    ],
    ids=["fewer tokens than the tokenizer", "more tokens than the tokenizer"],
)
def test_a_tokenizer_of_another_model_is_refused_only_if_the_model_lacks_its_tokens(
    vocab_size: int, message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TINY | {"model": str(write_checkpoint("llama", tmp_path / "m", vocab_size=vocab_size))}
    if message is None:
        with run_service(settings) as running:
            assert running.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        return
    with caplog.at_level(logging.ERROR, "service.app"), start_service(settings) as ended:
        assert ended.wait_for_end() == 1
    assert re.search(message, caplog.messages[-1])


def test_a_token_that_was_added_beyond_the_model_s_is_refused_in_prompts_only(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with run_service(TINY | {"model": str(folder)}) as running:
        answers = [
            running.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
            for prompt in ("a", "a<image>")
        ]
    assert answers[0].status_code == 200
    message = r"token id 300 is outside the vocabulary, 0\.\.299"
    assert_error(answers[1], 400, param="prompt", code="invalid_value", message=message)


def test_a_model_that_is_served_says_what_was_checked(tiny: dict[str, Any]) -> None:
    with run_service(tiny) as running:
        honesty = running.client.get("/v1/quantization").json()["honesty"]
    assert honesty["num_quantized"] == honesty["num_assigned"] == 3 * 7 + 1
    assert honesty["num_tensors"] > 0
    assert honesty["num_probed_tokens"] > 0
    assert honesty["planned_bytes"] > 0


@pytest.mark.skipif(not dispatch.obstacle("amx"), reason="this machine runs every kind of kernels")
def test_kernels_that_the_machine_lacks_end_the_service_with_2(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with start_service(tiny | {"kernel_isa": "amx"}) as running:
        assert running.wait_for_end() == 2
    assert re.search("--kernel-isa amx: .*; use auto", caplog.messages[-1])


@pytest.mark.parametrize(
    ("model", "cache", "is_offline", "exit_code", "message"),
    [
        ("org/gated", "cache", False, 1, "org/gated is gated: .* set HF_TOKEN"),
        ("org/other", "cache", False, 1, "org/other: no such hub repository"),
        ("org/gated", "cache", True, 1, "org/gated is not in the local cache .* unset HF_HUB_OFFLINE"),
        ("org/gated", "file/cache", False, 2, "file/cache: the cache directory cannot be written"),
    ],
    ids=["gated", "missing", "offline", "cache"],
)
def test_a_hub_model_that_cannot_be_had_ends_the_service(
    model: str,
    cache: str,
    is_offline: bool,
    exit_code: int,
    message: str,
    *,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    with serve_hub("org/gated", Path(tiny["model"]), gated=not cache.startswith("file")) as hub:
        use(hub, monkeypatch)
        settings = tiny | {"model": model, "cache_dir": str(tmp_path / cache)}
        with caplog.at_level(logging.ERROR, "service.app"), start_service(settings) as running:
            assert running.wait_for_end() == exit_code
    assert re.search(message, caplog.messages[-1])


def test_a_model_without_a_tokenizer_is_refused(
    tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny["model"]) / name).read_bytes())
    with start_service(tiny | {"model": str(tmp_path)}) as running:
        assert running.wait_for_end() == 1
    assert "its tokenizer does not load" in caplog.messages[-1]


def test_a_failed_load_is_told_as_long_as_asked(tiny: dict[str, Any]) -> None:
    with start_service(tiny | {"model": "/nowhere", "failed_linger": 600}) as running:
        assert eventually(lambda: running.service.state.phase is Phase.FAILED)
        answer = running.client.get("/readyz")
        assert (answer.status_code, answer.json()["phase"]) == (503, "failed")
        assert running.client.get("/livez").status_code == 200
        refused = running.complete(prompt="a")
        assert_error(
            refused,
            503,
            param=None,
            code="failed",
            message="the service has failed; its log has the reason; restart it",
        )
    assert running.service.exit_code == 1


def test_the_receive_timeout_is_that_of_the_settings_also_when_nothing_is_served(tiny: dict[str, Any]) -> None:
    settings = tiny | {"model": "/nowhere", "failed_linger": 600, "receive_timeout": 0.1}
    with start_service(settings) as running, socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        client.settimeout(60)
        assert client.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_what_does_not_finish_in_time_ends_with_an_error_event_and_done(tiny: dict[str, Any]) -> None:
    with run_service(tiny | {"drain_timeout": 0}) as running:
        fields = {"prompt": ["The sea"] * 8, "max_tokens": 240, "temperature": 0, "stream": True}
        with running.client.stream("POST", "/v1/completions", json=fields) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            running.service.on_signal()
            *_, last = sse_events("\n".join([first, *lines]))
        assert last["error"]["code"] == "shutdown"
        assert running.wait_for_end() == 0


def test_an_end_does_not_wait_for_what_is_tokenized_for_others(tiny: dict[str, Any]) -> None:
    opened = threading.Event()
    with run_service(tiny) as running:
        loop = running.service.state.router._loop
        for _ in range(100):  # more than it has
            loop.call_soon_threadsafe(lambda: loop.run_in_executor(None, opened.wait))
        running.service.on_signal()
        try:
            assert eventually(lambda: _is_closed(running.port))
        finally:
            opened.set()
        assert running.wait_for_end() == 0


def _is_closed(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return True
    return False


def test_the_name_for_clients_can_be_chosen(tiny: dict[str, Any]) -> None:
    with run_service(tiny | {"served_model_name": "org/other"}) as running:
        assert running.client.get("/v1/models/org/other").json()["id"] == "org/other"
        assert running.complete(model="org/other", prompt="a", max_tokens=1).json()["model"] == "org/other"
        assert running.complete(model="llama", prompt="a", max_tokens=1).status_code == 404


def test_the_context_is_what_the_kv_memory_holds_if_that_is_less(tiny: dict[str, Any]) -> None:
    # 3 layers of 2 heads of 16 values, keys and values, float32: 768 bytes for a token.
    with run_service(tiny | {"kv_memory": 768 * 64}) as running:
        assert running.client.get("/v1/models").json()["data"][0]["max_model_len"] == 64
        _assert_fits(running, 60, 4)
        refused = running.complete(prompt=[5] * 60, max_tokens=5)
        assert_error(refused, 400, param="max_tokens", code="context_length_exceeded", message="context is 64 tokens")


def test_int8_holds_more_tokens_in_the_same_memory_and_metrics_tell_the_bytes(tiny: dict[str, Any]) -> None:
    # 3 layers of 2 heads of 16 codes and a scale of 2 bytes, keys and values: 216 bytes for a token.
    with run_service(tiny | {"kv_cache": "int8", "kv_memory": 216 * 64 + 215}) as running:
        assert running.client.get("/v1/models").json()["data"][0]["max_model_len"] == 64
        assert running.metric("memory_bytes", kind="kv_cache") == 216 * 64
        _assert_fits(running, 60, 4)


def _assert_fits(running: RunningService, num_prompt_tokens: int, max_tokens: int) -> None:
    response = running.complete(prompt=[5] * num_prompt_tokens, max_tokens=max_tokens)
    assert response.status_code == 200, response.text
