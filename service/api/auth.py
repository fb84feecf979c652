"""API keys: who a client is, found out without telling how near a wrong key came."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers

from service.errors import SettingError, Unauthorized

MAX_KEYS = 1024
_KEY_CHARACTERS = (16, 256)
"""Fewest and most."""
_MIN_DIFFERENT_CHARACTERS = 6
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]+")
_REMEDY = "write [NAME:]KEY, the key as `openssl rand -hex 32` prints it"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        name: of its client, in the log; no two keys have the same.
        digest: SHA-256 of the key, which itself is forgotten.
    """

    name: str
    digest: bytes


class KeyRing:
    """All keys that open a door; without any, the door is open.

    Args:
        keys: their names and digests differ.
    """

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    def identify(self, headers: Headers) -> str | None:
        """Name of the key that a request brought as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        None if none is needed. Every key is compared, whole, whatever the others gave.

        Raises:
            Unauthorized: no key, several, or one that is not on this ring.
        """
        if not self._keys:
            return None
        given = _given_keys(headers)
        if len(given) != 1:
            raise Unauthorized(
                f"{len(given)} API keys in this request; one is needed; send the header Authorization: Bearer KEY",
                code="missing_api_key",
            )
        digest = _digest(given[0])
        matches = [key.name for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not matches:
            raise Unauthorized(
                "the API key of this request is none of this service's; ask its operator for one",
                code="invalid_api_key",
            )
        return matches[0]


def parse_keys(words: Iterable[str], origin: str) -> KeyRing:
    """Keys as an operator writes them, each as `KEY` or `NAME:KEY`; those without a name are called by their number.

    `origin` is where they stand, for errors, which show no key.

    Raises:
        SettingError: no key, too many, one that is weak or no key at all, or one key or name twice.
    """
    keys: list[ApiKey] = []
    for number, word in enumerate(words, start=1):
        name, separator, secret = word.rpartition(":")
        place = f"{origin}: key {number}"
        if separator and not _NAME.fullmatch(name):
            raise SettingError(f"{place}: its name must be 1 to 64 of A-Z a-z 0-9 . _ -; {_REMEDY}")
        _check_strength(secret, place)
        key = ApiKey(name or f"key-{number}", _digest(secret.encode("ascii")))
        for earlier in keys:
            if key.digest == earlier.digest or key.name == earlier.name:
                raise SettingError(f"{place}: the same {_what_is_equal(key, earlier)} as an earlier one; remove one")
        keys.append(key)
    if not 1 <= len(keys) <= MAX_KEYS:
        raise SettingError(f"{origin}: {len(keys)} keys; there must be 1 to {MAX_KEYS}; {_REMEDY}")
    return KeyRing(keys)


def _what_is_equal(key: ApiKey, earlier: ApiKey) -> str:
    return "key" if key.digest == earlier.digest else f"name {key.name}"


def _check_strength(secret: str, place: str) -> None:
    fewest, most = _KEY_CHARACTERS
    if not fewest <= len(secret) <= most or not _KEY.fullmatch(secret):
        raise SettingError(
            f"{place}: {len(secret)} characters; it must have {fewest} to {most}, all printable ASCII; {_REMEDY}"
        )
    if len(set(secret)) < _MIN_DIFFERENT_CHARACTERS:
        raise SettingError(
            f"{place}: {len(set(secret))} different characters; it must have {_MIN_DIFFERENT_CHARACTERS}; {_REMEDY}"
        )


def _given_keys(headers: Headers) -> list[bytes]:
    """What a request offers as keys; the bytes of a header are read as Latin-1, one character each."""
    given = []
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            given.append(key.strip().encode("latin-1"))
    if not given:
        given = [value.strip().encode("latin-1") for value in headers.getlist("x-api-key")]
    return given


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
