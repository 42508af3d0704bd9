"""Probes of a container, and when each is due: the kubelet's rules, without its clock."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.deploy.node.programs import within

Try = Callable[["Probe"], bool]


@dataclass(frozen=True)
class Probe:
    """As the manifest says, with Kubernetes' defaults. `path` of an HTTP probe, `command` of one that executes; else
    the port has to take a connection."""

    port: int = 0
    path: str = ""
    command: tuple[str, ...] = ()
    period: float = 10.0
    timeout: float = 1.0
    failures: int = 3
    successes: int = 1
    delay: float = 0.0

    @classmethod
    def of(cls, written: Mapping[str, Any], ports: Mapping[str, int]) -> Probe:
        known = {"httpGet", "tcpSocket", "exec", "periodSeconds", "timeoutSeconds", "failureThreshold"}
        known |= {"successThreshold", "initialDelaySeconds"}
        if not set(written) <= known:
            raise ValueError(f"a probe with {sorted(set(written) - known)} is not understood here")
        asked = written.get("httpGet") or written.get("tcpSocket") or {}
        port = asked.get("port", 0)
        return cls(
            port=port if isinstance(port, int) else ports[port],
            path=asked.get("path", ""),
            command=tuple(written.get("exec", {}).get("command", ())),
            period=float(written.get("periodSeconds", 10)),
            timeout=float(written.get("timeoutSeconds", 1)),
            failures=int(written.get("failureThreshold", 3)),
            successes=int(written.get("successThreshold", 1)),
            delay=float(written.get("initialDelaySeconds", 0)),
        )


class Watch:
    """One probe over time. `holds` is None until it has either succeeded or failed often enough."""

    def __init__(self, probe: Probe, since: float) -> None:
        self.probe = probe
        self.holds: bool | None = None
        self._due = since + probe.delay
        self._good = self._bad = 0

    def look(self, now: float, tried: Try) -> bool:
        """Try it if it is due. Whether `holds` is another than before."""
        if now < self._due:
            return False
        self._due = now + self.probe.period
        before = self.holds
        if tried(self.probe):
            self._good, self._bad = self._good + 1, 0
            if self._good >= self.probe.successes:
                self.holds = True
        else:
            self._good, self._bad = 0, self._bad + 1
            if self._bad >= self.probe.failures:
                self.holds = False
        return self.holds is not before


def answers(probe: Probe, address: str, node: str) -> bool:
    """Whether an HTTP or TCP probe succeeds, from the node's network namespace."""
    try:
        with within(node):
            connection = socket.create_connection((address, probe.port), probe.timeout)
    except OSError:
        return False
    with connection:
        if not probe.path:
            return True
        asking = http.client.HTTPConnection(address, probe.port, timeout=probe.timeout)
        asking.sock = connection
        try:
            asking.request("GET", probe.path, headers={"user-agent": "kube-probe/1.36", "connection": "close"})
            return 200 <= asking.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
