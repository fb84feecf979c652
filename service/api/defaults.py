"""How a model samples when a request does not say: what its generation config states, else OpenAI's defaults."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("0 to 2", lambda value: 0 <= value <= 2),
    "top_p": ("above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": ("a whole number from 0", lambda value: value >= 0 and value == int(value)),
}
_NEUTRAL = {"repetition_penalty": 1, "min_p": 0}
"""Fields that other servers take over as well, and the values with which they change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for fields that a request leaves out; the meanings are those of `SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What `generation_config.json` of a model folder states.

    With `"do_sample": false` its sampling fields have no effect in transformers, so they are not taken. A value
    outside the bounds of requests is not taken either, and a line in the log says so.
    """
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stated.get("do_sample") is False:
        return SamplingDefaults()
    taken: dict[str, Any] = {}
    for name, (rule, is_valid) in _RULES.items():
        value = stated.get(name)
        if value is None:
            continue
        if _is_number(value) and is_valid(value):
            taken[name] = int(value) if name == "top_k" else float(value)
        else:
            logger.warning("generation_config.json: %s is %r, must be %s; it is not used", name, value, rule)
    for name, neutral in _NEUTRAL.items():
        if stated.get(name, neutral) not in (neutral, None):
            logger.warning("generation_config.json: %s is not part of this version; it is not used", name)
    return SamplingDefaults(**taken)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
