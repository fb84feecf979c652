"""The port: opened before anything slow is done; and how many connections it may have."""

from __future__ import annotations

import errno
import resource
import socket

from service.errors import PennyweightError, SettingError

_MOST_FILES = 16384
_FILES_FOR_EACH_CONNECTION = 4  # itself, one more that is being refused, and as much again for all else

_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A client that is gone without a word, its machine or network being off, counts as having left after 2 minutes."""


def open_port(host: str, port: int) -> socket.socket:
    """Bind a TCP port; 0 is any free one.

    Raises:
        SettingError: this machine has no such address, or does not let us listen there.
        PennyweightError: the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise SettingError(f"--host {host}: no such address ({error.strerror}); give one of this machine") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for level, option, value in _KEEP_ALIVE:
        listener.setsockopt(level, option, value)  # connections inherit it
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PennyweightError(
                f"--port {port}: it is in use on {host}; stop the program that uses it, or choose another port"
            ) from error
        raise SettingError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); change them"
        ) from error
    return listener


def max_connections() -> int:
    """How many connections the files suffice for that this process may open."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(most, _MOST_FILES) // _FILES_FOR_EACH_CONNECTION)


def raise_file_limit() -> None:
    """Let this process open as many files as it may allow itself, as far as connections need them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MOST_FILES)), hard))
