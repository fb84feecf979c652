"""Every exception that Pennyweight raises on purpose.

    PennyweightError
    |-- SettingError            a flag, variable or configuration file is wrong     exit 2
    |   `-- RecipeError         a quantization recipe is wrong                      exit 2
    |-- ModelError              the model cannot be served                          exit 1
    |   |-- ModelNotFound       no such directory, repository or revision
    |   |-- UnsupportedModel    a model that this version cannot serve correctly
    |   |-- CheckpointError     files that are missing, damaged or do not fit
    |   |   `-- ArtifactError   those of a model that was quantized before
    |   |-- DoesNotFit          it needs more memory than there is                  exit 3
    |   |-- QuantizationError   a weight that cannot be quantized
    |   `-- FidelityError       a model that lost more than --max-kl, or cannot be compared
    |-- BenchError              a server that cannot be measured                    exit 1
    `-- RequestError            a request is refused or fails                       its HTTP status
        |-- InvalidRequest      400
        |   |-- PromptTooLong   400
        |   |-- BodyTooLarge    413
        |   `-- MalformedHttp   400, 431 or 501
        |-- Unauthorized        401
        |-- NotFound            404 unknown model or route
        |-- MethodNotAllowed    405
        |-- RequestTimedOut     408
        |-- Misdirected         421 for another host
        |-- QueueFull           429, with Retry-After
        |-- TooManyRequests     429, with Retry-After
        |-- Unavailable         503, loading or draining, with Retry-After
        |   `-- ServiceFailed   503, the load or the engine has failed; a retry does not help
        `-- EngineFailure       500, the step that held this request failed

A message has the offending value, the rule and the remedy, in that order.
"""

from __future__ import annotations


class PennyweightError(Exception):
    """Base of all errors below; `exit_code` is what the command line ends with."""

    exit_code = 1


class SettingError(PennyweightError):
    """A flag, an environment variable or a configuration file has a wrong name or value."""

    exit_code = 2


class RecipeError(SettingError):
    """A quantization recipe is unknown, impossible, or has a pattern that matches nothing."""


class ModelError(PennyweightError):
    """The model cannot be loaded or served."""


class ModelNotFound(ModelError):
    """No such local directory, hub repository or revision."""


class UnsupportedModel(ModelError):
    """A model that this version cannot serve correctly: an encoder, an already quantized checkpoint, ..."""


class CheckpointError(ModelError):
    """Checkpoint files are missing, damaged, or do not match the config."""


class ArtifactError(CheckpointError):
    """An artifact is damaged, unfinished, of another version or of another model; it is never served."""


class DoesNotFit(ModelError):
    """The model needs more memory than there is, or than `--memory` allows."""

    exit_code = 3


class QuantizationError(ModelError):
    """A weight cannot be quantized: wrong number of dimensions, NaN or infinity."""


class FidelityError(ModelError):
    """The quantized model is further from the original than `--max-kl` allows, or the two cannot be compared."""


class BenchError(PennyweightError):
    """A server that is to be measured is not there, is too slow, refuses, or is of another model than its twin."""


class GrammarError(PennyweightError):
    """A grammar that a text is to follow cannot be compiled, or takes too much on the way."""


class RequestError(PennyweightError):
    """A request is refused or fails. Rendered as the OpenAI error envelope.

    Args:
        message: value, rule and remedy; sent to the client as it is.
        param: the request field at fault, or None.
        code: a short machine-readable name, or None.
    """

    status = 500
    type = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A field of the request is wrong."""

    status = 400
    type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed the context, or what the KV memory holds."""


class BodyTooLarge(InvalidRequest):
    """The request body exceeds `--max-body-bytes`."""

    status = 413


class MalformedHttp(InvalidRequest):
    """What came is no HTTP request that can be answered as one; `status` says in which way."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message, code="malformed_http")
        self.status = status


class Unauthorized(RequestError):
    """The request has no API key, or a wrong one."""

    status = 401
    type = "authentication_error"


class NotFound(RequestError):
    """Unknown model or route."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(RequestError):
    """The route exists and does not take this HTTP method."""

    status = 405
    type = "invalid_request_error"


class RequestTimedOut(RequestError):
    """A request has not arrived, not begun or not ended in its time."""

    status = 408
    type = "timeout_error"


class QueueFull(RequestError):
    """As many requests wait as `--max-queue` allows."""

    status = 429
    type = "rate_limit_error"
    retry_after_s = 1


class Misdirected(RequestError):
    """The request names a host that this service is not."""

    status = 421
    type = "invalid_request_error"


class TooManyRequests(RequestError):
    """A client uses more than its share; `reason` is the limit that it met, and the code."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, reason: str, retry_after_s: int) -> None:
        super().__init__(message, code=f"{reason}_exceeded")
        self.reason = reason
        self.retry_after_s = retry_after_s


class Unavailable(RequestError):
    """The service is loading, draining or failed."""

    status = 503
    type = "unavailable_error"
    retry_after_s: int | None = 1


class ServiceFailed(Unavailable):
    """The load or the engine has failed: only a restart helps, so no time to retry is named."""

    retry_after_s = None


class EngineFailure(RequestError):
    """The engine could not compute this request; others are not affected."""


def shown(value: object, max_characters: int = 100) -> str:
    """A value as messages show it: one short line that no control character can leave."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= max_characters else f"{text[:max_characters]}..."
