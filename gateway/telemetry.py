"""The decision record: one JSON line a request, at INFO.

Owns what may be said about a request. A record is built from names of the policy, numbers and ids; it has no field that
could hold a prompt, an answer, a header or a key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

import orjson
import structlog

from gateway.types import Decision, Outcome, Usage, usd


@dataclass(slots=True)
class Record:
    """What is said about one request once it is over. Filled along the request path; `outcome` is `ok`, an error's
    code, or `client_gone`."""

    request_id: str
    decision_id: str
    status: int = 0
    outcome: str = "ok"
    stream: bool = False
    tenant: str = ""
    key: str = ""
    decision: Decision | None = None
    deployment: str | None = None
    zone: str | None = None
    attempts: int = 0
    masked: int | None = None  # values that the deployment got placeholders for; None where it got the request as it is
    failed: list[Outcome] = field(default_factory=list)
    usage: Usage | None = None
    cost_nusd: int | None = None
    first_token_ms: float | None = None
    total_ms: float = 0.0

    def fields(self) -> dict[str, Any]:
        """The record as the logged JSON object; what is not known is left out."""
        line: dict[str, Any] = {
            "request_id": self.request_id,
            "decision": self.decision_id,
            "status": self.status,
            "outcome": self.outcome,
            "stream": self.stream,
            "total_ms": round(self.total_ms, 2),
        }
        if self.tenant:
            line["tenant"], line["key"] = self.tenant, self.key
        if self.decision is not None:
            line["rule"] = self.decision.rule
            line["policy"] = self.decision.policy_hash
            line["labels"] = sorted(self.decision.labels)
            line["candidates"] = [candidate.deployment for candidate in self.decision.candidates]
            line["rejected"] = {rejection.deployment: rejection.gate for rejection in self.decision.rejections}
        if self.deployment is not None:
            line["deployment"], line["zone"], line["attempts"] = self.deployment, self.zone, self.attempts
        if self.masked is not None:
            line["masked"] = self.masked
        if self.failed:
            line["failed"] = {outcome.attempt.deployment: outcome.reason for outcome in self.failed}
        if self.usage is not None:
            line["prompt_tokens"] = self.usage.prompt_tokens
            line["completion_tokens"] = self.usage.completion_tokens
        if self.cost_nusd is not None:
            line["cost_usd"] = usd(self.cost_nusd)
        if self.first_token_ms is not None:
            line["first_token_ms"] = round(self.first_token_ms, 2)
        return line


class _Lines:
    """Where records are written. Invariant: a record that cannot be written harms no request; the first one that is
    lost is told, and the first one after it that is not."""

    def __init__(self, stream: BinaryIO, tell: Callable[[str], None]) -> None:
        self._stream = stream
        self._tell = tell
        self._losing = False

    def write(self, line: bytes) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            self._say(f"log records are lost: they cannot be written ({error.strerror})", losing=True)
        else:
            self._say("log records are written again", losing=False)

    def flush(self) -> None:
        """Each line was written through."""

    def _say(self, what: str, *, losing: bool) -> None:
        if losing is not self._losing:
            self._losing = losing
            self._tell(what)


def open_log(stream: BinaryIO, tell: Callable[[str], None]) -> structlog.typing.FilteringBoundLogger:
    """A logger that writes JSON lines to the stream and belongs to nobody but its caller. `tell` is told, on the
    terminal, when that fails."""
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.BytesLogger(cast(BinaryIO, _Lines(stream, tell))),  # which asks for no more than write and flush
        processors=[_rendered],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return logger.bind()


def _rendered(_: object, level: str, line: MutableMapping[str, Any]) -> bytes:
    """The line as JSON, with its level and the time; one processor, because it runs for every request."""
    line["level"], line["timestamp"] = level, datetime.now(UTC)
    return orjson.dumps(line, option=orjson.OPT_UTC_Z)
