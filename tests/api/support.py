"""The whole service on a thread of the test process, with a real port and a real tiny model."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from service.access import read_access
from service.api.listener import open_port
from service.app import Service
from service.loading.progress import Phase
from service.settings import Settings
from tests.models import END_OF_TEXT, VOCAB_SIZE, build_tokenizer, write_checkpoint

TIMEOUT_S = 60.0
TURN, END_OF_TURN, THINK = "<|turn|>", "<|end|>", "<think>"
"""Tokens of the chat model; the last is added and not special."""
CHAT_VOCAB_SIZE = VOCAB_SIZE + 4
LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['content'] == 'raise' %}{{ raise_exception('the roles\n must \x1b[1malternate') }}{% endif %}"
    f"{{% if m['content'] == 'loop' %}}{LOOP}{{% endif %}}"
    "{% if m['content'] == 'grow' %}{{ m['content'] * 10 ** 9 }}{% endif %}"
    "{% if m['content'] == 'stretch' %}{{ m['content'] * 10 ** 6 }}{% endif %}"
    "{% if m['content'] == 'wrong' %}{{ m['content'] + 5 }}{% endif %}"
    f"{{{{ '{TURN}' + m['role'] + '\n' + m['content'] + '{END_OF_TURN}\n' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN}assistant\n' }}}}{{% endif %}}"
)
"""Turns with their roles; some contents make it misbehave."""
CANARY = {"prompt": "The sea", "max_tokens": 4, "temperature": 0}


class RunningService:
    """A service on a thread of this process.

    Attributes:
        service: its own objects, for what HTTP does not show.
        client: sends to it.
    """

    def __init__(self, service: Service, port: int, thread: threading.Thread) -> None:
        self.service = service
        self._thread = thread
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    def wait_for_end(self) -> int:
        """Wait until the service has ended; its exit code."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.service.exit_code

    def connect(self, fields: Mapping[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
        """`POST /v1/completions` by hand; nothing is read of the answer."""
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(TIMEOUT_S)
        client.connect(("127.0.0.1", self.port))
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return client

    def complete(self, **fields: Any) -> httpx.Response:
        """`POST /v1/completions`."""
        return self.client.post("/v1/completions", json=fields)

    def canary(self) -> str:
        """The text of a request that is always the same."""
        response = self.complete(**CANARY)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a series that have these labels."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == f"pennyweight_{name}"]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition that another thread brings about comes true in time."""
    deadline = time.monotonic() + TIMEOUT_S
    tick = threading.Event()
    while not (holds := condition()) and time.monotonic() < deadline:
        tick.wait(0.01)
    return holds


def sse_events(text: str) -> list[Any]:
    """Payloads of server-sent events; `[DONE]` must be the last."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def assert_error(response: httpx.Response, status: int, *, param: str | None, code: str | None, message: str) -> None:
    """Check status and envelope of an error; `message` is a regular expression to be found."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert re.search(message, error["message"]), error["message"]


@contextmanager
def start_service(
    settings: Mapping[str, Any], *, port: int = 0, send_buffer: int | None = None
) -> Iterator[RunningService]:
    """Start a service in this process; drain it at the end, if it has not ended by itself.

    A client that does not read is felt after `send_buffer` bytes and those that it takes itself.
    """
    listener = open_port("127.0.0.1", port)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    made: Future[Service] = Future()

    async def serve() -> None:
        checked = Settings.model_validate({"fidelity": "off", "cache_limit": 0} | dict(settings))
        service = Service(checked, asyncio.get_running_loop(), access=read_access(checked, {}))
        made.set_result(service)
        await service.serve(listener)

    thread = threading.Thread(target=uvloop.run, args=(serve(),))
    thread.start()
    running = RunningService(made.result(TIMEOUT_S), listener.getsockname()[1], thread)
    try:
        yield running
    finally:
        running.client.close()
        if thread.is_alive() and running.service.state.phase is not Phase.DRAINING:
            running.service.on_signal()
        running.wait_for_end()


@contextmanager
def run_service(
    settings: Mapping[str, Any], *, port: int = 0, send_buffer: int | None = None
) -> Iterator[RunningService]:
    """Start a service in this process and wait until it is ready."""
    with start_service(settings, port=port, send_buffer=send_buffer) as running:
        assert eventually(lambda: running.service.state.phase in (Phase.READY, Phase.FAILED))
        assert running.service.state.phase is Phase.READY
        yield running


def write_faulty_checkpoint(folder: Path) -> Path:
    """A float32 Llama of random weights that raises, computes NaN or blocks when it meets given tokens."""
    write_checkpoint("faulty", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]  # its class is no ...ForCausalLM by name
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def build_chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """The tokenizer of `tests.models` with control tokens, which begins each text with `END_OF_TEXT`."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [TURN, END_OF_TURN]})
    tokenizer.add_tokens([THINK])
    bos = (END_OF_TEXT, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


def write_chat_checkpoint(folder: Path, *, template: str | None = CHAT_TEMPLATE, **generation: Any) -> Path:
    """A tiny Llama with control tokens and a chat template; `generation` goes into its generation config."""
    write_checkpoint("llama", folder, vocab_size=CHAT_VOCAB_SIZE)
    (folder / "chat_template.jinja").unlink()
    build_chat_tokenizer(template).save_pretrained(folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | generation
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder
