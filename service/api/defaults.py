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
    "min_p": ("0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("0.1 to 10", lambda value: 0.1 <= value <= 10),
}
_APPLIES_TO_GREEDY = {"repetition_penalty"}
"""Fields that have an effect in transformers also without sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values for fields that a request leaves out; the meanings are those of `SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What `generation_config.json` of a model folder states.

    With `"do_sample": false` its sampling fields have no effect in transformers, so they are not taken, but
    its penalty is. A value outside the bounds of requests is not taken either, and a line in the log says so.
    """
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    is_greedy = stated.get("do_sample") is False
    taken: dict[str, Any] = {}
    for name, (rule, is_valid) in _RULES.items():
        value = stated.get(name)
        if value is None or (is_greedy and name not in _APPLIES_TO_GREEDY):
            continue
        if _is_number(value) and is_valid(value):
            taken[name] = int(value) if name == "top_k" else float(value)
        else:
            logger.warning("generation_config.json: %s is %r, must be %s; it is not used", name, value, rule)
    return SamplingDefaults(**taken)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
