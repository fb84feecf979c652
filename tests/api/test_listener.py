"""How many connections fit the files that a process may open."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys

import pytest

from service.api.listener import open_port
from tests.floors import ROOT

CODE = "from service.api import listener; listener.raise_file_limit(); print(listener.max_connections())"


@pytest.mark.parametrize(
    ("soft", "hard", "num_connections"),
    [(64, 64, 16), (64, 256, 64), (1024, 16384, 4096)],
    ids=["few", "more when asked for", "as many as it wants"],
)
def test_connections_leave_files_for_everything_else(soft: int, hard: int, num_connections: int) -> None:
    if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip(f"this machine allows a process fewer than {hard} files")
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); {CODE}"
    done = subprocess.run([sys.executable, "-c", limits], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == num_connections


def test_the_kernel_asks_on_each_connection_whether_the_client_is_still_there() -> None:
    with open_port("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle_s, interval_s, count = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle_s + interval_s * count == 120
