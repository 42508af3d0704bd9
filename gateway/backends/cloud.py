"""Cloud providers through litellm, which is imported here and nowhere else.

Owns what of a request reaches litellm (an allow-list: a caller's `api_base` or `api_key` never does), the proof that a
stream is complete, and the quietness of litellm: no callbacks, no telemetry, no logs. Refuses to retry and to send a
parameter that the provider does not know: it is named in `dropped` instead.

Proxy and CA settings of the environment hold here (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE): litellm's aiohttp transport
reads them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Final

import aiohttp
import httpx
import orjson

from gateway.backends import sse
from gateway.backends.base import Call, Chunk
from gateway.backends.cloud_errors import translate
from gateway.backends.cohere_stream import CohereLines
from gateway.errors import UpstreamCut, UpstreamError, UpstreamFailed, UpstreamTimeout
from gateway.types import Deployment, Usage

# What a caller may ask of a cloud model beside `model`, `messages`, `stream`. Nothing else of a body reaches litellm.
PARAMETERS: Final = frozenset(
    {"temperature", "top_p", "n", "stop", "seed", "max_tokens", "max_completion_tokens", "presence_penalty"}
    | {"frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "user", "safety_identifier"}
    | {"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "reasoning_effort", "verbosity"}
    | {"modalities", "audio", "prediction", "service_tier", "prompt_cache_key"}
)
_OURS: Final = frozenset({"model", "messages", "stream", "stream_options"})
_LITELLM_FIELDS: Final = "provider_specific_fields"  # not on OpenAI's wire
_COHERE: Final = "CohereV2ModelResponseIterator"
_CUT: Final = "the deployment's stream ended before its answer was complete"
_LOGGERS: Final = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "openai")


class CloudLibrary:
    """litellm, imported and silenced once, shared by all cloud deployments.

    Invariant: nothing is imported before `start`, and then once, in a thread, because it takes seconds. The
    connections, which litellm pools by provider, are closed with the last backend.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._litellm: Any = None
        self._users = 0
        self.errors: tuple[type[BaseException], ...] = ()

    async def start(self) -> Any:
        """litellm's module, ready. At start of the gateway, or else at the first request."""
        if self._litellm is None:
            async with self._lock:
                if self._litellm is None:
                    self._litellm = await asyncio.to_thread(self._load)
        return self._litellm

    def attach(self) -> None:
        """Count one more backend that uses the connections."""
        self._users += 1

    async def detach(self) -> None:
        """Count one backend less; the last closes the connections."""
        self._users -= 1
        if self._users == 0 and self._litellm is not None:
            await self._litellm.close_litellm_async_clients()
            self._litellm.in_memory_llm_clients_cache.flush_cache()
            # Streams of Anthropic's go through a client of litellm's module, which is made anew where it is missing.
            own = vars(self._litellm).pop("module_level_aclient", None)
            if own is not None:
                await own.close()

    def supported(self, model: str) -> frozenset[str]:
        """The OpenAI parameters that the model's provider knows. Only after `start`."""
        litellm = self._litellm
        try:
            name, provider, _, _ = litellm.get_llm_provider(model)
        except litellm.BadRequestError:
            raise UpstreamFailed("litellm does not know the provider of the deployment's model") from None
        return frozenset(litellm.get_supported_openai_params(model=name, custom_llm_provider=provider) or ())

    def _load(self) -> Any:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import fetches a price map from the network
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # their lines may hold prompts
        import litellm  # noqa: PLC0415 - takes seconds and 160 MB, so only where a cloud deployment is used

        litellm.suppress_debug_info = True
        litellm.telemetry = False
        litellm.turn_off_message_logging = True
        litellm.disable_hf_tokenizer_download = True
        litellm.callbacks = []
        for name in _LOGGERS:  # again: the import has set levels of its own
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would write a line for every call
        ours = [
            kind for kind in vars(litellm.exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)
        ]
        # The built-in ones: what litellm's parsers raise where an answer is not what they expect.
        builtin = (OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError)
        self.errors = (*ours, litellm.OpenAIError, httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError, *builtin)
        return litellm


class CloudBackend:
    """Implements `Backend` for one deployment at a cloud provider. Invariant: at most one call is sent for one
    `open`."""

    def __init__(self, deployment: Deployment, library: CloudLibrary) -> None:
        self._deployment = deployment
        self._library = library
        self._supported: frozenset[str] | None = None
        self._open = True
        library.attach()

    async def open(self, call: Call) -> CloudAnswer:
        await self._library.start()
        limits = call.timeouts or self._deployment.timeouts
        started = asyncio.get_running_loop().time()
        first = started + (limits.first_token if call.chat.stream else limits.total)
        try:
            async with asyncio.timeout_at(first):
                upstream, sent = await self._send(call)
        except TimeoutError:
            raise UpstreamTimeout("the deployment did not answer in time") from None
        except self._library.errors as error:
            raise translate(error, self._deployment.name, time.time()) from None
        dropped = tuple(sorted(call.chat.body.keys() - sent.keys() - _OURS))
        deadlines = Deadlines(first, limits.idle, started + limits.total)
        answer = CloudAnswer(upstream, call, self._deployment, self._library, deadlines, dropped)
        await answer.begin()
        return answer

    async def close(self) -> None:
        if self._open:
            self._open = False
            await self._library.detach()

    async def _send(self, call: Call) -> tuple[Any, dict[str, Any]]:
        """litellm's answer, and the parameters that were sent for it."""
        litellm = await self._library.start()
        if self._supported is None:
            self._supported = self._library.supported(self._deployment.model)
        addressed, sent = self._addressed(call), self._parameters(call, self._supported)
        try:
            return await litellm.acompletion(**addressed, **sent), sent
        except litellm.UnsupportedParamsError as error:  # raised by litellm itself, before anything has been sent
            sent = self._without_refused(sent, error)
            return await litellm.acompletion(**addressed, **sent), sent

    def _parameters(self, call: Call, supported: frozenset[str]) -> dict[str, Any]:
        """What of the caller's body is sent."""
        body = call.chat.body
        sent = {name: body[name] for name in PARAMETERS & supported & body.keys() if body[name] is not None}
        if call.imposed_max_tokens is not None:
            sent["max_tokens"] = call.imposed_max_tokens
        return sent

    def _addressed(self, call: Call) -> dict[str, Any]:
        """What the gateway adds: where to, with which key, and that nothing is retried."""
        deployment, limits = self._deployment, self._deployment.timeouts
        key = deployment.api_key
        if key is None and deployment.api_base is not None:
            key = "none"  # or litellm takes a provider's key from the environment and sends it to this address
        addressed: dict[str, Any] = {
            "model": deployment.model,
            "messages": call.chat.body["messages"],
            "stream": call.chat.stream,
            "api_key": key,
            "api_base": deployment.api_base,
            "timeout": httpx.Timeout((call.timeouts or limits).total, connect=limits.connect),
            "num_retries": 0,
            "max_retries": 0,
            "drop_params": False,
            "_skip_mcp_handler": True,  # it wants the package `mcp` for every call with tools
        }
        if call.chat.stream:
            addressed["stream_options"] = {"include_usage": True}
        return addressed

    def _without_refused(self, sent: Mapping[str, Any], error: Exception) -> dict[str, Any]:
        """The parameters less those that litellm's refusal names: some depend on the value or the model, not only on
        the provider."""
        kept = {name: value for name, value in sent.items() if name not in str(error)}
        if len(kept) == len(sent):
            raise error
        return kept


class Deadlines:
    """When an answer is too late, in the event loop's time. `first`: for the first token; `idle`: seconds between two
    chunks."""

    __slots__ = ("first", "idle", "total")

    def __init__(self, first: float, idle: float, total: float) -> None:
        self.first = first
        self.idle = idle
        self.total = total

    def next(self, *, started: bool) -> float:
        return min(asyncio.get_running_loop().time() + self.idle, self.total) if started else self.first


class CloudAnswer:
    """Implements `Answer`. Invariant: `last` is set only if the provider itself said how the answer ended; litellm says
    "stop" for a cut stream."""

    def __init__(
        self,
        upstream: Any,
        call: Call,
        deployment: Deployment,
        library: CloudLibrary,
        deadlines: Deadlines,
        dropped: tuple[str, ...],
    ) -> None:
        self.dropped = dropped
        self._upstream = upstream
        self._call = call
        self._deployment = deployment
        self._library = library
        self._deadlines = deadlines
        self._called = False
        self._first: Chunk | None = None
        self._closing: asyncio.Task[None] | None = None
        self._chunks = self._stream() if call.chat.stream else self._plain()
        if call.chat.stream:
            source = upstream.completion_stream
            if type(source).__name__ == _COHERE:
                source.streaming_response = CohereLines(source.streaming_response)

    async def begin(self) -> None:
        """Wait for the first chunk. Not left to the reader: what litellm has not begun to read it cannot close."""
        try:
            self._first = await anext(self._chunks)
        except BaseException:
            await self.close()
            raise

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._first is None:
            return await anext(self._chunks)
        first, self._first = self._first, None
        return first

    async def close(self) -> None:
        if not self._call.chat.stream:
            return  # a plain answer was read whole by `open`
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # a caller that is being cancelled must not leave the connection open

    async def _close(self) -> None:
        """litellm's close reaches the connection only where its iterator has one; Anthropic's and Cohere's have only
        lines."""
        lines = getattr(self._upstream.completion_stream, "streaming_response", None)
        close_lines = getattr(lines, "aclose", None)
        with suppress(*self._library.errors):
            await self._upstream.aclose()
            if close_lines is not None:
                await close_lines()

    async def _plain(self) -> AsyncIterator[Chunk]:
        payload = self._upstream.model_dump(exclude_none=True)
        if not payload.get("choices"):
            raise UpstreamFailed("the deployment's answer has no choices")
        for choice in payload["choices"]:
            choice.pop(_LITELLM_FIELDS, None)
            choice["message"] = {"content": None, **choice["message"]}
            choice["message"].pop(_LITELLM_FIELDS, None)
            if choice["finish_reason"] == "stop" and choice["message"].get("tool_calls"):
                choice["finish_reason"] = "tool_calls"  # litellm loses Cohere's TOOL_CALL
        payload["model"] = payload.get("model") or self._deployment.model
        usage = sse.usage_of(payload)
        if usage is not None:
            payload = sse.with_cost(payload, usage, self._deployment.bill)
        yield Chunk(orjson.dumps(payload), usage=usage, last=True)

    async def _stream(self) -> AsyncIterator[Chunk]:
        held, started, finished, events, usage, tail = b"", False, False, 0, None, b""
        try:
            while (chunk := await self._next(started=started)) is not None:
                payload = self._payload(chunk)
                if stated := sse.usage_of(payload):
                    usage = stated
                    tail = sse.event(sse.with_cost(payload, usage, self._deployment.bill))
                elif payload["choices"]:
                    events += 1
                    finished = finished or self._finished(payload)
                    started = started or sse.has_token(payload)
                    held += sse.event(payload)
                    if started:
                        yield Chunk(held)
                        held = b""
            if not finished:
                raise UpstreamFailed(_CUT)
        except UpstreamError as error:
            raise UpstreamCut(error.message) if started else error from None
        end = tail + sse.DONE if self._call.chat.include_usage else sse.DONE
        yield Chunk(held + end, tokens=0, usage=usage or Usage(self._call.prompt_tokens, events), last=True)

    async def _next(self, *, started: bool) -> Any:
        """litellm's next chunk, None at its end."""
        try:
            async with asyncio.timeout_at(self._deadlines.next(started=started)):
                return await anext(self._upstream, None)
        except TimeoutError:
            raise UpstreamTimeout("the deployment did not answer in time") from None
        except self._library.errors as error:
            raise translate(error, self._deployment.name, time.time()) from None

    def _finished(self, payload: dict[str, Any]) -> bool:
        """Whether the provider has said how the answer ended. Raises `UpstreamFailed` where litellm says it in its
        place."""
        if not any(choice["finish_reason"] for choice in payload["choices"]):
            return False
        if self._upstream.received_finish_reason or self._upstream.intermittent_finish_reason:
            return True
        raise UpstreamFailed(_CUT)

    def _payload(self, chunk: Any) -> dict[str, Any]:
        """A chunk on OpenAI's wire: choices that say nothing left out, none beside usage."""
        usage = getattr(chunk, "usage", None)
        payload: dict[str, Any] = {
            "id": chunk.id,
            "object": "chat.completion.chunk",
            "created": chunk.created,
            "model": chunk.model or self._deployment.model,
            "choices": [choice for choice in map(_choice, chunk.choices) if choice and usage is None],
        }
        if usage is not None:
            payload["usage"] = usage.model_dump(
                exclude_none=True, exclude={"cost"}
            )  # litellm's own, from its own price
        for choice in payload["choices"]:
            self._called = self._called or "tool_calls" in choice["delta"]
            if self._called and choice["finish_reason"] == "stop":
                choice["finish_reason"] = "tool_calls"  # litellm loses Cohere's TOOL_CALL
        return payload


def _choice(choice: Any) -> dict[str, Any] | None:
    delta = choice.delta.model_dump(exclude_none=True)
    delta.pop(_LITELLM_FIELDS, None)
    if not delta and not choice.finish_reason:
        return None
    for call in delta.get("tool_calls", ()):
        for holder, key in ((call, "id"), (call["function"], "name")):
            if not holder.get(key, True):
                del holder[key]  # a continued call; clients take an empty id or name for a new one
    payload = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is not None:
        payload["logprobs"] = logprobs.model_dump()
    return payload
