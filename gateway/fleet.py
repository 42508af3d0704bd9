"""What is known of each deployment now: whether it is up, its circuit, what is in flight, how fast it has been of late.

Owns the state that the request path and the supervisor report into, and turns it into a `Snapshot` for the decision.
Times come in as arguments (seconds of a monotonic clock). Refuses to decide anything: a status is a fact with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp2, log2

from gateway.errors import GatewayError, Retryable, UpstreamCut, UpstreamOverloaded, UpstreamUnauthorized
from gateway.types import CircuitState, DeploymentStatus, Snapshot

FAILURES_TO_OPEN = 3
FIRST_COOL_OFF = 2.0
LONGEST_COOL_OFF = 60.0
UNAUTHORIZED_COOL_OFF = 60.0

_BUCKETS_PER_OCTAVE = 16  # a bucket is 4.4 % wide, so its middle is within 2.2 % of what was measured
_LOWEST_MS = 0.1
_HALF_LIFE = 60.0
_RESCALE_AFTER = 40.0  # half-lives: weights stay far from what a float cannot hold
_NEGLIGIBLE = 1e-6


class DecayingHistogram:
    """Durations on a logarithmic scale, each halving in weight every 60 s. Forward decay: a newer sample weighs more,
    so that adding is O(1) (Cormode et al., "Forward Decay", ICDE 2009)."""

    __slots__ = ("_origin", "_total", "_weights")

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}
        self._total = 0.0
        self._origin: float | None = None

    def add(self, milliseconds: float, now: float) -> None:
        """Count one duration, measured at `now`."""
        if self._origin is None:
            self._origin = now
        half_lives = (now - self._origin) / _HALF_LIFE
        if half_lives > _RESCALE_AFTER:
            faded = exp2(-half_lives)
            self._weights = {b: w * faded for b, w in self._weights.items() if w * faded > _NEGLIGIBLE}
            self._total = sum(self._weights.values())
            self._origin, half_lives = now, 0.0
        weight = exp2(half_lives)
        bucket = int(log2(max(milliseconds, _LOWEST_MS) / _LOWEST_MS) * _BUCKETS_PER_OCTAVE)
        self._weights[bucket] = self._weights.get(bucket, 0.0) + weight
        self._total += weight

    def quantile(self, q: float) -> float | None:
        """Milliseconds that a share `q` of the weight does not exceed; None before the first sample."""
        if self._origin is None:
            return None
        reached = 0.0
        bucket = 0
        for bucket in sorted(self._weights):
            reached += self._weights[bucket]
            if reached >= q * self._total:
                break
        return _LOWEST_MS * exp2((bucket + 0.5) / _BUCKETS_PER_OCTAVE)

    def clear(self) -> None:
        """Forget everything: after an outage the past says nothing."""
        self._weights.clear()
        self._total = 0.0
        self._origin = None


@dataclass(slots=True)
class _Known:
    """The mutable record behind one deployment's status. `down` is set from outside (starting, stopped); the circuit is
    ours."""

    down: str | None = None
    down_retry_after: float = 1.0
    in_flight: int = 0
    former: int = 0  # of those in flight, at most this many went to what the name stood for before a reload
    failures: int = 0
    open_until: float | None = None
    open_reason: str = ""
    cool_off: float = FIRST_COOL_OFF
    trial: bool = False
    first_token: DecayingHistogram = field(default_factory=DecayingHistogram)
    p95_ms: float | None = None
    p95_at: float = float("-inf")


class Fleet:
    """The state of all deployments. Invariant: each `started` is followed by exactly one `ended` or `abandoned`, so
    that `in_flight` never drifts."""

    def __init__(self, deployments: Iterable[str]) -> None:
        self._known = {name: _Known() for name in deployments}
        self._statuses = {name: DeploymentStatus() for name in self._known}
        self._changed: set[str] = set()
        self._circuits_open: set[str] = set()

    def adopt(self, names: Iterable[str], changed: Iterable[str]) -> None:
        """Know these deployments too. Of those that `changed` (they are something else under the old name) everything
        is forgotten; requests still in flight to what they were before are not held against them."""
        for name in changed:
            former = self._known[name].in_flight
            self._known[name] = _Known(in_flight=former, former=former)
            self._circuits_open.discard(name)
            self._changed.add(name)
        for name in names:
            if name not in self._known:
                self._known[name] = _Known()
                self._statuses[name] = DeploymentStatus()

    def forget(self, names: Iterable[str]) -> None:
        """Know these no longer. Nothing is in flight to them."""
        for name in names:
            del self._known[name], self._statuses[name]
            self._circuits_open.discard(name)
            self._changed.discard(name)

    def snapshot(self, now: float, draw: float) -> Snapshot:
        """The fleet at `now`. Shares nothing that changes later."""
        if self._changed or self._circuits_open:
            for name in self._changed | self._circuits_open:
                self._refresh(name, now)
            self._changed.clear()
        return Snapshot(now, draw, self._statuses.copy())

    def set_down(self, name: str, reason: str, now: float, retry_after: float = 1.0) -> None:
        """The deployment cannot be called, for a reason that callers and operators are told."""
        known = self._known[name]
        known.down, known.down_retry_after = reason, retry_after
        self._changed.add(name)

    def set_up(self, name: str, now: float) -> None:
        """The deployment can be called again; what was measured before is forgotten."""
        old = self._known[name]
        self._known[name] = _Known(in_flight=old.in_flight, former=old.former)
        self._circuits_open.discard(name)
        self._changed.add(name)

    def started(self, name: str, now: float) -> None:
        """An attempt begins. Where the circuit is half open, it is the trial."""
        known = self._known[name]
        known.in_flight += 1
        if known.open_until is not None:
            known.trial = True
        self._changed.add(name)

    def first_token(self, name: str, milliseconds: float, now: float) -> None:
        """A stream's first token came this long after the request was sent."""
        known = self._known[name]
        known.first_token.add(milliseconds, now)
        if now - known.p95_at > 0.25:
            known.p95_ms, known.p95_at = known.first_token.quantile(0.95), now

    def abandoned(self, name: str) -> None:
        """The attempt was given up by us before its first token, which says nothing of the deployment: neither that it
        is well nor that it is broken."""
        known = self._known[name]
        known.in_flight -= 1
        known.trial = False
        self._changed.add(name)

    def ended(self, name: str, error: GatewayError | None, now: float) -> None:
        """The attempt is over; `error` is None where it answered."""
        known = self._known[name]
        known.in_flight -= 1
        known.trial = False
        former = known.former > 0 and error is not None
        known.former = min(known.former - former, known.in_flight)
        if former:
            pass
        elif isinstance(error, Retryable | UpstreamCut):
            self._failed(name, known, error, now)
        elif known.open_until is None or error is not None:
            known.failures = 0
        else:
            known.failures, known.open_until, known.cool_off = 0, None, FIRST_COOL_OFF
            known.first_token.clear()
            self._circuits_open.discard(name)
        self._changed.add(name)

    def _failed(self, name: str, known: _Known, error: GatewayError, now: float) -> None:
        cool_off: float | None = None
        known.failures += not isinstance(error, UpstreamOverloaded)
        if isinstance(error, UpstreamUnauthorized):
            cool_off = UNAUTHORIZED_COOL_OFF
        elif isinstance(error, UpstreamOverloaded):  # full is not broken: wait as long as it says, if it says
            cool_off = min(error.retry_after, LONGEST_COOL_OFF) if error.retry_after is not None else None
        elif known.open_until is not None and now < known.open_until:
            pass  # it was under way when the circuit opened, and is of the failures that opened it
        elif known.open_until is not None or known.failures >= FAILURES_TO_OPEN:
            cool_off = known.cool_off
            known.cool_off = min(known.cool_off * 2, LONGEST_COOL_OFF)
        if cool_off is not None:
            known.open_until, known.open_reason = now + cool_off, error.message
            self._circuits_open.add(name)

    def _refresh(self, name: str, now: float) -> None:
        known = self._known[name]
        down, retry_after = known.down, known.down_retry_after
        circuit: CircuitState = "closed"
        if known.open_until is not None:
            circuit = "open" if now < known.open_until else "half_open"
            if down is None and (circuit == "open" or known.trial):
                retry_after = max(known.open_until - now, 1.0)
                down = f"circuit open after failures ({known.open_reason})"
        self._statuses[name] = DeploymentStatus(
            down,
            retry_after if down else 0.0,
            circuit,
            known.in_flight,
            known.p95_ms,
        )
