"""A policy in use, with all that was built for it once, when it was loaded. Refuses to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.backends import Backends
from gateway.labels import Scanner
from gateway.masking import Masker
from gateway.policy import Policy
from gateway.reply import header_bytes
from gateway.tokens import TokenCounter


@dataclass(frozen=True)
class Serving:
    """A policy with what was built for it. Captured once a request, so that a change never reaches a request in
    flight."""

    policy: Policy
    scanner: Scanner
    counters: Mapping[str, TokenCounter]
    backends: Backends
    masker: Masker | None = field(init=False)
    rule_headers: Mapping[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "masker", Masker(self.scanner) if self.policy.masks else None)
        names = [rule.name for rule in self.policy.rules] + [self.policy.default.name, *self.policy.deployments]
        object.__setattr__(self, "rule_headers", {name: header_bytes(name) for name in names})
