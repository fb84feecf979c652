"""The log: one line for an event whatever its text, the id of its request, and the lines of libraries in it."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator

import huggingface_hub.utils.logging
import pytest

from service.api.logs import REQUEST_ID, JsonFormatter, TextFormatter, adopt_library_logs, configure_logging
from tests.api.support import RunningService, eventually
from tests.models import RAISE_TOKEN_ID

TRICKY = "two\nlines\r\x1b[31m\u2028\x85"


def _record(message: str, **extra: str) -> logging.LogRecord:
    return logging.getLogger("service.test").makeRecord(
        "service.test", logging.INFO, __file__, 1, message, (), None, extra=extra
    )


def _failed() -> logging.LogRecord:
    record = _record("failed")
    try:
        raise ValueError("\n2026-01-01 INFO forged\x1b[31m")
    except ValueError:
        record.exc_info = sys.exc_info()
    return record


def test_a_json_line_is_one_line_whatever_the_message() -> None:
    line = JsonFormatter().format(_record(TRICKY))
    assert line.isprintable()
    assert line.isascii()
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["logger"]) == (TRICKY, "INFO", "service.test")


def test_a_json_line_holds_the_traceback() -> None:
    line = JsonFormatter().format(_failed())
    assert line.isprintable()
    assert "ValueError" in json.loads(line)["exception"]


def test_a_text_line_is_one_line_whatever_the_message() -> None:
    line = TextFormatter("%(message)s").format(_record(TRICKY + "é"))
    assert line == r"two\nlines\r\x1b[31m\u2028\x85é"


def test_a_traceback_in_text_looks_like_no_other_line() -> None:
    first, *rest = TextFormatter("%(message)s").format(_failed()).split("\n")
    assert first == "failed"
    assert rest
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_a_line_has_the_id_of_its_request() -> None:
    text = TextFormatter("%(message)s%(request)s")
    assert text.format(_record("hello")) == "hello"
    token = REQUEST_ID.set("abc")
    try:
        assert text.format(_record("hello")) == "hello [abc]"
        assert json.loads(JsonFormatter().format(_record("hello")))["request_id"] == "abc"
    finally:
        REQUEST_ID.reset(token)
    assert text.format(_record("hello", request_id="def")) == "hello [def]"


def test_a_failure_on_the_engine_thread_has_the_id_of_its_request(
    running: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "service.engine.engine"):
        response = running.client.post(
            "/v1/completions",
            json={"prompt": [8, RAISE_TOKEN_ID], "max_tokens": 1},
            headers={"X-Request-ID": "the-culprit"},
        )
        assert response.status_code == 500
        assert eventually(lambda: any(message.endswith(" failed") for message in caplog.messages))
    (entry,) = [
        json.loads(JsonFormatter().format(record))
        for record in caplog.records
        if record.getMessage().endswith(" failed")
    ]
    assert entry["request_id"].startswith("the-culprit-")
    assert "Traceback" in entry["exception"]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)


def _entries(text: str) -> list[tuple[str, str]]:
    entries = map(json.loads, text.splitlines())
    return [(entry["logger"], entry["message"]) for entry in entries]


def test_lines_of_libraries_are_lines_of_this_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    library = huggingface_hub.utils.logging.get_logger("huggingface_hub.test")
    adopt_library_logs()
    library.warning("from\nthe hub")
    logging.getLogger("transformers.test").error("from transformers")
    logging.getLogger("uvicorn.error").error("from uvicorn")
    logging.getLogger("uvicorn.error").warning("not told")
    assert _entries(capsys.readouterr().err) == [
        ("huggingface_hub.test", "from\nthe hub"),
        ("transformers.test", "from transformers"),
        ("uvicorn.error", "from uvicorn"),
    ]


def test_a_warning_of_python_is_a_line_of_this_log(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("json")
        warnings.warn("beware", UserWarning, stacklevel=1)
    ((name, message),) = _entries(capsys.readouterr().err)
    assert name == "py.warnings"
    assert "UserWarning: beware" in message


def test_the_log_follows_stderr_to_where_it_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging("json")
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    logging.getLogger("service.test").info("hello")
    assert capsys.readouterr().err == ""
    assert _entries(other.getvalue()) == [("service.test", "hello")]
