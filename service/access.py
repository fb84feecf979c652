"""From settings and secrets to the rules of who may use the service."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from service.api.access import Access
from service.api.auth import KeyRing, parse_keys
from service.api.limits import ClientLimits, parse_rates
from service.errors import SettingError
from service.settings import Settings, parse_origins

_API_KEYS, _METRICS_KEY = "PENNYWEIGHT_API_KEYS", "PENNYWEIGHT_METRICS_KEY"
_MAX_FILE_BYTES = 2**20
_COMMENT = "#"


def read_access(settings: Settings, environment: Mapping[str, str]) -> Access:
    """Read the keys, and check what depends on whether there are any.

    Raises:
        SettingError: a key is weak, twice there or in two places, its file cannot be read, or `--cors-origin *`
            stands without keys.
    """
    keys = _read_keys("--api-keys-file", settings.api_keys_file, variable=_API_KEYS, environment=environment)
    metrics_key = _read_keys(
        "--metrics-key-file", settings.metrics_key_file, variable=_METRICS_KEY, environment=environment
    )
    origins = () if settings.cors_origin is None else parse_origins(settings.cors_origin)
    if origins == ("*",) and not keys:
        raise SettingError(
            "--cors-origin *: without API keys every web page that somebody near the service opens could use it; "
            "name the origins, or set API keys"
        )
    host = settings.host.lower()
    return Access(
        keys=keys,
        metrics_key=metrics_key,
        limits=ClientLimits(
            () if settings.rate_limit is None else parse_rates(settings.rate_limit),
            max_concurrent=settings.max_concurrent_requests,
        ),
        cors_origins=origins,
        own_host=host if not keys and _is_loopback(host) else None,
    )


def _read_keys(flag: str, path: Path | None, *, variable: str, environment: Mapping[str, str]) -> KeyRing:
    text = environment.get(variable)
    if path is None:
        return KeyRing() if text is None else parse_keys((word.strip() for word in text.split(",")), variable)
    if text is not None:
        raise SettingError(f"{flag} {path} and {variable}: keys in two places; keep one of them")
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingError(f"{flag} {path}: cannot be read ({error.strerror}); give a file that can be") from error
    if len(content) > _MAX_FILE_BYTES:
        raise SettingError(f"{flag} {path}: more than {_MAX_FILE_BYTES} bytes; give a file of keys")
    lines = map(str.strip, content.decode("utf-8", "replace").splitlines())
    return parse_keys((line for line in lines if line and not line.startswith(_COMMENT)), f"{flag} {path}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
