"""What litellm and the clients under it raise, translated into our tree. Pure: exceptions are told apart by name, so
nothing is imported.

Owns the table, the reading of Retry-After, and what of a provider's message a caller may see. Refuses to pass on a
provider's words unless they are about the request itself, and then without keys and addresses and shortened.

The HTTP status decides before the class: litellm files by words in the message, and calls a 401 of OpenAI, whose body
says `invalid_request_error`, a BadRequestError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Final

from gateway.errors import (
    ConnectFailed,
    UpstreamError,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamWindowExceeded,
)

MAX_MESSAGE: Final = 300
DEFAULT_RETRY_AFTER: Final = 1.0  # seconds, where a full provider names none

# Every exception class of litellm.exceptions, and of openai, httpx and aiohttp what can reach us, by package and name.
# MidStreamFallbackError is unwrapped first; its entry holds where it wraps nothing.
COUNTERPARTS: Final[Mapping[str, type[UpstreamError]]] = {
    "litellm.APIConnectionError": UpstreamFailed,
    "litellm.APIError": UpstreamFailed,
    "litellm.APIResponseValidationError": UpstreamFailed,
    "litellm.AuthenticationError": UpstreamUnauthorized,
    "litellm.BadGatewayError": UpstreamFailed,
    "litellm.BadRequestError": UpstreamRejected,
    "litellm.BlockedPiiEntityError": UpstreamRejected,
    "litellm.BudgetExceededError": UpstreamFailed,
    "litellm.ContentPolicyViolationError": UpstreamRejected,
    "litellm.ContextWindowExceededError": UpstreamRejected,
    "litellm.GuardrailRaisedException": UpstreamRejected,
    "litellm.ImageFetchError": UpstreamRejected,
    "litellm.InternalServerError": UpstreamFailed,
    "litellm.InvalidRequestError": UpstreamRejected,
    "litellm.JSONSchemaValidationError": UpstreamFailed,
    "litellm.LiteLLMUnknownProvider": UpstreamFailed,
    "litellm.MidStreamFallbackError": UpstreamFailed,
    "litellm.MockException": UpstreamFailed,
    "litellm.ModelNotMappedError": UpstreamFailed,
    "litellm.ModifyResponseException": UpstreamFailed,
    "litellm.NotFoundError": UpstreamFailed,
    "litellm.OpenAIError": UpstreamFailed,
    "litellm.PaymentRequiredError": UpstreamUnauthorized,
    "litellm.PermissionDeniedError": UpstreamUnauthorized,
    "litellm.RateLimitError": UpstreamOverloaded,
    "litellm.RejectedRequestError": UpstreamRejected,
    "litellm.SensitiveDataRouteException": UpstreamFailed,
    "litellm.ServiceUnavailableError": UpstreamOverloaded,
    "litellm.Timeout": UpstreamTimeout,
    "litellm.UnprocessableEntityError": UpstreamRejected,
    "litellm.UnsupportedParamsError": UpstreamRejected,
    "litellm.VectorStoreSearchError": UpstreamRejected,
    "openai.APITimeoutError": UpstreamTimeout,
    "openai.APIConnectionError": UpstreamFailed,
    "openai.AuthenticationError": UpstreamUnauthorized,
    "openai.PermissionDeniedError": UpstreamUnauthorized,
    "openai.RateLimitError": UpstreamOverloaded,
    "openai.BadRequestError": UpstreamRejected,
    "openai.UnprocessableEntityError": UpstreamRejected,
    "openai.OpenAIError": UpstreamFailed,
    "httpx.ConnectError": ConnectFailed,
    "httpx.ConnectTimeout": ConnectFailed,
    "httpx.ProxyError": ConnectFailed,
    "httpx.TimeoutException": UpstreamTimeout,
    "httpx.HTTPError": UpstreamFailed,
    "httpx.InvalidURL": UpstreamFailed,
    "httpx.StreamError": UpstreamFailed,
    "aiohttp.ClientConnectorError": ConnectFailed,
    "aiohttp.ClientOSError": UpstreamFailed,
    "aiohttp.ServerTimeoutError": UpstreamTimeout,
    "aiohttp.ClientError": UpstreamFailed,
}

_SENTENCES: Final[Mapping[type[UpstreamError], str]] = {
    ConnectFailed: "the deployment cannot be reached",
    UpstreamTimeout: "the deployment did not answer in time",
    UpstreamOverloaded: "the deployment is full",
    UpstreamUnauthorized: "the deployment refused our credentials",
    UpstreamFailed: "the deployment failed, or its answer cannot be read",
}
_REJECTIONS: Final = frozenset({400, 413, 422})
_CONTEXT_CLASS: Final = "litellm.ContextWindowExceededError"
_CONTEXT_WORDS: Final = re.compile(
    r"too large for model with \d+ maximum context length"
)  # Mistral: litellm does not know it

_QUOTED_MESSAGE: Final = re.compile(r'\\?"message\\?"\s*:\s*\\?"((?:[^"\\]|\\[^"])*)')
_LITELLM_PREFIX: Final = re.compile(r"^(?:litellm\.)?(?:\w+(?:Error|Exception|Timeout)\b[\s:-]*)+")
_SECRET_LIKE: Final = re.compile(r"https?://\S+|\b(?=[\w*-]*\d)[\w*-]{20,}|\b(?:sk|pk|key)-[\w*-]{4,}")


def translate(error: BaseException, deployment: str, now: float) -> UpstreamError:
    """Our counterpart of a foreign exception. `now`: seconds since the epoch, for a Retry-After that is a date."""
    error = _unwrapped(error)
    status = _status(error)
    kind = _counterpart(error, status)
    if kind is UpstreamRejected:
        if _is_context(error):
            return UpstreamWindowExceeded(
                f"the prompt does not fit the window of {deployment}", upstream_status=400, param="messages"
            )
        words = _about_the_request(str(error))
        refused = f"{deployment} refused the request: {words}"
        return UpstreamRejected(refused, upstream_status=status if status in _REJECTIONS else 400)
    if kind is UpstreamOverloaded:
        wait = _retry_after(error, now)
        return UpstreamOverloaded(_SENTENCES[kind], retry_after=DEFAULT_RETRY_AFTER if wait is None else wait)
    if status == 404:
        return UpstreamFailed("the deployment does not know its model")
    return kind(_SENTENCES[kind])


def names(kind: type[BaseException]) -> Iterator[str]:
    """`package.Class` of an exception class and its bases, nearest first."""
    return (f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in kind.__mro__)


def _unwrapped(error: BaseException) -> BaseException:
    """litellm wraps what ends a stream in a MidStreamFallbackError."""
    inner = getattr(error, "original_exception", None)
    return _unwrapped(inner) if isinstance(inner, BaseException) else error


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def _counterpart(error: BaseException, status: int | None) -> type[UpstreamError]:
    # litellm's transport makes an httpx.ConnectError of every lost connection; what it was made of knows better.
    told = [kind for cause in _chain(error) if (kind := _listed(cause)) is not None]
    if told and told[-1] is ConnectFailed:
        return ConnectFailed
    if status in (401, 402, 403):
        return UpstreamUnauthorized
    if status in (429, 503, 529) or "overloaded_error" in str(error):  # 529: Anthropic; litellm makes a 500 of it
        return UpstreamOverloaded
    if status in (404, 408):
        return UpstreamTimeout if status == 408 else UpstreamFailed
    return _listed(error) or (UpstreamTimeout if isinstance(error, TimeoutError) else UpstreamFailed)


def _listed(error: BaseException) -> type[UpstreamError] | None:
    return next((COUNTERPARTS[name] for name in names(type(error)) if name in COUNTERPARTS), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, outermost first; at most as many as differ."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_context(error: BaseException) -> bool:
    return _CONTEXT_CLASS in names(type(error)) or _CONTEXT_WORDS.search(str(error)) is not None


def _about_the_request(text: str) -> str:
    """The provider's sentence out of litellm's: without prefixes, keys and addresses, at most `MAX_MESSAGE`
    characters."""
    quoted = _QUOTED_MESSAGE.search(text)
    words = quoted.group(1) if quoted else _LITELLM_PREFIX.sub("", text.partition("\n")[0])
    return _SECRET_LIKE.sub("[redacted]", words.strip())[:MAX_MESSAGE] or "no reason given"


def _retry_after(error: BaseException, now: float) -> float | None:
    """Seconds until the provider wants to be asked again: a number or an HTTP date (RFC 9110, 10.2.3), or None."""
    held = [getattr(error, "litellm_response_headers", None)]
    held += [getattr(getattr(cause, "response", None), "headers", None) for cause in _chain(error)]
    for headers in held:
        value = headers.get("retry-after") if headers is not None else None
        if not value:
            continue
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - now)
        except ValueError:
            continue
    return None
