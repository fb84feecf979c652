"""The port: opened before anything slow is done."""

from __future__ import annotations

import errno
import socket

from service.errors import PennyweightError, SettingError


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
