"""What NetworkPolicies allow, by the rules of networking.k8s.io/v1: a pod that no policy selects is open, policies that
select it add up, and both ends must allow a connection."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from tests.deploy.cluster import Object, Peer, of_kind, pod_of


def may_connect(objects: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` reaches `port` of `target`; an end outside the namespace is bound by no policy of ours."""
    return _allowed(objects, source, target, "Egress", port, protocol, target) and _allowed(
        objects, target, source, "Ingress", port, protocol, target
    )


def _allowed(
    objects: list[Object], pod: Peer, other: Peer, direction: str, port: int, protocol: str, target: Peer
) -> bool:
    if pod.address or pod.namespace != "hybridgate":
        return True
    policies = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.names)
    ]
    if not policies:
        return True
    side = "to" if direction == "Egress" else "from"
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    return any(
        (side not in rule or any(_is(peer, other) for peer in rule[side]))
        and ("ports" not in rule or any(_port(objects, p, port, protocol, target) for p in rule["ports"]))
        for rule in rules
    )


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels only) matches."""
    assert set(selector) <= {"matchLabels"}, "a selector that is not understood here"
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def _is(peer: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if not other.address:
            return False
        address = ip_address(other.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(network) for network in block.get("except", ())
        )
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], other.namespace_names):
            return False
    elif other.namespace != "hybridgate":
        return False
    return "podSelector" not in peer or selects(peer["podSelector"], other.names)


def _port(objects: list[Object], allowed: dict[str, Any], port: int, protocol: str, target: Peer) -> bool:
    """A port by number, or by the name that the target's containers give it."""
    if allowed["protocol"] != protocol:
        return False
    wanted = allowed["port"]
    if isinstance(wanted, int):
        return port == wanted
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        if selects({"matchLabels": workload["spec"]["template"]["metadata"]["labels"]}, target.names):
            named = {p["name"]: p["containerPort"] for c in pod_of(workload)["containers"] for p in c["ports"]}
            return bool(named.get(wanted) == port)
    return False
