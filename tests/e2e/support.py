"""The real command in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0


class ServerProcess:
    """A started `pennyweight serve`.

    Args:
        module: what is run instead of the command, and takes the same arguments.

    Attributes:
        log: lines of stderr so far.
    """

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str], *, module: str = "service") -> None:
        # Tests run beside one another: one thread each, unless a measurement asks for more.
        threads = () if "--threads" in arguments else ("--threads", "1")
        fidelity = () if "--fidelity" in arguments else ("--fidelity", "off")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--port", "0", *threads, *fidelity, *arguments],
            cwd=ROOT,
            env=clean_environment() | dict(environment),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._url: str | None = None
        self._has_news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def client(self) -> httpx.Client:
        """A client, as soon as the port is known."""
        with self._has_news:
            assert self._has_news.wait_for(lambda: self._url is not None, TIMEOUT_S), self.log
        assert self._url is not None
        return httpx.Client(base_url=self._url, timeout=TIMEOUT_S)

    def wait_for_log(self, text: str) -> None:
        """Wait for a line that holds a text."""
        with self._has_news:
            found = self._has_news.wait_for(lambda: any(text in line for line in self.log), TIMEOUT_S)
        assert found, self.log

    def peak_bytes(self) -> int:
        """Most resident bytes of the process so far (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def exit_code(self) -> int:
        """Wait for the end; all of the log is there then."""
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._has_news:
                self.log.append(line.rstrip())
                if self._url is None and (match := re.search(r"listening on (http://\S+)", line)):
                    self._url = match[1]
                self._has_news.notify_all()


def clean_environment() -> dict[str, str]:
    """This environment without settings of the service, offline, and with no cache of quantized models."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENNYWEIGHT_")}
    return kept | {"HF_HUB_OFFLINE": "1", "PENNYWEIGHT_CACHE_LIMIT": "0"}


@contextmanager
def started(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start the command with more variables; it is killed at the end if it still runs."""
    server = ServerProcess(arguments, environment or {})
    try:
        yield server
    finally:
        server.close()


@contextmanager
def ready(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[ServerProcess, httpx.Client]]:
    """Start the command and wait until it takes requests."""
    with started(*arguments, environment=environment) as server, server.client() as client:
        server.wait_for_log("ready: ")
        assert client.get("/readyz").status_code == 200
        yield server, client
