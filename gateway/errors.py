"""The error tree: what can go wrong for a caller, with its status, code and whether another deployment may be tried.

    GatewayError
    ├── RequestError                    the caller must change something
    │   ├── Unauthenticated      401
    │   ├── TooLarge             413   HeadTooLarge 431
    │   ├── BadRequest           400
    │   ├── ContextLengthExceeded 400
    │   ├── NotFound             404   MethodNotAllowed 405   UnknownModel 404
    │   ├── Forbidden            403   ProtectedRefused 403
    │   ├── CostCapExceeded      402
    │   ├── NeverFits            400    more than a limit of the caller allows in all
    │   ├── BudgetSpent          402    its money for the day or the month
    │   └── RateLimited          429    its requests or tokens
    ├── NoCandidate              503    every permitted deployment is down, full, or failed
    ├── LimitsUnavailable        503    what limits it cannot be checked, and then nothing is to pass
    ├── DeadlineExceeded         504
    ├── EgressDenied             500    the door refused what the decision allowed: a defect of ours, nothing was sent
    └── UpstreamError            502    one attempt on one deployment failed
        ├── UpstreamRejected            the deployment refuses the request itself; another would too: not retryable
        │   └── UpstreamWindowExceeded  because it is too long
        ├── UpstreamCut                 the answer broke off after its first token: not retryable; an error event
        └── Retryable                   another replica or deployment may be tried
            ├── ConnectFailed               └── ConnectionLost: the server may have died of the request
            ├── UpstreamTimeout      504    └── UpstreamLate: we left its queue
            ├── UpstreamOverloaded          429 or 503, with retry_after
            ├── UpstreamUnauthorized        our credentials are wrong there
            └── UpstreamFailed              reset, or an answer that cannot be read
                └── UpstreamErrored         5xx: it says itself that it failed, and bills nothing

Messages are sentences for the caller. None quotes what the caller sent, a key, or an internal address.
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """An answer that is not a completion. `param` names the field at fault, `retry_after` (seconds) becomes Retry-
    After, `headers` go with it."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "api_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.headers: list[tuple[bytes, bytes]] = []


class RequestError(GatewayError):
    status = 400
    code = "bad_request"
    type = "invalid_request_error"


class Unauthenticated(RequestError):
    """No key, or one that is unknown, expired or revoked."""

    status = 401
    code = "invalid_api_key"


class TooLarge(RequestError):
    status = 413
    code = "request_too_large"


class HeadTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class BadRequest(RequestError):
    """The body, a field of it or a header is not what the API takes."""

    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class Forbidden(RequestError):
    """The caller's key may not use what was asked for."""

    status = 403
    code = "not_allowed"
    type = "permission_error"


class ProtectedRefused(Forbidden):
    """The request is protected by an invariant and the policy has no place for it."""

    code = "protected_refused"


class CostCapExceeded(RequestError):
    status = 402
    code = "cost_cap_exceeded"
    type = "insufficient_quota"


class NeverFits(RequestError):
    code = "exceeds_limit"


class BudgetSpent(RequestError):
    status = 402
    code = "budget_spent"
    type = "insufficient_quota"


class RateLimited(RequestError):
    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class LimitsUnavailable(GatewayError):
    status = 503
    code = "limits_unavailable"
    type = "server_error"


class NoCandidate(GatewayError):
    status = 503
    code = "no_deployment_available"
    type = "server_error"


class DeadlineExceeded(GatewayError):
    status = 504
    code = "deadline_exceeded"
    type = "timeout_error"


class EgressDenied(GatewayError):
    code = "egress_denied"


class UpstreamError(GatewayError):
    """One attempt failed. `reason` is the same sentence without the deployment's name, for the decision record."""

    status = 502
    code = "upstream_error"
    type = "server_error"


class UpstreamRejected(UpstreamError):
    """The deployment answered 4xx about the request itself; `upstream_status` is passed on to the caller."""

    code = "upstream_rejected"
    type = "invalid_request_error"

    def __init__(self, message: str, *, upstream_status: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.upstream_status = upstream_status


class UpstreamWindowExceeded(UpstreamRejected):
    """The deployment counted more tokens than its window holds, although our count let the request through."""

    code = "context_length_exceeded"


class UpstreamCut(UpstreamError):
    code = "upstream_cut"


class Retryable(UpstreamError):
    """Nothing has reached the caller yet, so another deployment may be tried."""


class ConnectFailed(Retryable):
    code = "upstream_connect_failed"


class ConnectionLost(ConnectFailed):
    """The connection closed without an answer once the request was sent: the server may have died of it."""


class UpstreamTimeout(Retryable):
    status = 504
    code = "upstream_timeout"
    type = "timeout_error"


class UpstreamLate(UpstreamTimeout):
    """Its queue was left, which says nothing of its health."""

    def __init__(self) -> None:
        super().__init__("its queue was left for another deployment that can still be in time")


class UpstreamOverloaded(Retryable):
    status = 503
    code = "upstream_overloaded"


class UpstreamUnauthorized(Retryable):
    code = "upstream_unauthorized"


class UpstreamFailed(Retryable):
    code = "upstream_failed"


class UpstreamErrored(UpstreamFailed):
    """The deployment itself said that it failed, in the place of an answer: nobody bills that."""


def body_of(error: GatewayError) -> dict[str, dict[str, str | None]]:
    """The error as OpenAI's clients expect it."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def status_of(error: GatewayError) -> int:
    """The HTTP status of the error's answer."""
    return error.upstream_status if isinstance(error, UpstreamRejected) else error.status
