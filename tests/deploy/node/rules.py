"""What nftables must do in a pod's network namespace: the NetworkPolicies that select it, and Services' addresses.

Follows networking.k8s.io/v1: a pod that no policy of a direction selects is open in it, policies that select it add
up, answers belong to their connection, and the node reaches its own pods. Written from the rules by itself, not with
`tests.deploy.network`, which judges the same policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

from tests.deploy.cluster import Object, of_kind


@dataclass(frozen=True)
class Place:
    """A pod as the network sees it. `ports`: of its containers, by name."""

    name: str
    namespace: str
    address: str
    labels: dict[str, str]
    namespace_labels: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Forward:
    """A port of a Service's address, and those who answer there."""

    address: str
    protocol: str
    port: int
    to: tuple[tuple[str, int], ...]


def ruleset(
    objects: Sequence[Object], place: Place, everyone: Iterable[Place], node: str, to: Iterable[Forward]
) -> str:
    """The whole of it, as `nft -f` reads it: replaces what was there, at once."""
    others = list(everyone)
    lines = ["table inet pods {}", "delete table inet pods", "table inet pods {"]
    for hook, direction, loop in (("input", "Ingress", "iif"), ("output", "Egress", "oif")):
        allowed = _allowed(objects, place, others, direction)
        verdict = "accept" if allowed is None else "drop"
        lines.append(f"chain {hook} {{")
        lines.append(f"type filter hook {hook} priority 0; policy {verdict};")
        lines += [f"{loop} lo accept", "ct state established,related accept"]
        if hook == "input":
            lines.append(f"ip saddr {node} accept")
        lines += allowed or ()
        lines.append("}")
    lines += ["}", "table ip services {}", "delete table ip services", "table ip services {", "chain output {"]
    lines.append("type nat hook output priority -100;")
    lines += [_forwarded(forward) for forward in to if forward.to]
    return "\n".join([*lines, "}", "}", ""])


def _forwarded(forward: Forward) -> str:
    places = ", ".join(f"{i} : {address} . {port}" for i, (address, port) in enumerate(forward.to))
    matches = f"ip daddr {forward.address} {forward.protocol.lower()} dport {forward.port}"
    return f"{matches} dnat ip to numgen random mod {len(forward.to)} map {{ {places} }}"


def _allowed(objects: Sequence[Object], place: Place, others: list[Place], direction: str) -> list[str] | None:
    """A line for each thing that is allowed; None where everything is."""
    policies = [
        policy
        for policy in of_kind(list(objects), "NetworkPolicy")
        if policy["metadata"]["namespace"] == place.namespace
        and direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], place.labels)
    ]
    if not policies:
        return None
    lines: list[str] = []
    for policy in policies:
        for rule in policy["spec"].get(direction.lower(), ()):
            lines += _lines(rule, place, others, direction)
    return list(dict.fromkeys(lines))


def _lines(rule: dict[str, Any], place: Place, others: list[Place], direction: str) -> list[str]:
    end, side = ("saddr", "from") if direction == "Ingress" else ("daddr", "to")
    lines = []
    for peer in rule.get(side) or [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]:
        if "ipBlock" in peer:
            ends = [(_block(peer["ipBlock"], end), place)]
        else:
            ends = [(f"ip {end} {other.address}", other) for other in others if _is(peer, other, place.namespace)]
        for matches, other in ends:
            target = place if direction == "Ingress" else other
            lines += [f"{matches}{port} accept" for port in _ports(rule, target)]
    return lines


def _block(block: dict[str, Any], end: str) -> str:
    family = "ip6" if ip_network(block["cidr"]).version == 6 else "ip"
    but = ", ".join(block.get("except", ()))
    return f"{family} {end} {block['cidr']}" + (f" {family} {end} != {{ {but} }}" if but else "")


def _ports(rule: dict[str, Any], target: Place) -> list[str]:
    if "ports" not in rule:
        return [""]
    found = []
    for port in rule["ports"]:
        number = port["port"] if isinstance(port["port"], int) else target.ports.get(port["port"])
        if number is not None:
            found.append(f" {port['protocol'].lower()} dport {number}")
    return found


def _is(peer: dict[str, Any], other: Place, namespace: str) -> bool:
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], other.namespace_labels):
            return False
    elif other.namespace != namespace:
        return False
    return "podSelector" not in peer or selects(peer["podSelector"], other.labels)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels only) matches."""
    if not set(selector) <= {"matchLabels"}:
        raise ValueError("a selector that is not understood here")
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
