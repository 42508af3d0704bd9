"""What the requests of one policy may call, and what must be made ready for a policy.

Owns no lives: running.py opens and closes. Refuses to know which policy is in use.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.backends import Backends
from gateway.backends.base import Backend
from gateway.backends.build import authorities_of
from gateway.engines import Engine
from gateway.labels import Scanner
from gateway.loads import Source
from gateway.policy import Policy
from gateway.replicas import Watched
from gateway.serving import Serving
from gateway.types import Deployment, Replica

# The detectors' automaton is built as text passes through it; this is passed through before the first request is.
_PROSE = (
    "In 2026, e-mail a-b.c@example to +1 (555) 010-0199; def f(x: int) -> str: return f'{x:>10}' # 0xFF, {[~^|]}\n" * 20
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a policy needs that takes too long for the event loop, or reads files."""

    scanner: Scanner
    authorities: Mapping[str, ssl.SSLContext | None]


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What the requests of one policy may call. Backends and engines are shared with other generations where the
    deployment is the same; each is closed with the last generation that holds it."""

    deployments: Mapping[str, Deployment]
    opened: Mapping[str, Backend]
    engines: Mapping[str, Engine]
    authorities: Mapping[str, ssl.SSLContext | None]
    backends: Backends = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", Backends(self.opened))

    def watched(self) -> list[Watched]:
        """The deployments that may be at several places."""
        watched = (Watched.of(deployment) for deployment in self.deployments.values())
        return [one for one in watched if one is not None]

    def sources(self, replicas: Mapping[str, tuple[Replica, ...]]) -> list[Source]:
        """Where to ask how busy deployments are: each of their replicas, or where they are."""
        sources = []
        for name in self.opened:
            engine = self.engines.get(name)
            uds = engine.supervisor.spec.uds if engine is not None else None
            for replica in replicas.get(name) or (None,):
                sources.append(Source.of(self.deployments[name], uds, self.authorities[name], replica))
        return [source for source in sources if source is not None]


def prepared_for(policy: Policy, before: Serving | None) -> Prepared:
    """For a thread. What is served `before` lends its scanner where that finds the same. Raises OSError."""
    authorities = {d.name: authorities_of(d) for d in policy.deployments.values() if d.unavailable is None}
    if before is not None and (before.policy.kinds, before.policy.patterns) == (policy.kinds, policy.patterns):
        return Prepared(before.scanner, authorities)
    scanner = Scanner(policy.kinds, policy.patterns)
    scanner.scan([_PROSE])
    return Prepared(scanner, authorities)


def is_moved(before: Deployment | None, after: Deployment) -> bool:
    """Whether a name stands for something else than before, so that what was measured says nothing of it."""
    if before is None:
        return False
    return _target(before) != _target(after)


def _target(d: Deployment) -> tuple[object, ...]:
    return (
        d.backend,
        d.model,
        d.quantization,
        d.speculation,
        d.draft_model,
        d.zone,
        d.urls,
        d.api_key,
        d.api_base,
        d.ca_file,
        d.unavailable,
    )
