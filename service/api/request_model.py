"""The base of what clients send: no field is ignored unsaid, and a long list of errors is never made."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELDS = 128
"""Of one object; no schema has as many. Each that is unknown is an error of its own, which takes time to tell."""


class RequestModel(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            message = f"has {len(value)} fields; at most {MAX_FIELDS} are looked at; remove those that are not known"
            raise PydanticCustomError("too_many_fields", message)
        return value
