"""The list of what becomes of each causal language model type of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("expected.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What the list says of a type.

    Attributes:
        result: as `sweep.Outcome` has it.
        reason: why it is not computed packed, or not served, in words.
        message: what the error of a type that is not served must hold.
        unquantized_only: what the refusal of `w8a16` must hold; empty if it is served.
    """

    result: str
    reason: str = ""
    message: str = ""
    unquantized_only: str = ""


def read_list() -> dict[str, Listed]:
    """Model types in alphabetical order."""
    rows = json.loads(LIST.read_text(encoding="utf-8"))
    return {model_type: Listed(**row) for model_type, row in rows.items()}
