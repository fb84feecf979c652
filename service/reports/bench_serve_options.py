"""What `pennyweight bench serve` is to measure, and how that is written on its command line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from service.errors import SettingError, shown
from service.reports.bench_options import parse_output, parse_picture
from service.reports.bench_text import DEFAULT_TEXT
from service.reports.text_file import read_text

KEY_VARIABLE: Final = "PENNYWEIGHT_BENCH_API_KEY"
MAX_TEXT_CHARACTERS: Final = 2**16
"""Of a text, as many from its beginning are used."""

_DEFAULT_CLIENTS = "1,8"
_DEFAULT_DURATION_S = 10.0
_MAX_URLS = 2
_MAX_LIST = 16
_MAX_CLIENTS = 1024
_MAX_RATE = 1000.0
_MAX_REQUESTS = 10**6
_MAX_SECONDS = 3600.0
_MAX_TOKENS = 2**20
_MAX_BLOCKS = 100
_MAX_SEED = 2**63 - 1
_MAX_KEY_CHARACTERS = 4096
_KEY = re.compile(r"[!-~]+")

_Number = TypeVar("_Number", int, float)


class Load(NamedTuple):
    """How requests come: from so many clients, each of which waits for its answer, or so many a second, whatever comes.

    One of the two is None.
    """

    clients: int | None
    rate_per_s: float | None

    def __str__(self) -> str:
        if self.clients is not None:
            return f"{self.clients} client{'s' * (self.clients != 1)}"
        return f"{self.rate_per_s:g} requests/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """A benchmark of one server, or of two in turns.

    Attributes:
        num_requests: to each server at each load; None: as many as `duration_s` takes.
        duration_s: of each server at each load, all blocks together.
        num_blocks: turns of each server at each load.
        nonce: sets the prompts of this run apart from those of every other.
        timeout_s: longest wait for one answer.
        text: what prompts take their tokens from, and on which two servers are compared.
        api_keys: one for each URL, None where none is sent.
        output: file for the JSON.
        plot: file for the picture.
    """

    urls: tuple[str, ...]
    loads: tuple[Load, ...] = (Load(1, None), Load(8, None))
    num_requests: int | None = None
    duration_s: float = _DEFAULT_DURATION_S
    num_blocks: int = 2
    num_prompt_tokens: int = 64
    max_tokens: int = 64
    seed: int = 0
    nonce: str = field(default_factory=partial(token_hex, 8), compare=False)
    timeout_s: float = 120.0
    text: str = DEFAULT_TEXT
    api_keys: tuple[str | None, ...] = field(default=(None, None), repr=False)
    output: Path | None = None
    plot: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags; `read_options` checks their values."""
    numbers = {
        "--blocks": ("2", "turns of each server at each load, between which the other one has its own"),
        "--prompt-tokens": ("64", "of each prompt"),
        "--max-tokens": ("64", "of each answer"),
        "--seed": ("0", "of the times at which requests of an open loop are sent; prompts differ from run to run"),
        "--timeout": ("120", "seconds after which an answer counts as an error"),
    }
    parser.add_argument("--url", action="append", metavar="URL", help="of a server; twice to compare two of one model")
    parser.add_argument(
        "--clients", metavar="LIST", help=f"closed loop: numbers of clients (default: {_DEFAULT_CLIENTS})"
    )
    parser.add_argument("--rate", metavar="LIST", help="open loop: mean requests per second, at random times")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--requests", metavar="N", help="to each server at each load")
    amount.add_argument(
        "--duration", metavar="S", help=f"of each server at each load, in seconds (default: {_DEFAULT_DURATION_S:g})"
    )
    for flag, (default, text) in numbers.items():
        parser.add_argument(flag, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to take prompts from and to compare on")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"file with a key, or one in a line for each URL (or: {KEY_VARIABLE})"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the figures there; takes matplotlib")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")


def read_options(words: Mapping[str, Any], environment: Mapping[str, str]) -> ServeBench:
    """What the flags ask for.

    Raises:
        SettingError: a value is wrong, with name, value and rule.
    """
    urls = _urls(words["url"] or [])
    requests, duration = words["requests"], words["duration"]
    num_blocks = _number("--blocks", words["blocks"], int, (1, _MAX_BLOCKS))
    return ServeBench(
        urls=urls,
        loads=_loads(words["clients"], words["rate"]),
        num_requests=None if requests is None else _number("--requests", requests, int, (num_blocks, _MAX_REQUESTS)),
        duration_s=_DEFAULT_DURATION_S
        if duration is None
        else _number("--duration", duration, float, (0.1, _MAX_SECONDS)),
        num_blocks=num_blocks,
        num_prompt_tokens=_number("--prompt-tokens", words["prompt_tokens"], int, (1, _MAX_TOKENS)),
        max_tokens=_number("--max-tokens", words["max_tokens"], int, (1, _MAX_TOKENS)),
        seed=_number("--seed", words["seed"], int, (0, _MAX_SEED)),
        timeout_s=_number("--timeout", words["timeout"], float, (0.1, _MAX_SECONDS)),
        text=DEFAULT_TEXT if words["text"] is None else read_text(words["text"], max_characters=MAX_TEXT_CHARACTERS),
        api_keys=_api_keys(words["api_key_file"], environment, num_urls=len(urls)),
        output=None if words["output"] is None else parse_output(words["output"]),
        plot=None if words["plot"] is None else parse_picture(words["plot"]),
    )


def _urls(words: list[str]) -> tuple[str, ...]:
    if not 1 <= len(words) <= _MAX_URLS:
        raise SettingError(f"--url: given {len(words)} times; name one server, or two to compare: --url URL --url URL")
    urls = tuple(map(_url, words))
    if len(set(urls)) < len(urls):
        raise SettingError(f"--url {shown(words[0])}: given twice; name another server, or measure this one alone")
    return urls


def _url(text: str) -> str:
    rule = "must be http:// or https://, a host, and a port from 1 to 65535 if it is not the usual one"
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_url &= text.isprintable() and " " not in text and not (parts.query or parts.fragment)
    except ValueError:
        is_url = False
    else:
        if parts.username is not None:
            raise SettingError(f"--url: holds a user name; keys come from --api-key-file or {KEY_VARIABLE} only")
    if not is_url:
        raise SettingError(f"--url {shown(text)}: {rule}; write http://127.0.0.1:8000")
    return text.rstrip("/")


def _loads(clients: str | None, rates: str | None) -> tuple[Load, ...]:
    """Closed loops before open ones; one list alone leaves the other kind out."""
    loads: list[Load] = []
    if clients is not None or rates is None:
        loads += [
            Load(count, None) for count in _list("--clients", clients or _DEFAULT_CLIENTS, int, (1, _MAX_CLIENTS))
        ]
    if rates is not None:
        loads += [Load(None, rate) for rate in _list("--rate", rates, float, (0.01, _MAX_RATE))]
    return tuple(loads)


def _list(flag: str, text: str, kind: Callable[[str], _Number], allowed: tuple[float, float]) -> list[_Number]:
    words = text.split(",")
    if len(words) > _MAX_LIST:
        raise SettingError(f"{flag}: {len(words)} entries, it must be at most {_MAX_LIST}; run it in parts")
    numbers = [_number(flag, word.strip(), kind, allowed) for word in words]
    if len(set(numbers)) < len(numbers):
        raise SettingError(f"{flag} {shown(text)}: an entry stands there twice; give each once")
    return numbers


def _number(flag: str, text: str, kind: Callable[[str], _Number], allowed: tuple[float, float]) -> _Number:
    low, high = allowed
    try:
        number = kind(text) if text.isascii() and "_" not in text and len(text) < 40 else math.nan
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        raise SettingError(f"{flag} {shown(text)}: must be {what} from {low:.15g} to {high:.15g}; correct it")
    return kind(text)


def _api_keys(name: str | None, environment: Mapping[str, str], *, num_urls: int) -> tuple[str | None, ...]:
    """A key for each URL; messages show none."""
    variable = environment.get(KEY_VARIABLE)
    if name is not None and variable is not None:
        raise SettingError(f"--api-key-file {shown(name)} and {KEY_VARIABLE}: keys in two places; keep one of them")
    if name is None and variable is None:
        return (None,) * num_urls
    origin = KEY_VARIABLE if name is None else f"--api-key-file {shown(name)}"
    lines = (variable or "").split(",") if name is None else _lines(Path(name), origin)
    keys = [line.strip() for line in lines if line.strip()]
    if len(keys) not in (1, num_urls):
        raise SettingError(f"{origin}: {len(keys)} keys for {num_urls} servers; give one for all, or one for each")
    if not all(len(key) <= _MAX_KEY_CHARACTERS and _KEY.fullmatch(key) for key in keys):
        raise SettingError(f"{origin}: a key must be printable ASCII without blanks; give it as the server has it")
    return tuple(keys * num_urls)[:num_urls]


def _lines(path: Path, origin: str) -> list[str]:
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(2 * _MAX_KEY_CHARACTERS)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"{origin}: cannot be read ({reason}); give a file that can be") from error
    return content.decode("utf-8", "replace").splitlines()
