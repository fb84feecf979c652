"""What a client may read of an error that the engine met."""

from __future__ import annotations

import re

_MAX_CHARACTERS = 200
_PATH = re.compile(r"(?<![\w/\\])(?:[A-Za-z]:)?[/\\][^\s'\",]+")


def public_text(error: Exception) -> str:
    """Class and first line of an error, without paths of this machine."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _PATH.sub("<path>", text)[:_MAX_CHARACTERS]
