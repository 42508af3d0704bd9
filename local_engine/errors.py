"""Owns the engine's one error tree; refuses to carry anything that a caller sent.

EngineError
├── ConfigError              settings that cannot work; ends the program before it starts
├── LoadError                a model that cannot be served; one line that says the fix
├── OutOfMemory              a forward needs more memory than is free; a smaller one may not
├── DeviceLost               the device computes nothing any more, until the process starts afresh
├── AccountingError          the block accounting contradicts itself: a defect of the engine
└── RequestError             an answer to a caller: HTTP status, type, code, param
    ├── InvalidRequest       400  the body or a header is wrong
    │   └── ContextLengthExceeded  400  does not fit the window or the KV cache
    ├── Unauthorized         401  the token is missing or another one
    ├── ModelNotFound        404  the body names another model
    ├── NotFound             404  no such path
    ├── MethodNotAllowed     405
    ├── BodyTooLarge         413
    ├── GenerationFailed     500  this request's generation broke
    └── Unavailable          503  try again later, or elsewhere
        ├── NotReady              loading, failed or shutting down
        ├── Overloaded            the waiting queue is full
        └── FirstTokenTooLate     cannot start by x-hybridgate-first-token-by
"""

from __future__ import annotations

import math
from typing import ClassVar


class EngineError(Exception):
    """Root of the tree; its text never holds what a caller sent."""


class ConfigError(EngineError):
    """Settings that cannot work together; `problems` lists all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class LoadError(EngineError):
    """A model that cannot be served; the message is one line that ends with the fix."""


class OutOfMemory(EngineError):
    """A forward was given up for want of memory; what it wrote is to be computed again."""


class DeviceLost(EngineError):
    """No forward of this process will succeed again."""


class AccountingError(EngineError):
    """Blocks are lost, shared without a reference, or held by nobody."""


class RequestError(EngineError):
    """An answer to a caller in OpenAI's error shape; `param` names the field or header at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def headers(self) -> dict[str, str]:
        """Response headers beyond the usual ones."""
        return {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(RequestError):
    """The body or a header cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit; the message names both numbers, in tokens."""

    code = "context_length_exceeded"


class Unauthorized(InvalidRequest):
    """The engine was started with a token, and the request does not carry it."""

    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("this engine wants its token: send `authorization: Bearer …` (its HYBRIDGATE_ENGINE_TOKEN)")

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class ModelNotFound(InvalidRequest):
    """The body names a model that this engine does not serve."""

    status = 404
    code = "model_not_found"


class NotFound(InvalidRequest):
    """No such path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not; `allow` lists those that do."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"allow": self.allow}


class BodyTooLarge(InvalidRequest):
    """The body is above the limit; it was not read whole."""

    status = 413
    code = "body_too_large"


class GenerationFailed(RequestError):
    """This request's generation broke; other requests go on."""

    code = "generation_failed"


class Unavailable(RequestError):
    """Not now; `retry_after` is in seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(max(1, math.ceil(self.retry_after)))}


class NotReady(Unavailable):
    """The model is loading, failed to load, or the engine is shutting down."""

    code = "not_ready"


class Overloaded(Unavailable):
    """The waiting queue is full, by sequences or by tokens."""

    code = "overloaded"


class FirstTokenTooLate(Unavailable):
    """The first token cannot come in time; `predicted_wait` is in seconds, `position` 1 where no prompt goes before."""

    code = "first_token_too_late"

    def __init__(self, predicted_wait: float, position: int) -> None:
        self.predicted_wait_ms = math.ceil(predicted_wait * 1000)
        self.position = position
        super().__init__(
            f"the first token would come in about {self.predicted_wait_ms} ms, at position {position} of the prompts "
            "that are to be computed: later than asked for",
            retry_after=predicted_wait,
        )

    def headers(self) -> dict[str, str]:
        return super().headers() | {
            "x-hybridgate-predicted-wait-ms": str(self.predicted_wait_ms),
            "x-hybridgate-queue-position": str(self.position),
        }
