"""The log: one line for each event, on stderr, as text or as JSON, with the request's id."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being handled."""


@dataclass(slots=True)
class RequestRecord:
    """What is found out about a request while it is handled, for its line in the log; no text of it.

    Attributes:
        client: name of its key; None without keys.
        num_prompt_tokens: of all prompts; None if nothing was generated.
        num_generated_tokens: delivered.
        finish_reasons: of its choices.
    """

    client: str | None = None
    num_prompt_tokens: int | None = None
    num_generated_tokens: int = 0
    finish_reasons: set[str] = field(default_factory=set)

    def fields(self) -> dict[str, Any]:
        """What there is to tell, by name."""
        fields: dict[str, Any] = {}
        if self.num_prompt_tokens is not None:
            fields = {"prompt_tokens": self.num_prompt_tokens, "generated_tokens": self.num_generated_tokens}
        if self.finish_reasons:
            fields["finish_reason"] = ",".join(sorted(self.finish_reasons))
        if self.client is not None:
            fields["client"] = self.client
        return fields


_RECORD: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)
_LIBRARIES_WITH_HANDLERS = ("transformers", "huggingface_hub")


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message [request id]`; what follows of a traceback is indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback if there is one."""
        request_id = _request_id(record)
        record.request = "" if request_id is None else f" [{request_id}]"
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - named by the library
        """The line; no text can make a second one, or move the cursor."""
        return _printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - named by the library
        """The traceback, which looks like no line of the log."""
        lines = super().formatException(ei).split("\n")
        return textwrap.indent("\n".join(map(_printable, lines)), "  ")


class JsonFormatter(logging.Formatter):
    """One JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """ASCII JSON, so that no text can make a second line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": _request_id(record),
            **getattr(record, "fields", {}),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({key: value for key, value in entry.items() if value is not None})


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: progress bars replace it to keep lines above them."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def new_record() -> RequestRecord:
    """Begin the record of the request that is being handled."""
    record = RequestRecord()
    _RECORD.set(record)
    return record


def current_record() -> RequestRecord:
    """That of the request that is being handled; outside of one, a record that nobody reads."""
    return _RECORD.get() or RequestRecord()


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send the log of this process to stderr: the service's own from INFO, that of libraries from WARNING."""
    handler = _StderrHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("service").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # of bad requests service.api.protocol tells
    logging.captureWarnings(True)


def adopt_library_logs() -> None:
    """Send here what libraries write with handlers of their own, which they make when they are imported."""
    for name in _LIBRARIES_WITH_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _request_id(record: logging.LogRecord) -> str | None:
    """Of the record itself on the engine thread, which works for many requests; else of the context."""
    request_id: str | None = getattr(record, "request_id", None) or REQUEST_ID.get()
    return request_id


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
