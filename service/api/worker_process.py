"""A process of its own for work that may loop, grow or crash, each piece of it in a fork that may be killed.

request -> connection -> script -> `service.api.worker_loop` -> fork -> answer
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.errors import Unavailable

logger = logging.getLogger(__name__)

_PACKAGES = Path(__file__).parents[2]
_MAX_REQUESTS = 4
_ANSWER_LIMIT_S = 30.0
"""A worker that gives no sign for so long is replaced; a fork ends itself long before, a start takes a second."""
_RECEIVE_BYTES = 2**16
_SECRET_PREFIXES = ("PENNYWEIGHT_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class AnswerTooLong(Exception):
    """A worker sent more bytes than were allowed."""


class WorkerProcess:
    """A script that answers requests, at most four at once. Owned by the event loop; it starts with the first one.

    Args:
        script: a file beside this one, which calls `service.api.worker_loop.serve`.
        purpose: what it does, for the log.
        source: makes what the script needs to know, as JSON takes it; called at each start, on a thread.
    """

    def __init__(self, script: str, *, purpose: str, source: Callable[[], dict[str, Any]]) -> None:
        self._script = Path(__file__).with_name(script)
        self._purpose = purpose
        self._source = source
        self._free = asyncio.Semaphore(_MAX_REQUESTS)
        self._start_lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def ask(self, request: bytes, *, max_answer_bytes: int) -> bytes:
        """See `_ask`; who no longer waits for the answer leaves the fork its place until it has ended."""
        return await asyncio.shield(self._ask(request, max_answer_bytes))

    async def _ask(self, request: bytes, max_answer_bytes: int) -> bytes:
        """The answer; nothing if there is none, because a limit was reached or the fork crashed.

        A process that ends under the request, also because another request found it stuck, is replaced once.

        Raises:
            AnswerTooLong: it has more than `max_answer_bytes`.
            Unavailable: the process ended twice, or gave no sign.
        """
        async with self._free:
            asked: subprocess.Popen[bytes] | None = None
            for _ in range(2):
                async with self._start_lock:
                    # One that has ended under this request may not be seen to have ended yet.
                    if self._process is None or self._process is asked or self._process.poll() is not None:
                        await asyncio.to_thread(self._start)
                    asked = self._process
                answer = await self._ask_once(request, max_answer_bytes)
                if answer:
                    return answer[1:]
                logger.warning("the process that %s ended under a request", self._purpose)
        raise Unavailable(f"the process that {self._purpose} has ended; retry", code="worker_gone")

    async def _ask_once(self, request: bytes, max_answer_bytes: int) -> bytes:
        """A point and the answer; nothing if the process ended."""
        if self._control is None:  # another request has just found the process stuck
            return b""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"."], [theirs.fileno()])
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    return await _exchange(ours, request, max_answer_bytes)
            except TimeoutError:
                logger.warning("the process that %s gave no answer; it is replaced", self._purpose)
                self.close()
                raise Unavailable(
                    f"the process that {self._purpose} gave no answer; retry", code="worker_gone"
                ) from None
            except OSError as error:
                logger.warning("the process that %s is gone: %s", self._purpose, error)
                return b""

    def close(self) -> None:
        """End the process; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def _start(self) -> None:
        self.close()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self._script)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # signals of a terminal are for the service
                env=_environment(),
            )
        source = json.dumps(self._source()).encode()
        try:
            self._control.sendall(len(source).to_bytes(8, "big") + source)
        except OSError as error:  # it has ended already, which the next `ask` sees
            logger.warning("the process that %s did not start: %s", self._purpose, error)


async def _exchange(connection: socket.socket, request: bytes, max_answer_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request)
    connection.shutdown(socket.SHUT_WR)
    answer = bytearray()
    while piece := await loop.sock_recv(connection, _RECEIVE_BYTES):
        answer += piece
        if len(answer) > 1 + max_answer_bytes:
            raise AnswerTooLong
    return bytes(answer)


def _environment() -> dict[str, str]:
    """Environment of a worker: secrets are not for what it runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIXES)}
    paths = filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH")))  # this package must be found
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}  # who forks has one thread
