"""Who may use the service, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from service.api.auth import KeyRing
from service.api.limits import ClientLimits
from service.errors import Misdirected

_LOCAL_NAMES = ("localhost", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules.

    Attributes:
        keys: open the routes that do work.
        metrics_key: opens `/metrics`, which takes no other.
        limits: of each client.
        cors_origins: web pages that browsers let use the service; `*` is all.
        own_host: the only host name that requests may be for, besides `localhost`; None if any is right.
    """

    keys: KeyRing = field(default_factory=KeyRing)
    metrics_key: KeyRing = field(default_factory=KeyRing)
    limits: ClientLimits = field(default_factory=ClientLimits)
    cors_origins: tuple[str, ...] = ()
    own_host: str | None = None

    def check_host(self, headers: Headers) -> None:
        """Refuse a request that a web page made to this machine under a name of its own (DNS rebinding).

        An address is no such name.

        Raises:
            Misdirected: it is for another host.
        """
        name = _host_name(headers.get("host", ""))
        if self.own_host is None or name in (*_LOCAL_NAMES, self.own_host) or _is_address(name):
            return
        raise Misdirected(
            f"host {name[:64]!r} is not this service's; without API keys it listens to this machine, as localhost "
            "or by address; call it so, or start it with API keys",
            code="wrong_host",
        )


def _host_name(host: str) -> str:
    """The name in a `Host` header, without a port."""
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
