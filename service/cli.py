"""The command `pennyweight`. Exit codes: 0 done, 1 failed, 2 bad usage or setting, 3 does not fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from service import __version__
from service.app import run
from service.errors import PennyweightError, SettingError
from service.settings import as_toml, read_invocation

_USAGE = """usage: pennyweight serve [MODEL] [options]

Serves a Hugging Face causal language model, quantized while it loads.

commands:
  serve       load and serve MODEL (a hub id or a directory; none: the embedded demo model)

options:
  --help      this text; `pennyweight serve --help` lists the options of serve
  --version   print the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(words)
    except PennyweightError as error:
        print(f"pennyweight: {error}", file=sys.stderr)
        return error.exit_code


def _dispatch(words: list[str]) -> int:
    if words in (["--help"], ["-h"]):
        print(_USAGE, end="")
        return 0
    if words == ["--version"]:
        print(f"pennyweight {__version__}")
        return 0
    if not words:
        raise SettingError("no command given; available: serve; see `pennyweight --help`")
    if words[0] != "serve":
        raise SettingError(f"{words[0]} is not part of version {__version__}; available: serve")
    invocation = read_invocation(words[1:], os.environ)
    if invocation.print_config:
        print(as_toml(invocation.settings))
        return 0
    return run(invocation.settings, ignored_variables=invocation.ignored_variables)
