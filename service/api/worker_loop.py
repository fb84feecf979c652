"""What the scripts of `WorkerProcess` have in common: a loop that answers each request in a fork with limits.

The kernel enforces the limits of time and memory, so that work that loops or grows ends itself and nothing else.
The limit of memory holds for the loop as well, so that it does ahead only what a fork has done before it.

Standard input is a socket. First come 8 bytes of length and JSON: a script's source, with `limit_s` and `limit_bytes`.
Then come connections, one for each request: bytes until end of file; back come a point and the answer. A point
alone means that a limit was reached, nothing at all that the loop has ended.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from json import loads
from pathlib import Path
from typing import Any

_MAX_REASON_CHARACTERS = 200
_STATM = Path("/proc/self/statm")

Answer = Callable[[bytes], bytes]


def serve(prepare: Callable[[dict[str, Any]], Answer]) -> None:
    """Serve until the other end of standard input closes; `prepare` makes from the source what answers."""
    with socket.socket(fileno=sys.stdin.fileno()) as control, control.makefile("rb", buffering=0) as stream:
        source = loads(_read(stream.read, int.from_bytes(_read(stream.read, 8), "big")))
        answer = prepare(source)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel clears away forks that have ended
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            with socket.socket(fileno=descriptors[0]) as connection:
                fork(partial(_reply, connection, answer), source["limit_s"])


def limit_memory(num_bytes: int) -> None:
    """Let this process and its forks take so many bytes of address space more."""
    num_bytes += int(_STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def fork(work: Callable[[], object], limit_s: float) -> int:
    """Do work in a fork that ends after `limit_s`; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # ends the fork, whatever it is doing
        work()
        status = 0
    finally:
        os._exit(status)


def one_line(text: str) -> str:
    """A text for a client: one line of printable characters, cut."""
    words = "".join(character if character.isprintable() else " " for character in text).split()
    return " ".join(words)[:_MAX_REASON_CHARACTERS]


def _read(read: Callable[[int], bytes | None], size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = read(size - len(data))
        if not piece:
            sys.exit(0)  # the service ended before it had sent all
        data += piece
    return data


def _reply(connection: socket.socket, answer: Answer) -> None:
    connection.sendall(b".")
    with connection.makefile("rb") as stream:
        request = stream.read()
    connection.sendall(answer(request))
