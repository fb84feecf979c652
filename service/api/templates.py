"""Chat templates: messages to the text that a model was trained on, rendered in a process that may be killed.

messages -> connection -> template_worker -> fork -> marked text -> TextCodec.encode_chat
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import InvalidRequest, PromptTooLong

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("template_worker.py")
_MAX_RENDERINGS = 4
_RENDERING_LIMIT_S = 2.0
_RENDERING_LIMIT_BYTES = 256 * 2**20
_ANSWER_LIMIT_S = 30.0
"""A worker that gives no sign for so long is replaced; a rendering ends itself long before, a start takes a second."""
_RECEIVE_BYTES = 2**16
_SECRET_PREFIXES = ("PENNYWEIGHT_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_MAX_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSource:
    """What a tokenizer knows of chats.

    Attributes:
        template: Jinja.
        special_tokens: variables of the template, such as `bos_token`.
        control_tokens: texts that are tokens only where the template itself writes them.
    """

    template: str
    special_tokens: Mapping[str, str]
    control_tokens: Sequence[str]


class ChatTemplate:
    """A model's chat template. Owned by the event loop; the worker starts with the first rendering.

    Args:
        max_characters: longer chats are refused.
    """

    def __init__(self, source: TemplateSource, *, max_characters: int) -> None:
        self._source = source
        self._max_characters = max_characters
        self._free = asyncio.Semaphore(_MAX_RENDERINGS)
        self._start_lock = asyncio.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a chat, in which control tokens of messages are marked; `TextCodec.encode_chat` reads it.

        Role `developer` becomes `system` where the template has no word for it.

        Raises:
            PromptTooLong: more characters than the context can hold.
            InvalidRequest: the template refuses the messages, or takes too much time or memory for them.
        """
        num_characters = sum(len(message["content"]) for message in messages)
        if num_characters > self._max_characters:
            raise self._too_long(str(num_characters))
        if "developer" not in self._source.template:
            messages = [{**m, "role": "system" if m["role"] == "developer" else m["role"]} for m in messages]
        async with self._free:
            answer = await self._ask(json.dumps(list(messages)).encode())
        if answer.startswith(b"+"):
            return answer[1:].decode()
        if answer:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {answer[1:].decode()}; change them",
                param="messages",
                code="template_error",
            )
        raise InvalidRequest(
            f"the model's chat template needs more than {_RENDERING_LIMIT_S:g} s or "
            f"{_RENDERING_LIMIT_BYTES // 2**20} MiB for these messages; change them, or send a prompt to "
            "/v1/completions",
            param="messages",
            code="template_limit",
        )

    def close(self) -> None:
        """End the worker; the next rendering starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None
        if self._control is not None:
            self._control.close()
            self._control = None

    async def _ask(self, request: bytes) -> bytes:
        """The worker's answer; nothing if there is none."""
        async with self._start_lock:
            if self._worker is None or self._worker.poll() is not None:
                await asyncio.to_thread(self._start)
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"."], [theirs.fileno()])
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    return await self._exchange(ours, request)
            except TimeoutError:
                logger.warning("the process that renders chat templates gave no answer; it is replaced")
                self.close()
            except OSError as error:
                logger.warning("the process that renders chat templates is gone: %s", error)
            return b""

    def _start(self) -> None:
        self.close()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # signals of a terminal are for the service
                env=_environment(),
            )
        limits = {"limit_s": _RENDERING_LIMIT_S, "limit_bytes": _RENDERING_LIMIT_BYTES}
        source = json.dumps(asdict(self._source) | limits).encode()
        self._control.sendall(len(source).to_bytes(8, "big") + source)

    async def _exchange(self, connection: socket.socket, request: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, request)
        connection.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while piece := await loop.sock_recv(connection, _RECEIVE_BYTES):
            answer += piece
            if len(answer) > 1 + _MAX_BYTES_PER_CHARACTER * self._max_characters:
                raise self._too_long(f"more than {self._max_characters}")
        return bytes(answer)

    def _too_long(self, num_characters: str) -> PromptTooLong:
        return PromptTooLong(
            f"the chat has {num_characters} characters; the context holds at most {self._max_characters}; shorten it",
            param="messages",
            code="context_length_exceeded",
        )


def _environment() -> dict[str, str]:
    """Environment of the worker: secrets are not for templates."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIXES)}
    return kept | {"OPENBLAS_NUM_THREADS": "1"}  # a process that forks has one thread
