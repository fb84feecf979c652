"""The log: one line for each event, on stderr, as text or as JSON, with the request's id."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being handled."""


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message [request id]`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback if there is one."""
        request_id = REQUEST_ID.get()
        record.request = "" if request_id is None else f" [{request_id}]"
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """ASCII JSON, so that no text can make a second line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST_ID.get(),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({key: value for key, value in entry.items() if value is not None})


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send the log of this process to stderr: the service's own from INFO, that of libraries from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("service").setLevel(logging.INFO)
